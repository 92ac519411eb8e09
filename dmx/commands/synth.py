"""Render a labelled data set of people, or a contact sheet.

Everything is drawn from the seed, the style and the numbers of person, camera and image, so the same command
gives the same files anywhere; run again after an interruption, it renders what is missing. A training set is
one flat folder of files named as RandPerson's, a test set has a query and a bounding_box_test folder of them.
What it writes can be given to dmx train and dmx evaluate as it is.

  dmx synth people --style street --identities 100
  dmx synth unseen --style mall --identities 50 --split test
  dmx synth --sheet styles.png --style all
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dmx.commands.outputs import require_suffix, require_writable
from dmx.synth.styles import STYLES

if TYPE_CHECKING:
    from dmx.synth.dataset import Request

SUMMARY = "render labelled people, or a contact sheet of them"
SHEET_SUFFIXES = {".png": "PNG", ".jpg": "JPEG"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dmx synth`."""
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder of the data set")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="draw a contact sheet instead, .png or .jpg"
    )
    parser.add_argument(
        "--style",
        default=None,
        metavar="NAME",
        help=f"{', '.join(STYLES)}; a sheet also takes all (default: street; on a sheet: all)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="which people, cameras and scenes (default: 0)"
    )
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
        "--cameras-per-identity",
        type=int,
        default=None,
        metavar="N",
        help="how many of the cameras see a person, drawn for each (default: all)",
    )
    parser.add_argument(
        "--images", type=int, default=None, metavar="N", help="images a person (default: 12; on a sheet: 8)"
    )
    parser.add_argument(
        "--height",
        type=int,
        default=256,
        metavar="PX",
        help="of an image, which is half as wide (default: 256)",
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
    parser.add_argument(
        "--jobs", type=int, default=None, metavar="N", help="processes that render (default: one a core)"
    )


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
    from dmx.stopping import say_at_the_end
    from dmx.synth.dataset import write_dataset

    say_at_the_end()
    request = _request(args, args.style or "street", identities=100, cameras=6, images=12)
    summary = write_dataset(args.out, request, jobs=args.jobs)
    print(
        f"{summary.folder}: {summary.images} images of {request.identities} people "
        f"by {request.cameras} cameras, {summary.rendered} rendered now"
    )
    return 0


def _request(args: argparse.Namespace, style: str, *, identities: int, cameras: int, images: int) -> Request:
    """What the arguments ask for, within the limits; the numbers are for those that were not given."""
    from dmx.synth.dataset import Request

    return Request(
        style=style,
        identities=identities if args.identities is None else args.identities,
        seed=args.seed,
        first_identity=args.first_identity,
        cameras=cameras if args.cameras is None else args.cameras,
        cameras_per_identity=args.cameras_per_identity,
        images=images if args.images is None else args.images,
        height=args.height,
        split=args.split,
        query_per_identity=args.query_per_identity,
    )


def _draw_sheet(args: argparse.Namespace) -> int:
    from dmx.synth.sheet import contact_sheet
    from dmx.synth.styles import STYLES, style_named
    from dmx.writing import whole_file, writing

    # Everything is looked at before anything is rendered: a mistake should not cost that time.
    require_suffix(args.sheet, SHEET_SUFFIXES, "--sheet")
    names = list(STYLES) if args.style in (None, "all") else [args.style]
    requests = [_request(args, name, identities=6, cameras=4, images=8) for name in names]
    with writing(args.sheet, "the sheet"):
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
    require_writable(args.sheet, SHEET_SUFFIXES, "--sheet")
    sheet = contact_sheet(
        [style_named(name) for name in names],
        seed=requests[0].seed,
        people=requests[0].identities,
        views=requests[0].images,
        cameras=requests[0].cameras,
        height=requests[0].height,
        first_identity=requests[0].first_identity,
    )
    with whole_file(args.sheet, "the sheet") as temporary:
        sheet.save(temporary, SHEET_SUFFIXES[args.sheet.suffix.lower()])
    print(f"{args.sheet}: {sheet.width} x {sheet.height} pixels")
    return 0
