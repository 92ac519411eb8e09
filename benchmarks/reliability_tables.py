"""The tables of `fuzz.py` and `listing.py`."""

from __future__ import annotations

from typing import Any

from cells import head, line

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
