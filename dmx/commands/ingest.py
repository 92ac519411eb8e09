"""Turn a data set into shards that training reads in place.

Recognises the layouts of Market-1501, MSMT17, CUHK03-NP, RandPerson, UnrealPerson, PersonX, ClonedPerson,
DukeMTMC-reID, VeRi-776 and LUPerson, a folder for each identity, flat crops without labels (a folder or a zip
archive), and WebDataset tars. Counts are checked against the published ones. Images that cannot be decoded or
have no place in the layout are left out and listed, with their reason, in OUT/skipped.jsonl.

  dmx ingest Market-1501-v15.09.15 data/market
  dmx ingest crops.zip data/crops
  dmx ingest people data/people --layout folder --camera-pattern '_c(\\d+)'
"""

from __future__ import annotations

import argparse

from dmx.commands.sources import add_layout_arguments, warn_as

SUMMARY = "turn a data set into shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="SOURCE", help="folder or archive of the data set")
    parser.add_argument("out", metavar="OUT", help="folder to write: a local path or a URI such as s3://...")
    add_layout_arguments(parser, "SOURCE")
    parser.add_argument(
        "--rows-per-shard",
        type=int,
        default=16384,
        metavar="N",
        help="images in a shard (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is already in OUT")
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="threads that decode (default: one a core)"
    )


def run(args: argparse.Namespace) -> int:
    """Ingest, then print what was found."""
    from dmx.data.ingest import ingest, summary

    manifest = ingest(
        args.source,
        args.out,
        args.layout,
        rows_per_shard=args.rows_per_shard,
        overwrite=args.overwrite,
        camera=args.camera,
        camera_pattern=args.camera_pattern,
        workers=args.workers,
        warn=warn_as("ingest"),
    )
    print(summary(manifest))
    return 0
