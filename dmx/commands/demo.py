"""From nothing to a model tested on cameras it never saw, in a quarter of an hour on two cores.

Renders a labelled set in one style, an unlabelled set in a second and a test set in a third; trains one
model on the labelled set alone and one with DomainMix on both, with the same number of steps; and reports
both on the third style. It only runs commands that you can type yourself, and prints each of them. Run
again after an interruption, it goes on where it stood.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

SUMMARY = "render people, train on them and test on unseen cameras: the whole of DMX at once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `dmx demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all of it (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="which people, cameras and weights (default: 0)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="share of the people and of the training steps, to try the commands out (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    from dmx.demo import DOMAINMIX, RUNS, Demo, run_demo

    print(run_demo(Demo(out=args.out, seed=args.seed, scale=args.scale)))
    print(f"to look at it: dmx report {shlex.quote(str(args.out / RUNS[DOMAINMIX]))}")
    return 0
