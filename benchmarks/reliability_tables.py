"""The tables of `load.py`, `soak.py`, `fuzz.py` and `listing.py`."""

from __future__ import annotations

from typing import Any

from cells import head, line

GB, MIB = 1e9, 2**20
NOT_PROMISED = "pictures"  # made by the benchmark, not by a command
READERS = {
    "images": "image decoder",
    "shards": "shards",
    "manifests": "manifests",
    "features": "features in Parquet",
    "recipes": "recipes and settings",
    "zips": "zip archives",
    "tars": "tar archives, WebDataset",
    "keys": "LUPerson's pickled keys",
    "weights": "files of weights",
    "indices": "manifests of indices",
}


def reliability_load(results: dict[str, Any]) -> str:
    """Time, memory, files and disk of every command, by number of images, beside what was predicted."""
    lines = head(
        "images", "command", "s", "predicted, s", "s of cores", "images/s", "held, GB", "predicted, GB",
        "pages of files, GB", "open files", "written, GB",
    )  # fmt: skip
    promised, prediction = results["promised"], results["prediction"]
    rows = [row for row in results["rows"] if row["step"] != NOT_PROMISED]
    for row in rows:
        is_predicted = row["images"] == promised["images"]
        seconds, held = (
            f"{prediction[name][row['step']]:g}" if is_predicted else "" for name in ("seconds", "held_gb")
        )
        peak = row["peak"]
        lines.append(
            line(
                f"{row['images']:,}", f"dmx {row['step']}", f"{row['seconds']:.0f}", seconds,
                f"{row['cpu_s']:.0f}", f"{row['images_per_s']:,.0f}", f"{peak['held_bytes'] / GB:.2f}", held,
                f"{peak['mapped_bytes'] / GB:.2f}", f"{peak['handles']:,}", f"{row['disk_bytes'] / GB:.2f}",
            )
        )  # fmt: skip
    return "\n".join([*lines, "", _told_of_load(results, rows)])


def _told_of_load(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What was promised and kept, and where."""
    promised, environment = results["promised"], results["environment"]
    most = [row for row in rows if row["images"] == max(row["images"] for row in rows)]
    seconds, held = sum(row["seconds"] for row in most), max(row["peak"]["held_bytes"] for row in most)
    is_kept = seconds <= promised["seconds"] and held <= promised["held_bytes"]
    loads = [row[name] for row in most for name in ("load_before", "load_after")]
    found = next(row["found"] for row in most if row["step"] == "cluster")
    height, width = results["image"]
    attempts = sum(row["attempts"] for row in most) - len(most)
    again = f" Begun again {attempts} times, all of which counts." if attempts else ""
    return (
        f"Promised for {promised['images']:,} images: {promised['seconds'] / 60:.0f} minutes and "
        f"{promised['held_bytes'] / GB:.0f} GB; {'kept' if is_kept else 'NOT kept'} with "
        f"{seconds / 60:.0f} minutes and {held / GB:.1f} GB for {most[0]['images']:,}. JPEGs of {height} x "
        f"{width} pixels, {results['images_an_identity']} of an identity, a narrow ResNet-18 of "
        f"{results['model']['backbone_args']['channels'][-1]} numbers, exact neighbours; "
        f"{found['clusters']:,} pseudo-identities with a purity of {found['purity']:.0%}. Held is what the "
        "system cannot take back: own and shared memory of the command and all it started, Ray included, "
        f"read every second. {environment['cores']} cores of an {environment['cpu']} with "
        f"{environment['memory_bytes'] / 2**30:.0f} GiB, busy with other work besides: load average "
        f"{min(loads):.0f} to {max(loads):.0f}.{again}"
    )


def reliability_soak(results: dict[str, Any]) -> str:
    """Memory and handles at both ends of each span of epochs, and how they grow in it."""
    lines = head(
        "started by", "epochs", "held at first, MiB", "at the end, MiB", "MiB an epoch (95 %)",
        "open files", "threads", "mapped files an epoch", "all mapped pieces an epoch", "shared memory, MiB",
    )  # fmt: skip
    limits, environment = results["limits"], results["environment"]
    most = {
        "held_bytes": limits["bytes"],
        **dict.fromkeys(("handles", "threads", "maps", "mapped_files"), limits["things"]),
    }
    growing = []
    for run in results["runs"]:
        for span in run["spans"]:
            slopes, within = span["slopes"], f"{span['first']} to {span['last']}"
            rows = [row for row in run["rows"] if span["first"] <= row["epoch"] <= span["last"]]
            low, middle, high = (slopes["held_bytes"][name] / MIB for name in ("low", "slope", "high"))
            lines.append(
                line(
                    run["launcher"], within, *(f"{rows[end]['held_bytes'] / MIB:.1f}" for end in (0, -1)),
                    f"{middle:+.3f} ({low:+.3f} to {high:+.3f})",
                    *(f"{rows[0][name]:,} to {rows[-1][name]:,}" for name in ("handles", "threads")),
                    *(f"{slopes[name]['slope']:+.2f}" for name in ("mapped_files", "maps")),
                    f"{rows[0]['shared_bytes'] / MIB:.1f} to {rows[-1]['shared_bytes'] / MIB:.1f}",
                )
            )  # fmt: skip
            if any(slopes[name]["low"] > limit for name, limit in most.items()):
                growing.append(f"{run['launcher']} over epochs {within}")
    verdict = f"NOT kept by {' and by '.join(growing)}" if growing else "kept"
    loads = " and ".join(f"{run['load']:.0f}" for run in results["runs"])
    lines += [
        "",
        f"`dmx train` with the demo's recipe on tiny data, read at the end of every epoch, after "
        f"{results['warm_up']} epochs that warm up. Promised: memory surely grows by no more than "
        f"{limits['bytes'] / MIB:g} MiB an epoch, and handles, threads, mapped files and all pieces of "
        f"address space by less than {limits['things']:g}; {verdict}. Load average {loads} at the start; "
        f"{environment['cores']} cores of an {environment['cpu']}; "
        f"{'no GPU' if environment['gpu'] is None else environment['gpu']}.",
    ]
    return "\n".join(lines)


def fuzz(results: dict[str, Any]) -> str:
    """How many files each reader was fed, and what broke it."""
    lines = head("reader", "files", "places in the code", "seconds", "faults", texts=1)
    for row in results["rows"]:
        faults = len(row["faults"]) or ("ended early" if row["status"] else 0)
        cells = (f"{row['files']:,}", row["edges"], f"{row['seconds']:.0f}", faults)
        lines.append(line(READERS[row["target"]], *cells))
    versions, machine = results["versions"], results["machine"]
    lines += [
        "",
        f"atheris {versions['atheris']} on Python {results['python']}, {machine['cores']} busy cores of an "
        f"{machine['processor']}, starting from files that are whole; at least a minute each, start included "
        "here. A fault is any answer but a DmxError, more than 4 GiB of memory, or 120 s for a file.",
    ]
    return "\n".join(lines)


def listing(results: dict[str, Any]) -> str:
    """Memory and time of listing by the number of names, and what a broken image costs."""
    rows = {(row["images"], row["way"]): row for row in results["rows"]}
    lines = head("files in a folder", "listed in runs, MB", "CPU, s", "sorted in memory, MB", "CPU, s")
    for images in dict.fromkeys(row["images"] for row in results["rows"]):
        cells: list[str] = []
        for way in ("in runs", "in memory"):
            row = rows[images, way]
            cells += [f"{row['memory_bytes'] / 1e6:.0f}", f"{row['cpu_s']:.1f}"]
        lines.append(line(f"{images:,}", *cells))
    costs = results["broken"]
    told = ", ".join(f"{row['cpu_s']:.2f} s with {row['broken']:,} broken" for row in costs)
    machine = results["machine"]
    lines += [
        "",
        f"Memory beyond the start. `dmx ingest` of {costs[0]['images']:,} images takes {told} (CPU time). "
        f"{machine['cores']} cores of an {machine['processor']}; `python benchmarks/listing.py`.",
    ]
    return "\n".join(lines)
