"""Render a labelled data set of people, or a contact sheet.

Everything is drawn from the seed, the style and the numbers of person, camera and image, so the same command
gives the same files anywhere; run again after an interruption, it renders what is missing. A training set is
one flat folder of files named as RandPerson's, a test set has a query and a bounding_box_test folder of them.

  dmx synth people --style street --identities 100
  dmx synth unseen --style mall --identities 50 --split test
  dmx synth --sheet styles.png --style all
"""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "render labelled people, or a contact sheet of them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dmx synth`."""
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder of the data set")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw a contact sheet (.png) instead")
    parser.add_argument(
        "--style",
        default=None,
        help="street, mall or campus; a sheet also takes all (default: street; for a sheet: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="which people, cameras and scenes (default: 0)")
    parser.add_argument(
        "--identities", type=int, default=None, metavar="N", help="people (default: 100; on a sheet: 6)"
    )
    parser.add_argument(
        "--first-identity", type=int, default=0, metavar="N", help="number of the first person (default: 0)"
    )
    parser.add_argument(
        "--cameras", type=int, default=None, metavar="N", help="cameras (default: 6; on a sheet: 4)"
    )
    parser.add_argument(
        "--images", type=int, default=None, metavar="N", help="images a person (default: 12; on a sheet: 8)"
    )
    parser.add_argument(
        "--height", type=int, default=256, metavar="PX", help="pixels; half as wide (default: 256)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        default="train",
        help="train: one flat folder; test: the folders query and bounding_box_test (default: train)",
    )
    parser.add_argument(
        "--query-per-identity",
        type=int,
        default=None,
        metavar="Q",
        help="queries of a person, each by another camera (default: one a camera, at most half the images)",
    )
    parser.add_argument("--jobs", type=int, default=None, metavar="N", help="processes (default: one a core)")


def run(args: argparse.Namespace) -> int:
    """Render what the arguments say."""
    from dmx.errors import DmxError

    if args.sheet is not None and args.out is not None:
        raise DmxError("give either a folder for a data set or --sheet FILE, not both")
    if args.sheet is not None:
        return _draw_sheet(args)
    if args.out is None:
        raise DmxError("nothing to do: give a folder for a data set, or --sheet FILE for a contact sheet")
    return _write_dataset(args)


def _write_dataset(args: argparse.Namespace) -> int:
    from dmx.synth.dataset import Request, write_dataset

    request = Request(
        style=args.style or "street",
        identities=100 if args.identities is None else args.identities,
        seed=args.seed,
        first_identity=args.first_identity,
        cameras=6 if args.cameras is None else args.cameras,
        images=12 if args.images is None else args.images,
        height=args.height,
        split=args.split,
        query_per_identity=args.query_per_identity,
    )
    summary = write_dataset(args.out, request, jobs=args.jobs)
    print(
        f"{summary.folder}: {summary.images} images of {request.identities} people "
        f"by {request.cameras} cameras, {summary.rendered} rendered now"
    )
    return 0


def _draw_sheet(args: argparse.Namespace) -> int:
    from dmx.synth.sheet import contact_sheet
    from dmx.synth.styles import STYLES, style_named

    name = args.style or "all"
    styles = list(STYLES.values()) if name == "all" else [style_named(name)]
    sheet = contact_sheet(
        styles,
        seed=args.seed,
        people=6 if args.identities is None else args.identities,
        views=8 if args.images is None else args.images,
        cameras=4 if args.cameras is None else args.cameras,
        height=args.height,
        first_identity=args.first_identity,
    )
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.sheet)
    print(f"{args.sheet}: {sheet.width} x {sheet.height} pixels")
    return 0
