"""Writes the tables of the documents from the JSON that the benchmarks wrote; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import head, line, spread
from faults_table import faults
from generalisation_tables import (
    generalisation,
    generalisation_cameras,
    generalisation_roles,
    generalisation_switches,
)
from kill_table import reliability_kill
from reliability_tables import fuzz, listing, reliability_load, reliability_soak

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LUPERSON_IMAGES = 4_180_000
MANY_IMAGES = 10_000_000  # from here on the table of predictions has a row of many GPUs


def demo(results: dict[str, Any]) -> str:
    """Both models over the seeds, and the clusters by epoch."""
    runs = results["runs"]
    styles = runs[0]["styles"]
    lines = head("trained on", f"{styles['unseen']} (unseen): mAP", "rank-1", "mINP", texts=1)
    labels = {
        "synthetic only": f"{styles['labelled']} with labels",
        "DomainMix": f"{styles['labelled']} with labels + {styles['unlabelled']} without (DomainMix)",
    }
    for name, label in labels.items():
        cells = [spread(run["models"][name][key] for run in runs) for key in ("map", "rank1", "minp")]
        lines.append(line(label, *cells))
    steps = runs[0]["models"]["DomainMix"]["steps"]
    lines += [
        "",
        f"Mean ± standard deviation in percent over {len(runs)} seeds, {steps} steps each. Pseudo-identities "
        "by epoch (means; the true identities serve only to measure purity):",
        "",
        *head("epoch", "clusters", "images kept", "purity"),
    ]
    for rows in zip(*(run["clusters"] for run in runs), strict=True):
        clusters = statistics.mean(row["clusters"] for row in rows)
        kept, purity = (100 * statistics.mean(row[key] for row in rows) for key in ("kept_share", "purity"))
        lines.append(line(rows[0]["epoch"], f"{clusters:.0f}", f"{kept:.0f} %", f"{purity:.0f} %"))
    minutes = max(run["total_seconds"] for run in runs) / 60
    memory = max(run["peak_memory_bytes"] for run in runs) / 2**30
    lines += [
        "",
        f"At most {minutes:.1f} minutes and {memory:.1f} GiB of memory for all of it, on "
        f"{results['machine']['cores']} cores of an {results['machine']['processor']}.",
    ]
    return "\n".join(lines)


def cluster_cpu(results: dict[str, Any]) -> str:
    """Time and memory of both ways, by number of images."""
    lines = head("images", "dense, s", "DMX, s", "in all", "after the neighbours", "dense, MB", "DMX, MB")
    for row in results["measured"]:
        dense, dmx = row["dense"], row["dmx"]
        before, after = dense["wall_s"], dmx["wall_s"]
        gains = (f"{before[stage] / after[stage]:.0f}x" for stage in ("all", "after_neighbours"))
        memory = (f"{way['peak_mb']:.0f}" for way in (dense, dmx))
        lines.append(
            line(f"{row['images']:,}", f"{before['all']:.1f}", f"{after['all']:.2f}", *gains, *memory)
        )
    environment = results["environment"]
    machine = f"{environment['cores']} cores of an {environment['cpu']}"
    runs = f"median of {dmx['repeats']} runs (dense: {dense['repeats']})"
    lines += ["", f"Wall time on {machine}, {runs}; peak memory beyond the features."]
    return "\n".join(lines)


def model(results: dict[str, Any]) -> str:
    """Predicted time, memory, traffic: on the fewest GPUs, LUPerson on some more, many images on most."""
    rows = [row for row in results["predictions"] if row["memory_bytes"]["fits"]]
    most = max(row["gpus"] for row in rows)
    lines = head(
        "images", "width", "GPUs", "neighbours, s", "the rest, s", "in all, s", "GiB a GPU", "GB received"
    )
    for row in rows:
        seconds, memory = row["seconds"], row["memory_bytes"]
        fewest = min(r["gpus"] for r in rows if (r["n"], r["d"]) == (row["n"], row["d"]))
        is_wanted = row["gpus"] == fewest or (row["n"] == LUPERSON_IMAGES and row["gpus"] < most)
        if not is_wanted and (row["gpus"] != most or row["n"] < MANY_IMAGES):
            continue
        search = sum(seconds[stage] for stage in ("prepare", "scan", "tighten", "rescore"))
        times = (brief(t) for t in (search, seconds["total"] - search, seconds["total"]))
        peak = max(memory[name] for name in ("self_knn", "k_reciprocal", "jaccard_pairs", "dbscan")) / 2**30
        received = brief(sum(row["network_bytes"].values()) / 1e9)
        lines.append(line(f"{row['n']:,}", row["d"], row["gpus"], *times, f"{peak:.1f}", received))
    ceilings = results["ceilings"]
    lines += [
        "",
        f"Predicted by `benchmarks/model.py`, not measured, for {ceilings['gemm_tflops']:.0f} TFLOP/s and "
        f"{ceilings['copy_tb_s']:.1f} TB/s ({ceilings['source']}), 450 GB/s between up to 8 GPUs, 50 GB/s "
        "beyond, and float32 features; received by each GPU. "
        f"{results['verdict'][0].upper()}{results['verdict'][1:]}.",
    ]
    return "\n".join(lines)


def scaling(results: dict[str, Any]) -> str:
    """Time and memory of clustering by images and workers on the CPU."""
    lines = head("images", "workers", "neighbours, s", "after them, s", "MB a worker")
    for row in sorted(results["rows"], key=lambda row: (row["images"], row["workers"])):
        times = (brief(row["cpu_s"]["neighbours"]), brief(row["after_neighbours_cpu_s"]))
        lines.append(line(f"{row['images']:,}", row["workers"], *times, f"{row['peak_bytes'] / 1e6:.0f}"))
    exponents = results["exponents"]
    lines += [
        "",
        f"CPU time of all workers together, medians of {results['rows'][0]['runs']} (one run above 200,000 "
        f"images), D = {results['width']}; peak memory beyond the features. With "
        f"one worker the time after the neighbours grows with the power {exponents['time']:.2f} of the "
        f"images, memory with the power {exponents['memory']:.2f}.",
    ]
    return "\n".join(lines)


def ivf(results: dict[str, Any]) -> str:
    """Recall and CPU time of inverted lists beside the exact search."""
    lines = head("images", "exact, s", "lists", "probes", "recall", "s")
    for size in results["measured"]:
        exact = brief(size["exact"]["cpu_s"])
        for row in size["ivf"]:
            cells = (size["lists"], row["probes"], f"{row['recall']:.3f}", brief(row["cpu_s"]))
            lines.append(line(f"{size['rows']:,}", exact, *cells))
    lines += [
        "",
        f"CPU seconds, medians of {results['measured'][0]['repeats']}, D = {results['width']}, "
        f"{results['images_an_identity']} images an identity; {results['default_probes']} probes unless set.",
    ]
    return "\n".join(lines)


def brief(seconds: float) -> str:
    """Two digits, or all before the point."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def gpu(results: dict[str, Any]) -> str:
    """What one GPU measured on clustered float32 features, beside its ceilings and chunked products."""
    if results["gpu"] is None:
        return (
            f"No GPU has been measured yet: {results['reason']} where `benchmarks/gpu.py` was run last "
            f"({results['date']})."
        )
    lines = head(
        "images", "width", "neighbours, s", "of the GEMM ceiling", "predicted, s", "`matmul` + `topk`, s",
        "all of it, s",
    )  # fmt: skip
    timed = {
        (row.get("stage") or row["rival"], row["n"], row["d"]): row
        for row in results["rows"] + results["rivals"]
        if (row["kind"], row["dtype"]) == ("clustered", "float32")
    }

    def cell(name: str, n: int, d: int, field: str = "seconds", form: str = ".3g") -> str:
        value = timed.get((name, n, d), {}).get(field)
        return "not measured" if value is None else format(value, form)

    for n, d in sorted({(n, d) for name, n, d in timed if name == "self_knn"}):
        search = (
            cell("self_knn", n, d),
            cell("self_knn", n, d, "gemm_share_n2", ".0%"),
            cell("self_knn", n, d, "predicted_s"),
        )
        others = (cell(name, n, d) for name in ("matmul bfloat16", "pseudo_labels"))
        lines.append(line(f"{n:,}", d, *search, *others))
    device, ceilings, checks = results["gpu"], results["ceilings"], results["checks"]
    wrong = sum(not row["passed"] for row in checks)
    lines += [
        "",
        f"Medians on one {device['name']}, {results['date']}: bf16 GEMM {ceilings['gemm_tflops']:.0f} "
        f"TFLOP/s, copy {ceilings['copy_tb_s']:.2f} TB/s in the same run. The share counts 2 N² D "
        f"operations, so symmetry may lift it above 100 %. {len(checks) - wrong} of {len(checks)} checks "
        f"against float64 passed; {len(results['failed'])} jobs failed and {len(results['skipped'])} were "
        "skipped.",
    ]
    return "\n".join(lines)


def decoders(results: dict[str, Any]) -> str:
    """Microseconds of a core an image, by decoder and by resizer."""
    sizes = list(dict.fromkeys(tuple(row["source"]) for row in results["rows"]))
    height, width = results["target"]
    lines = head("", *(f"{h} x {w} px, µs" for h, w in sizes), "furthest pixel", texts=1)
    for part, verb in (("decode", ""), ("resize", f"resize to {height} x {width}: ")):
        rows = [row for row in results["rows"] if row["part"] == part]
        for name in dict.fromkeys(row["name"] for row in rows):
            own = {tuple(row["source"]): row for row in rows if row["name"] == name}
            cells = [f"{own[size]['cpu_us']:.0f}" if size in own else "" for size in sizes]
            worst = max(row["max_difference"] for row in own.values())
            version = results["versions"].get(name)
            label = f"{verb}{name}" + (f" {version}" if part == "decode" and version else "")
            lines.append(line(label, *cells, worst))
    missing = "; ".join(
        f"{name} was not measured ({why.rstrip('.')})" for name, why in results["not_measured"].items()
    )
    lines += [
        "",
        f"Time of one core of an {results['cpu']} an image, median of {results['rounds']} rounds over "
        f"{results['images']} rendered people; levels of 255 from Pillow's pixels.{' ' * bool(missing)}"
        f"{missing}{'.' * bool(missing)}",
    ]
    return "\n".join(lines)


def classifier(results: dict[str, Any]) -> str:
    """A step's time and its memory beyond rows and moments, by number of identities and processes."""
    lines = head(
        "identities", "processes", "rows and moments, MiB", "usual, s", "fp32, s", "bf16, s", "usual, MiB",
        "fp32, MiB", "bf16, MiB",
    )  # fmt: skip
    found = {(row["classes"], row["processes"], row["way"]): row for row in results["measured"]}

    def cells(classes: int, processes: int, field: str, form: Callable[[float], str]) -> list[str]:
        rows = (found.get((classes, processes, way), {}) for way in ("usual", "fp32", "bf16"))
        return [
            form(row[field]) if field in row else "does not fit" if "skipped" in row else "" for row in rows
        ]

    for classes, processes in dict.fromkeys(key[:2] for key in found):
        state = found[classes, processes, "fp32"]["state_bytes"] / 2**20
        times = cells(classes, processes, "seconds", brief)
        sizes = cells(classes, processes, "beyond_bytes", lambda size: f"{size / 2**20:,.0f}")
        lines.append(line(f"{classes:,}", processes, f"{state:,.0f}", *times, *sizes))
    settings, environment = results["settings"], results["environment"]
    machine = f"{environment['cores']} cores of an {environment['cpu']}"
    where, medians = settings["device"], "median times"
    if where == "cpu":
        where, medians = machine, "medians of the processor time of a process with one thread"
    error, theirs = (
        max(max(row[name].values()) for row in results["agreement"]) for name in ("error", "error_of_torch")
    )
    off = max(max(row["from_float32"].values()) for row in results["agreement"])
    lines += [
        "",
        f"A step is forward, backward and Adam of {settings['batch']} images of width {settings['width']}: "
        f"{medians} on {where}; memory of a process beyond its rows and moments, "
        f"blocks of {settings['block_mb']:g} MiB. Usual is `F.linear`, `F.cross_entropy` and `Adam` in one "
        f"process, left out above {settings['memory_gb']:g} GiB. In fp32, loss and gradients are "
        f"within {off:.0e} of torch's; their largest error is {error:.0e} of the largest value, torch's "
        f"{theirs:.0e}.",
    ]
    return "\n".join([*lines, "", *row_precision(results["rounding"])])


def row_precision(runs: list[dict[str, Any]]) -> list[str]:
    """What rows held in different ways have learned, by learning rate."""
    rows = {(run["way"], run["lr"]): run for run in runs}
    rates = sorted({lr for _, lr in rows}, reverse=True)
    titles = (title for lr in rates for title in (f"off at {lr:g}", "loss"))
    lines = head("rows held as", "bytes a weight", *titles, texts=1)
    sizes = {"fp32": 12, "bf16 and rest": 12, "bf16 alone": 10, "bf16 at random": 10}
    for way, size in sizes.items():
        held = [rows[way, lr] for lr in rates]
        cells = (cell for run in held for cell in (f"{run['distance']:.1%}", f"{run['loss']:.4f}"))
        lines.append(line(way, size, *cells))
    lines += [
        "",
        f"After {runs[0]['steps']} steps on {runs[0]['classes']} drawn identities of width "
        f"{runs[0]['width']}, by learning rate: how far rows are from those of fp32, as a share of the way "
        "those went, and the loss. `classifier.precision: bf16` is `bf16 and rest`; bytes with both moments.",
    ]
    return lines


def embed(results: dict[str, Any]) -> str:
    """Rates of the pipeline and of the forward pass alone, and what memory more images take."""
    lines = head("images", "dmx embed, images/s", "forward alone, images/s", "share", "memory, GiB")
    for row in sorted(results["runs"], key=lambda run: run["images"]):
        memory = (row["private_bytes"] + row["shared_bytes"]) / 2**30
        rates = (f"{row['images_per_s']:.1f}", f"{row['bare_images_per_s']:.1f}")
        lines.append(line(f"{row['images']:,}", *rates, f"{row['share']:.0%}", f"{memory:.2f}"))
    where = results["gpu"] or f"{results['cores']} cores of an {results['cpu']}"
    height, width = results["image"]
    cpu = ""
    if results["gpu"] is None:
        ways = {(row["precision"], row["compiled"]): row["cpu_ms_per_image"] for row in results["forward"]}
        cpu = (
            f" An image more takes {1000 * results['cpu_s_per_image']:.0f} ms of a core; the forward pass "
            f"alone {ways['fp32', False]:.0f} in fp32, {ways['bf16', False]:.0f} in bf16 and "
            f"{ways['bf16', True]:.0f} compiled in bf16."
        )
    lines += [
        "",
        f"{results['backbone']}, {height} x {width}, batches of {results['batch']}, {results['precision']}, "
        f"on {where}; the pipeline without its start, the forward pass on pixels in memory, in turn in one "
        f"run of `benchmarks/embed.py`.{cpu}",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "cluster_cpu": cluster_cpu,
    "classifier": classifier,
    "decoders": decoders,
    "embed": embed,
    "faults": faults,
    "generalisation": generalisation,
    "generalisation_cameras": generalisation_cameras,
    "generalisation_ibn": generalisation_roles,
    "generalisation_roles": generalisation_roles,
    "generalisation_switches": generalisation_switches,
    "fuzz": fuzz,
    "gpu": gpu,
    "listing": listing,
    "model": model,
    "reliability_load": reliability_load,
    "reliability_soak": reliability_soak,
    "scaling": scaling,
    "ivf": ivf,
    "reliability_kill": reliability_kill,
}
# The JSON of a table that is not named like it.
RESULT = {
    "generalisation_roles": "generalisation",
    "generalisation_switches": "generalisation",
    "reliability_kill": "kill",
    "reliability_load": "load",
    "reliability_soak": "soak",
}
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "method.md", ROOT / "docs" / "reliability.md")
MARK = re.compile(r"<!-- table: (\w+) -->")


def filled(text: str, document: str = "README.md") -> str:
    """A document with every table made anew."""
    marks = re.findall(r"<!-- (table|end)\b", text)
    if marks != ["table", "end"] * (len(marks) // 2):
        raise SystemExit(f"{document}: wanted an end mark after every table mark, and none besides")
    for name in MARK.findall(text):
        if name not in TABLES:
            raise SystemExit(f"{document}: no function makes the table {name}")
        result = json.loads((RESULTS / f"{RESULT.get(name, name)}.json").read_text(encoding="utf-8"))
        before, mark, rest = text.partition(f"<!-- table: {name} -->\n")
        if not mark:
            raise SystemExit(f"{document}: wanted the mark of table {name} alone on its line")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}{TABLES[name](result)}\n{end}{after}"
    return text


def main() -> int:
    """Rewrite the documents, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when a table is stale")
    arguments = parser.parse_args()
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    found = sorted(name for text in texts.values() for name in MARK.findall(text))
    if found != sorted(TABLES):
        raise SystemExit(f"wanted each of {', '.join(sorted(TABLES))} in one place, found {', '.join(found)}")
    wanted = {path: filled(text, path.name) for path, text in texts.items()}
    if arguments.check:
        return int(wanted != texts)
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
