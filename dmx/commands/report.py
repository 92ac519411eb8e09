"""Look at a run: one HTML page with all that it shows, which asks no network for anything.

Curves of losses, tests, clusters and the discriminator; clusters by epoch as contact sheets with their
reliability; rankings of queries, the hardest and some at random, with where the model looks; histograms of
distances; timings, settings and versions. A run that is still training has a report of what it has done so
far, and what is missing is said with its reason. Rankings and distances embed the test sets once more.

--faces blur makes the upper part of every crop, where the head is, a few colours before anything is encoded,
and leaves file names out: no face is in the page, but clothes, build and place are, by which people who know
someone may recognise them. --no-images writes a page without pictures and file names. Numbers of identities,
cameras and images, and the paths of data sets, stay in either.

  dmx report runs/first
  dmx report runs/first --faces blur --out first.html
  dmx report runs/first --test data/market --queries 20 --device cuda
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dmx.commands.outputs import require_writable
from dmx.commands.sources import add_best_argument, add_device_arguments, warn_as

SUMMARY = "write one HTML page of a training run: curves, clusters, rankings, distances, timings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="run folder of dmx train, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument(
        "--faces", choices=("show", "blur"), default="show", help="blur heads (default: %(default)s)"
    )
    parser.add_argument("--no-images", action="store_true", help="leave pictures and file names out")
    parser.add_argument(
        "--queries",
        type=int,
        default=12,
        metavar="N",
        help="queries shown of each test set, half of them the hardest (default: %(default)s)",
    )
    parser.add_argument("--top", type=int, default=8, metavar="N", help="hits a query (default: %(default)s)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=4,
        metavar="N",
        help="epochs whose clusters are shown as contact sheets, the first and the last among them "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the queries chosen at random (default: %(default)s)"
    )
    parser.add_argument("--target", metavar="DATASET", help="where the target is now (default: as trained)")
    parser.add_argument(
        "--test",
        action="append",
        default=[],
        metavar="DATASET",
        help="test set in the place of the run's own; repeatable",
    )
    parser.add_argument(
        "--no-tests", action="store_true", help="leave out what embeds test sets: rankings and distances"
    )
    add_best_argument(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read the run, write the page, say where it is and how large."""
    from dmx.device import chosen_device
    from dmx.page import PAGES
    from dmx.report.record import RunRecord
    from dmx.report.report import ReportOptions, write_report
    from dmx.train.checkpoint import BEST, LATEST

    # Everything is looked at before anything is embedded: a mistake should not cost that time.
    _check(args)
    record = RunRecord.read(args.folder)
    out = args.out or args.folder / "report.html"
    require_writable(out, PAGES)
    options = ReportOptions(
        images=not args.no_images,
        faces=args.faces,
        queries=args.queries,
        top=args.top,
        epochs=args.epochs,
        seed=args.seed,
        measured=not args.no_tests,
        target=args.target,
        tests=tuple(args.test),
        pointer=BEST if args.best else LATEST,
        device=chosen_device(args.device, "--device"),
        batch_size=args.batch_size,
    )
    write_report(record, out, options, warn_as("report"))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _check(args: argparse.Namespace) -> None:
    from dmx.errors import DmxError

    for option, least in (("queries", 0), ("epochs", 0), ("top", 1), ("batch_size", 1), ("seed", 0)):
        if (value := getattr(args, option)) < least:
            raise DmxError(f"--{option.replace('_', '-')}: wanted at least {least}, found {value}")
