"""Draws memory, open files and threads by epoch, as `soak.py` read them, to docs/pictures/soak.svg.

python benchmarks/soak_picture.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "soak.svg"
RESULT = Path(__file__).parent / "results" / "soak.json"
MIB = 2**20
# Told apart without colours, too.
LINES = {"inline": ("#1b6ca8", "-", "one process"), "ray": ("#c0392b", "--", "under Ray")}
PARTS = (("held_bytes", MIB, "memory held, MiB"), ("handles", 1, "open files"), ("threads", 1, "threads"))


def draw(results: dict[str, Any], path: Path) -> None:
    """Every part by epoch, the warm-up shaded."""
    figure, places = pyplot.subplots(1, len(PARTS), figsize=(7.2, 2.5), layout="constrained")
    for axes, (name, unit, title) in zip(places, PARTS, strict=True):
        axes.axvspan(0.5, results["warm_up"] + 0.5, color="#000000", alpha=0.06, linewidth=0)
        for run in results["runs"]:
            colour, line, label = LINES[run["launcher"]]
            epochs = [row["epoch"] for row in run["rows"]]
            axes.plot(epochs, [row[name] / unit for row in run["rows"]], line, color=colour, label=label)
        axes.set(title=title, xlabel="epoch", xlim=(0.5, None), ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    places[0].legend(frameon=False, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--result", type=Path, default=RESULT, help="what soak.py wrote")
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args()
    if not args.result.exists():
        parser.error(f"--result: wanted {args.result}, which soak.py writes, found none")
    mpl.rcParams.update({"svg.hashsalt": "dmx", "font.size": 9, "svg.fonttype": "none"})
    draw(json.loads(args.result.read_text(encoding="utf-8")), args.out)


if __name__ == "__main__":
    main()
