"""Arguments of every command that reads data sets as their authors laid them out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def add_layout_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """Declare --layout, --camera and --camera-pattern.

    Args:
        parser: of the command.
        source: what the help calls the data set, such as `SOURCE`.
    """
    from dmx.data.layouts import LAYOUTS  # light: the readers import nothing that decodes or computes

    parser.add_argument(
        "--layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        metavar="NAME",
        help=f"how {source} is laid out: {', '.join(LAYOUTS)} (default: auto, which recognises it)",
    )
    parser.add_argument(
        "--camera",
        choices=("scene", "camera"),
        default="scene",
        help="camera number of RandPerson, ClonedPerson and rendered sets: of scene and camera together, or "
        "of the camera alone as in published code (default: %(default)s)",
    )
    parser.add_argument(
        "--camera-pattern",
        metavar="REGEX",
        help="for the layouts folder and crops: regular expression whose one group is the camera number in a "
        "file name, for example '_c(\\d+)' (default: cameras unknown)",
    )


def warn_as(command: str) -> Callable[[str], None]:
    """Print warnings about a data set as the command's own, on stderr."""
    return lambda message: print(f"dmx {command}: warning: {message}", file=sys.stderr)
