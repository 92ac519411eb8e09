"""Draws what the runs of `generalisation.py` did, and measures them camera by camera.

    python benchmarks/generalisation.py --switches
    python benchmarks/generalisation_pictures.py          # reads the result and the runs below --work

Writes clusters.svg, discriminator.svg and domains.png to docs/pictures (other settings: to --out), and
benchmarks/results/generalisation_cameras.json: the mAP of the queries of each camera of the unseen style.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from generalisation import PLAIN, ROLES, SETTINGS, WAYS, Run, Setting, worlds
from generalisation_tables import METHOD, WITHOUT, roles, runs_of
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from dmx.data.dataset import open_dataset
from dmx.data.shards import Split
from dmx.embedding import embed
from dmx.evaluation import Embedded, evaluate
from dmx.train.checkpoint import LATEST, load_model

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
RESULTS = Path(__file__).parent / "results"
# Told apart without colours, too.
LINES = {METHOD: ("#1b6ca8", "-"), PLAIN: ("#c0392b", "--")}
OTHER_ROLES = (("#4d9221", "-."), ("#e08214", ":"))
DOMAINS = {"labelled": ("#e08214", "s"), "unlabelled": ("#1b6ca8", "o"), "unseen": ("#4d9221", "^")}
POINTS = 500  # images of each domain


def clusters(results: dict[str, Any], path: Path) -> None:
    """Purity of the pseudo-identities and recall of pairs by epoch: means over seeds and their range."""
    figure, places = pyplot.subplots(1, 2, figsize=(6.8, 3.3), layout="constrained", sharey=True)
    claim, *others = roles(results)
    shown = [(way, claim, style) for way, style in LINES.items()]
    shown += [(METHOD, labelled, style) for labelled, style in zip(others, OTHER_ROLES, strict=False)]
    for axes, (field, label) in zip(
        places, (("purity", "purity"), ("pair_recall", "recall of pairs")), strict=True
    ):
        for way, labelled, style in shown:
            runs = runs_of(results, way, labelled).values()
            lines = [{row["epoch"]: row[field] for row in run["clusters"]} for run in runs]
            band(axes, way, lines, style, f"{way}, {labelled} labelled")
        axes.set(xlabel="epoch", title=label, ylim=(0, 1.02))
    figure.legend(*places[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    save(figure, path)


def discriminator(results: dict[str, Any], path: Path) -> None:
    """How often the discriminator is right, and the entropy of what it says of the backbone's features."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(6.4, 2.7), layout="constrained")
    for way in LINES:
        runs = [run["discriminator"] for run in runs_of(results, way, results["claim"]).values()]
        style = LINES[way]
        band(left, way, [{row["epoch"]: row["domain_accuracy"] for row in run} for run in runs], style, way)
        entropy = [{row["epoch"]: math.log(2) - row["balance"] for row in run} for run in runs]
        band(right, way, entropy, style, way)
    left.axhline(0.5, color="#777777", linewidth=0.8, linestyle=":")
    right.axhline(math.log(2), color="#777777", linewidth=0.8, linestyle=":")
    left.set(xlabel="epoch", title="accuracy (dotted: chance)", ylim=(0, 1.02))
    right.set(xlabel="epoch", title="entropy, nats (dotted: log 2)", ylim=(0, 0.72))
    left.legend(frameon=False, loc="lower left")
    save(figure, path)


def band(axes: Axes, way: str, runs: Sequence[dict[int, float]], style: tuple[str, str], label: str) -> None:
    """The mean of runs by epoch as a line, and their range."""
    if not runs:
        raise SystemExit(f'wanted runs of "{way}", found none: run generalisation.py --switches "{way}"')
    epochs = sorted(set.intersection(*map(set, runs)))
    colour, line = style
    values = [[run[epoch] for run in runs] for epoch in epochs]
    axes.plot(epochs, [statistics.mean(row) for row in values], line, color=colour, label=label, marker=".")
    axes.fill_between(
        epochs, [min(row) for row in values], [max(row) for row in values], color=colour, alpha=0.15
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def domains(setting: Setting, seed: int, work: Path, path: Path) -> None:
    """t-SNE of the unit features of three domains, as two models see them.

    Source: van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 2008.
    """
    sets = worlds(setting, ROLES[0], seed, work)
    figure, places = pyplot.subplots(1, 2, figsize=(6.8, 3.3), layout="constrained")
    for axes, way in zip(places, (WITHOUT, METHOD), strict=True):
        features, names = [], []
        for name in DOMAINS:
            split = gallery_or_train(sets[name])
            spread = np.linspace(0, len(split) - 1, min(POINTS, len(split))).astype(np.int64)
            features.append(features_of(folder(way, seed, work), split, spread))
            names += [name] * len(spread)
        at = TSNE(init="pca", perplexity=30, random_state=0).fit_transform(np.concatenate(features))
        for name, (colour, marker) in DOMAINS.items():
            own = at[np.array(names) == name]
            axes.scatter(
                own[:, 0], own[:, 1], s=5, c=colour, marker=marker, linewidths=0, alpha=0.7, label=name
            )
        axes.set(title=way, xticks=[], yticks=[])
    places[1].legend(frameon=False, markerscale=2.5, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def gallery_or_train(path: Path) -> Split:
    """The images of a data set's people."""
    dataset = open_dataset(str(path))
    return dataset.split("gallery" if "gallery" in dataset.splits else "train")


def features_of(run: Path, split: Split, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    """Unit features (N, D) of a split, or of some of its rows, by a run's last checkpoint."""
    model, config = load_model(str(run), LATEST)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = {"height": config.data.height, "width": config.data.width}
    return embed(model.to(device), split, **size, batch_size=64, device=device, rows=rows)


def by_camera(setting: Setting, seeds: Sequence[int], work: Path) -> list[dict[str, Any]]:
    """The mAP of the queries of each camera of the unseen style, by way and seed."""
    rows = []
    for seed in seeds:
        dataset = open_dataset(str(worlds(setting, ROLES[0], seed, work)["unseen"]))
        query, gallery = dataset.split("query"), dataset.split("gallery")
        for way in WAYS:
            run = folder(way, seed, work)
            asked, shown = features_of(run, query), features_of(run, gallery)
            known = Embedded(shown, gallery.identities, gallery.cameras)
            for camera in np.unique(query.cameras):
                own = query.cameras == camera
                part = Embedded(asked[own], query.identities[own], query.cameras[own])
                number = int(camera) % 100  # RandPerson's numbers are 100 x scene + camera
                rows.append({"way": way, "seed": seed, "camera": number, "map": evaluate(part, known).map})
    return rows


def folder(way: str, seed: int, work: Path) -> Path:
    """Where the run of a way in the first role is."""
    return work / "runs" / Run(way, way, (), ROLES[0], seed).folder


def save(figure: Any, path: Path) -> None:
    """Write a picture, the same one for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Draw and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--work", type=Path, default=Path("generalisation"), help="data sets and runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--out", type=Path, help=f"folder of the pictures (setting cpu: {PICTURES})")
    args = parser.parse_args()
    if args.out is None and args.setting != "cpu":
        parser.error(
            "--out: wanted a folder for the pictures of this setting, since the documents show cpu's"
        )
    out = args.out or PICTURES
    mpl.rcParams.update({"svg.hashsalt": "dmx", "font.size": 9, "svg.fonttype": "none"})
    setting, work = SETTINGS[args.setting], args.work.resolve() / args.setting
    source = args.results / setting.result
    if not source.exists():
        parser.error(f"--results: wanted {source}, which generalisation.py writes, found none")
    results = json.loads(source.read_text(encoding="utf-8"))
    clusters(results, out / "clusters.svg")
    discriminator(results, out / "discriminator.svg")
    domains(setting, args.seeds[0], work, out / "domains.png")
    rows = {"style": ROLES[0].unseen, "rows": by_camera(setting, args.seeds, work)}
    path = args.results / setting.result.replace(".json", "_cameras.json")
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
