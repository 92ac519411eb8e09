"""Measure a trained model on data sets it has not seen: mAP, rank-1, rank-5, rank-10 and mINP.

Every DATASET needs a query and a gallery split; it may be ingested or in a known layout as its authors
distribute it. Gallery images of the query's identity and camera are left out, and so is identity -1.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmx.data.dataset import Dataset
    from dmx.data.shards import Split
    from dmx.evaluation import Embedded, Metrics
    from dmx.model import EmbeddingModel

SUMMARY = "measure a trained model on data sets"
COLUMNS = (("mAP", "map"), ("rank-1", "rank1"), ("rank-5", "rank5"), ("rank-10", "rank10"), ("mINP", "minp"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, or one of its checkpoints")
    parser.add_argument("datasets", metavar="DATASET", nargs="+", help="folder with query and gallery")
    parser.add_argument(
        "--best", action="store_true", help="of a run folder, the best checkpoint, not the last"
    )
    parser.add_argument(
        "--layout", default="auto", help="how a raw DATASET is laid out (default: %(default)s)"
    )
    parser.add_argument(
        "--ap",
        choices=("default", "trapezoid"),
        default="default",
        help="average precision: the mean precision at the hits, or as the data sets' own code has it",
    )
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking")
    parser.add_argument("--k1", type=int, default=20, help="its neighbours (default: %(default)s)")
    parser.add_argument("--k2", type=int, default=6, help="its query expansion (default: %(default)s)")
    parser.add_argument(
        "--lambda",
        dest="lambda_",
        type=float,
        default=0.3,
        help="its share of the original distance (default: %(default)s)",
    )
    parser.add_argument("--flip", action="store_true", help="embed each image and its mirror image")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images a forward pass (default: %(default)s)"
    )
    parser.add_argument("--height", type=int, help="image height in pixels (default: the model's)")
    parser.add_argument("--width", type=int, help="image width in pixels (default: the model's)")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")


def run(args: argparse.Namespace) -> int:
    """Embed every data set, measure, print a table."""
    from dmx.data.dataset import open_dataset
    from dmx.train.checkpoint import BEST, LATEST, load_model

    # All data sets are looked at before any is embedded: a wrong path should not cost the others' time.
    datasets = [open_dataset(path, args.layout) for path in args.datasets]
    pairs = [query_and_gallery(dataset) for dataset in datasets]
    model, config = load_model(args.checkpoint, BEST if args.best else LATEST)
    model = model.to(_device(args.device))
    size = (args.height or config.data.height, args.width or config.data.width)
    results = {
        dataset.path: _measure(args, model, size, dataset, pair)
        for dataset, pair in zip(datasets, pairs, strict=True)
    }
    print(table(results))
    if args.json:
        _write_json(args, results)
    return 0


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


def _device(name: str) -> str:
    import torch

    from dmx.errors import DmxError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise DmxError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    return name


def _measure(
    args: argparse.Namespace,
    model: EmbeddingModel,
    size: tuple[int, int],
    dataset: Dataset,
    pair: tuple[Split, Split],
) -> Metrics:
    from dmx.errors import DmxError
    from dmx.evaluation import evaluate

    query, gallery = (
        _embedded(args, model, size, split, f"{dataset.path} {name}")
        for name, split in zip(("query", "gallery"), pair, strict=True)
    )
    try:
        return evaluate(
            query, gallery, ap=args.ap, rerank=args.rerank, k1=args.k1, k2=args.k2, lambda_=args.lambda_
        )
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


def _write_json(args: argparse.Namespace, results: dict[str, Metrics]) -> None:
    """Fractions, with what they were measured with."""
    import dataclasses
    import json
    from pathlib import Path

    rerank = {"k1": args.k1, "k2": args.k2, "lambda": args.lambda_} if args.rerank else None
    content = {
        "checkpoint": args.checkpoint,
        "average_precision": args.ap,
        "rerank": rerank,
        "flip": args.flip,
        "results": {name: dataclasses.asdict(metrics) for name, metrics in results.items()},
    }
    Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
