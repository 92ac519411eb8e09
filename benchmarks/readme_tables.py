"""Writes the tables of the README from the JSON that the benchmarks wrote; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo(results: dict[str, Any]) -> str:
    """Both models over the seeds, and the clusters by epoch."""
    runs = results["runs"]
    styles = runs[0]["styles"]
    lines = [
        f"| trained on | {styles['unseen']} (unseen): mAP | rank-1 | mINP |",
        "|---|---:|---:|---:|",
    ]
    labels = {
        "synthetic only": f"{styles['labelled']} with labels",
        "DomainMix": f"{styles['labelled']} with labels + {styles['unlabelled']} without (DomainMix)",
    }
    for name, label in labels.items():
        cells = [spread([run["models"][name][key] for run in runs]) for key in ("map", "rank1", "minp")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    steps = runs[0]["models"]["DomainMix"]["steps"]
    lines += [
        "",
        f"Mean ± standard deviation in percent over {len(runs)} seeds, {steps} steps each. Pseudo-identities "
        "by epoch (means; the true identities serve only to measure purity):",
        "",
        "| epoch | clusters | images kept | purity |",
        "|---:|---:|---:|---:|",
    ]
    for rows in zip(*(run["clusters"] for run in runs), strict=True):
        clusters = statistics.mean(row["clusters"] for row in rows)
        kept, purity = (100 * statistics.mean(row[key] for row in rows) for key in ("kept_share", "purity"))
        lines.append(f"| {rows[0]['epoch']} | {clusters:.0f} | {kept:.0f} % | {purity:.0f} % |")
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
    lines = [
        "| images | dense, s | DMX, s | in all | after the neighbours | dense, MB | DMX, MB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["measured"]:
        dense, dmx = row["dense"], row["dmx"]
        before, after = dense["wall_s"], dmx["wall_s"]
        lines.append(
            f"| {row['images']:,} | {before['all']:.1f} | {after['all']:.2f} "
            f"| {before['all'] / after['all']:.0f}x "
            f"| {before['after_neighbours'] / after['after_neighbours']:.0f}x "
            f"| {dense['peak_mb']:.0f} | {dmx['peak_mb']:.0f} |"
        )
    environment = results["environment"]
    machine = f"{environment['cores']} cores of an {environment['cpu']}"
    runs = f"median of {dmx['repeats']} runs (dense: {dense['repeats']})"
    lines += ["", f"Wall time on {machine}, {runs}; peak memory beyond the features."]
    return "\n".join(lines)


def spread(shares: list[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    deviation = statistics.stdev(shares) if len(shares) > 1 else 0.0
    return f"{100 * statistics.mean(shares):.1f} ± {100 * deviation:.1f}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"demo": demo, "cluster_cpu": cluster_cpu}


def filled(text: str) -> str:
    """The README with every table made anew."""
    unknown = set(re.findall(r"<!-- table: (\w+) -->", text)) - set(TABLES)
    if unknown:
        raise SystemExit(f"README.md: no function makes the tables {', '.join(sorted(unknown))}")
    for name, table in TABLES.items():
        content = table(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"README.md: wanted one table named {name}, found {found}")
    return text


def main() -> int:
    """Rewrite the README, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when a table is stale")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    wanted = filled(text)
    if arguments.check:
        return int(wanted != text)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
