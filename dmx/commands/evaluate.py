"""Measure a trained model on data sets it has not seen: mAP, rank-1, rank-5, rank-10 and mINP.

Every DATASET needs a query and a gallery split; it may be ingested or in a known layout as its authors
distribute it. Gallery images of the query's identity and camera are left out, and so is identity -1.

  dmx evaluate runs/first data/market Market-1501-v15.09.15
  dmx evaluate runs/first data/market --rerank --flip --json results.json
  dmx evaluate runs/first data/market --roc
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dmx.commands.sources import (
    CHECKPOINT_HELP,
    add_best_argument,
    add_input_arguments,
    add_layout_arguments,
    warn_as,
)

if TYPE_CHECKING:
    from dmx.data.dataset import Dataset
    from dmx.data.shards import Split
    from dmx.evaluation import Embedded, Metrics
    from dmx.evaluation.histogram import DistanceHistogram
    from dmx.model import EmbeddingModel

SUMMARY = "measure a trained model on data sets"
FALSE_POSITIVE_RATES = (1e-4, 1e-3, 1e-2)
COLUMNS = (("mAP", "map"), ("rank-1", "rank1"), ("rank-5", "rank5"), ("rank-10", "rank10"), ("mINP", "minp"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=CHECKPOINT_HELP,
    )
    parser.add_argument("datasets", metavar="DATASET", nargs="+", help="folder with query and gallery")
    add_best_argument(parser)
    add_layout_arguments(parser, "a DATASET that was not ingested")
    parser.add_argument(
        "--ap",
        choices=("default", "trapezoid"),
        default="default",
        help="average precision: the mean precision at the hits, as published numbers have it, or trapezoids "
        "under the curve, as the data sets' own code has it (default: %(default)s)",
    )
    parser.add_argument("--rerank", action="store_true", help="re-rank by k-reciprocal neighbours")
    parser.add_argument(
        "--k1", type=int, default=20, metavar="N", help="--rerank: neighbours (default: %(default)s)"
    )
    parser.add_argument(
        "--k2",
        type=int,
        default=6,
        metavar="N",
        help="--rerank: neighbours of query expansion (default: %(default)s)",
    )
    parser.add_argument(
        "--lambda",
        dest="lambda_",
        type=float,
        default=0.3,
        metavar="X",
        help="--rerank: share of the original distance, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--roc",
        action="store_true",
        help="also how well a threshold of cosine distance tells whether two images are of one person, over "
        "all pairs of different cameras: equal error rate, true positive rates at false positive rates",
    )
    add_input_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the results, as fractions, to FILE")


def run(args: argparse.Namespace) -> int:
    """Embed every data set, measure, print a table."""
    from dmx.data.dataset import open_dataset
    from dmx.device import chosen_device
    from dmx.train.checkpoint import BEST, LATEST, load_model

    # Everything is looked at before anything is embedded: a mistake should not cost that time.
    _check(args)
    datasets = [
        open_dataset(
            path,
            args.layout,
            camera=args.camera,
            camera_pattern=args.camera_pattern,
            warn=warn_as("evaluate"),
        )
        for path in args.datasets
    ]
    pairs = [query_and_gallery(dataset) for dataset in datasets]
    model, config = load_model(args.checkpoint, BEST if args.best else LATEST)
    model = model.to(chosen_device(args.device, "--device"))
    size = (args.height or config.data.height, args.width or config.data.width)
    results: dict[str, Metrics] = {}
    histograms: dict[str, DistanceHistogram] = {}
    for dataset, pair in zip(datasets, pairs, strict=True):
        results[dataset.path], histogram = _measure(args, model, size, dataset, pair)
        if histogram is not None:
            histograms[dataset.path] = histogram
    print(table(results))
    if histograms:
        print(f"\n{roc_table(histograms)}")
    if args.json is not None:
        _write_json(args, results, histograms)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers out of their range and results that could not be written."""
    from dmx.errors import DmxError
    from dmx.evaluation.rerank import check_parameters

    if args.rerank:
        check_parameters(args.k1, args.k2, args.lambda_)
    for option in ("batch_size", "height", "width"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise DmxError(f"--{option.replace('_', '-')}: wanted at least 1, found {value}")
    if args.json is not None:
        _require_writable(Path(args.json))


def _require_writable(file: Path) -> None:
    from dmx.errors import DmxError

    if file.is_dir():
        raise DmxError(f"--json: wanted a file to write, found the folder {file}; name a file in it")
    if not file.parent.is_dir():
        raise DmxError(f"--json: wanted a file in a folder that is there, found no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise DmxError(f"--json: wanted a file that can be written, found {file}, which you may not write")


def query_and_gallery(dataset: Dataset) -> tuple[Split, Split]:
    """The two splits of a retrieval test.

    Raises:
        DmxError: the data set lacks one of them.
    """
    from dmx.errors import DmxError

    missing = [name for name in ("query", "gallery") if name not in dataset.splits]
    if missing:
        raise DmxError(
            f"{dataset.path} ({dataset.layout}): wanted query and gallery to evaluate on, found only "
            f"{', '.join(dataset.splits)}; choose a data set with a test part"
        )
    return dataset.split("query"), dataset.split("gallery")


def table(results: dict[str, Metrics]) -> str:
    """The results in percent, a data set a line."""
    width = max(len("data set"), *map(len, results))
    heads = "".join(f"{head:>9}" for head, _ in COLUMNS)
    lines = [f"{'data set':<{width}}  queries{heads}"]
    for name, metrics in results.items():
        values = "".join(f"{100 * getattr(metrics, field):9.1f}" for _, field in COLUMNS)
        lines.append(f"{name:<{width}}{metrics.valid_queries:9d}{values}")
    return "\n".join(lines)


def roc_table(histograms: dict[str, DistanceHistogram]) -> str:
    """The rates in percent, each with its threshold of cosine distance in brackets, a data set a line."""
    width = max(len("data set"), *map(len, histograms))
    heads = "".join(f"{f'TPR at FPR {100 * rate:g}%':>20}" for rate in FALSE_POSITIVE_RATES)
    lines = [f"{'data set':<{width}}{'EER':>20}{heads}"]
    for name, histogram in histograms.items():
        found = [histogram.equal_error(), *map(histogram.true_positive_rate, FALSE_POSITIVE_RATES)]
        values = "".join(f"{f'{100 * rate:.1f} ({distance:.3f})':>20}" for rate, distance in found)
        lines.append(f"{name:<{width}}{values}")
    return "\n".join(lines)


def _measure(
    args: argparse.Namespace,
    model: EmbeddingModel,
    size: tuple[int, int],
    dataset: Dataset,
    pair: tuple[Split, Split],
) -> tuple[Metrics, DistanceHistogram | None]:
    from dmx.errors import DmxError
    from dmx.evaluation import evaluate
    from dmx.evaluation.histogram import distance_histogram
    from dmx.evaluation.protocol import BLOCK_BYTES

    query, gallery = (
        _embedded(args, model, size, split, f"{dataset.path} {name}")
        for name, split in zip(("query", "gallery"), pair, strict=True)
    )
    try:
        metrics = evaluate(
            query, gallery, ap=args.ap, rerank=args.rerank, k1=args.k1, k2=args.k2, lambda_=args.lambda_,
            device=str(next(model.parameters()).device),
        )  # fmt: skip
        return metrics, distance_histogram(query, gallery, BLOCK_BYTES) if args.roc else None
    except DmxError as error:
        raise DmxError(f"{dataset.path}: {error}") from error


def _embedded(
    args: argparse.Namespace, model: EmbeddingModel, size: tuple[int, int], split: Split, label: str
) -> Embedded:
    from dmx.embedding import embed
    from dmx.evaluation import Embedded

    features = embed(
        model,
        split,
        height=size[0],
        width=size[1],
        batch_size=args.batch_size,
        device=next(model.parameters()).device,
        label=label,
        flip=args.flip,
    )
    return Embedded(features, split.identities, split.cameras)


def _write_json(
    args: argparse.Namespace, results: dict[str, Metrics], histograms: dict[str, DistanceHistogram]
) -> None:
    """Fractions, with what they were measured with."""
    import dataclasses
    import json

    from dmx.writing import replaced

    rerank = {"k1": args.k1, "k2": args.k2, "lambda": args.lambda_} if args.rerank else None
    content = {
        "checkpoint": args.checkpoint,
        "average_precision": args.ap,
        "rerank": rerank,
        "flip": args.flip,
        "results": {name: dataclasses.asdict(metrics) for name, metrics in results.items()},
        **({"roc": {name: _roc(histogram) for name, histogram in histograms.items()}} if args.roc else {}),
    }
    with replaced(Path(args.json)) as file:
        file.write(json.dumps(content, indent=2) + "\n")


def _roc(histogram: DistanceHistogram) -> dict[str, object]:
    """The rates with their thresholds, cosine distances."""
    rate, distance = histogram.equal_error()
    points = []
    for allowed in FALSE_POSITIVE_RATES:
        found, at = histogram.true_positive_rate(allowed)
        points.append({"false_positive_rate": allowed, "true_positive_rate": found, "distance": at})
    return {"equal_error_rate": rate, "distance": distance, "points": points}
