"""Draws the learning rate of the paper's recipe over its epochs, as published and as it was meant.

    python benchmarks/learning_rate.py          # writes docs/pictures/learning-rate.svg

The published code builds new optimisers with a warm-up of their own in every epoch of stage two, so that
their rate never leaves the first value of the warm-up (`compat: official`). Its milestones are those it is
called with, which leave one schedule over the whole run no rate to speak of; `fixed` takes its defaults.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot

from dmx.config import Config, from_tree, recipe
from dmx.train.schedule import learning_rate

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "learning-rate.svg"
RECIPES = {"fixed": "domainmix", "official": "domainmix-official"}
# Told apart without colours, too.
MODES = {"fixed": ("#1b6ca8", "-", 2.2), "official": ("#c0392b", "--", 1.6)}


def configuration(compat: str) -> Config:
    """The paper's recipe in one of the modes, each with its own milestones."""
    return from_tree(recipe(RECIPES[compat]))


def draw(path: Path) -> None:
    """Both curves, logarithmic, with the beginning of stage two."""
    mpl.rcParams.update({"svg.hashsalt": "dmx", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(figsize=(6.4, 3.0), layout="constrained")
    for compat, (colour, line, width) in MODES.items():
        config = configuration(compat)
        epochs = range(config.schedule.epochs)
        rates = [learning_rate(config, epoch) for epoch in epochs]
        axes.step(epochs, rates, where="post", color=colour, linestyle=line, linewidth=width, label=compat)
    axes.axvline(config.schedule.stage_two_epoch, color="#777777", linewidth=0.8)
    axes.annotate("stage two", (config.schedule.stage_two_epoch + 0.5, 2e-4), color="#555555")
    axes.set(xlabel="epoch", ylabel="learning rate", yscale="log", xlim=(0, config.schedule.epochs))
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PICTURE)
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
