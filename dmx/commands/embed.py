"""Embed any number of images with a trained model, on every machine of a Ray cluster, into Parquet.

DATASET is an ingested data set, locally or in an object store, or one in a known layout as its authors
distribute it. OUT gets one file for every shard, with the columns row, key, identity, camera and embedding,
and skipped.jsonl, which lists images that cannot be decoded. A job that was interrupted goes on with the same
command; one that is finished does nothing. With RAY_ADDRESS in the environment that cluster is used, else
this machine.

  dmx embed runs/first data/market --out features/market
  dmx embed runs/first s3://bucket/luperson --out s3://bucket/features --batch-size 256
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dmx.commands.sources import CHECKPOINT_HELP, add_best_argument, add_layout_arguments, warn_as

if TYPE_CHECKING:
    from dmx.config import Config
    from dmx.data.dataset import Dataset
    from dmx.extraction.plan import Output, Settings
    from dmx.model import EmbeddingModel

SUMMARY = "embed any number of images into Parquet, on all machines of a cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=CHECKPOINT_HELP,
    )
    parser.add_argument("dataset", metavar="DATASET", help="data set: a local path or a URI such as s3://...")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder to write: a local path or a URI")
    parser.add_argument("--split", default="train", help="train, query or gallery (default: %(default)s)")
    add_best_argument(parser)
    add_layout_arguments(parser, "a DATASET that was not ingested")
    parser.add_argument(
        "--flip", action="store_true", help="embed each image and its mirror image, and take their mean"
    )
    parser.add_argument("--height", type=int, metavar="PX", help="image height (default: as trained)")
    parser.add_argument("--width", type=int, metavar="PX", help="image width (default: as trained)")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images a forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="arithmetic of the forward pass; auto is bf16 where the hardware computes in it, and what a job "
        "that goes on was begun with (default: %(default)s)",
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the model first, which takes a minute (torch.compile); auto does where there are "
        "images enough to win it back (default: %(default)s)",
    )
    parser.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="copies of the model (default: one a GPU, or a group of cores)",
    )
    parser.add_argument(
        "--cpus-per-actor",
        type=int,
        metavar="N",
        help="cores of a copy (default: 1 beside a GPU, else all of a machine, at most 8)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="end with an error after so many seconds without any progress (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Embed what is missing, then say what there is."""
    from dmx.data.dataset import open_dataset
    from dmx.extraction.plan import PARTS_STAY, Output, parts_of
    from dmx.stopping import say_at_the_end
    from dmx.train.checkpoint import BEST, LATEST, load_model
    from dmx.train.runlog import versions
    from dmx.writing import writing

    _check(args)
    dataset = open_dataset(
        args.dataset,
        args.layout,
        camera=args.camera,
        camera_pattern=args.camera_pattern,
        warn=warn_as("embed"),
    )
    parts = parts_of(dataset.split(args.split))
    output = Output(args.out)
    model, config = load_model(args.checkpoint, BEST if args.best else LATEST)
    settings = _settings(args, dataset, len(parts), model, config, output)
    with writing(args.out, "features"):
        done = output.begin(settings, versions(), args.batch_size)
    say_at_the_end()
    missing = output.missing(parts)
    if not missing and done:
        print(f"{args.out} is finished: {_shown(output.counts())}")
        return 0
    pace = ""
    if missing:
        if len(missing) < len(parts):
            print(f"{len(parts) - len(missing)} of {len(parts)} parts are done; going on with the others")
        pace = f" ({_embed(args, dataset, model, settings, output):.1f} images/s without the start)"
    with writing(args.out, "the end of the job", stays=PARTS_STAY):
        counts = output.finish(parts)
    print(f"{args.out}: {_shown(counts)}{pace}")
    return 0


def _check(args: argparse.Namespace) -> None:
    from dmx.errors import DmxError

    for option in ("batch_size", "height", "width", "actors", "cpus_per_actor", "timeout"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise DmxError(f"--{option.replace('_', '-')}: wanted at least 1, found {value}")


def _settings(
    args: argparse.Namespace,
    dataset: Dataset,
    parts: int,
    model: EmbeddingModel,
    config: Config,
    output: Output,
) -> Settings:
    from dmx.extraction.plan import Settings, fingerprint, weights_sha256
    from dmx.train.engines import computes_in_bf16

    precision = args.precision
    if precision == "auto":
        precision = output.recorded_precision() or ("bf16" if computes_in_bf16(_device()) else "fp32")
    return Settings(
        model=args.checkpoint,
        weights_sha256=weights_sha256(model),
        dataset=args.dataset,
        data_sha256=fingerprint(dataset, args.split),
        split=args.split,
        rows=len(dataset.split(args.split)),
        parts=parts,
        width=model.width,
        image_height=args.height or config.data.height,
        image_width=args.width or config.data.width,
        precision=precision,
        flip=args.flip,
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _embed(
    args: argparse.Namespace, dataset: Dataset, model: EmbeddingModel, settings: Settings, output: Output
) -> float:
    """Images a second."""
    from dmx.extraction.pipeline import Job, compiling_pays, layout, run
    from dmx.extraction.plan import parts_of
    from dmx.extraction.stages import Player
    from dmx.ray_cluster import ray_cluster

    split = dataset.split(args.split)
    parts = output.missing(parts_of(split))
    with ray_cluster():
        used = layout(args.actors, args.cpus_per_actor)
        player = Player(
            device="cuda" if used.has_gpus else "cpu",
            threads=used.cpus_per_actor,
            precision=settings.precision,
            compile=args.compile == "on" or (args.compile == "auto" and compiling_pays(parts, used)),
            flip=settings.flip,
            height=settings.image_height,
            width=settings.image_width,
            batch_size=args.batch_size,
        )
        return run(Job(model, split, parts, output, settings.width, player, args.timeout), used)


def _shown(counts: dict[str, int]) -> str:
    skipped = (
        f", {counts['skipped']} that cannot be decoded are in skipped.jsonl" if counts["skipped"] else ""
    )
    return f"{counts['rows']} images embedded{skipped}"
