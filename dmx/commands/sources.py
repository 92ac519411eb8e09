"""Arguments of every command that reads data sets as their authors laid them out, or embeds them here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

CHECKPOINT_HELP = (
    "run folder of dmx train (its last checkpoint is taken), one checkpoint's folder, an export, or its "
    "name on the Hugging Face hub"
)


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


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how images go through a model: --flip, --batch-size, --height, --width and --device."""
    parser.add_argument(
        "--flip", action="store_true", help="embed each image and its mirror image, and take their mean"
    )
    parser.add_argument("--height", type=int, metavar="PX", help="image height (default: as trained)")
    parser.add_argument("--width", type=int, metavar="PX", help="image width (default: as trained)")
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where a model computes, and how many images at a time: --batch-size and --device."""
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images a forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)",
    )


def add_best_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --best, for commands that take a run folder's model."""
    parser.add_argument(
        "--best",
        action="store_true",
        help="take a run folder's best checkpoint on its first test set instead of its last; only runs with "
        "`compat: official` record one",
    )


def warn_as(command: str) -> Callable[[str], None]:
    """Print warnings about a data set as the command's own, on stderr."""
    return lambda message: print(f"dmx {command}: warning: {message}", file=sys.stderr)
