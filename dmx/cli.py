"""The `dmx` command: finds the sub-command's module and runs it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from dmx import __version__, stopping
from dmx.errors import DmxError
from dmx.kernels.progress import listening
from dmx.progress import progress_bar

COMMANDS = (
    "demo",
    "synth",
    "ingest",
    "cluster",
    "train",
    "embed",
    "evaluate",
    "export",
    "search",
    "report",
    "doctor",
)


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"dmx.commands.{name}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. Sub-command modules import nothing heavy until they run."""
    parser = argparse.ArgumentParser(
        prog="dmx",
        description="Person re-identification from labelled synthetic and unlabelled real images.",
    )
    parser.add_argument("--version", action="version", version=f"dmx {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = _command(name)
        sub = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # what is short for one option today may be short for two tomorrow
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, options=tuple(sub._option_string_actions))
    return parser


def _unknown(words: Sequence[str], options: Sequence[str]) -> DmxError:
    """What to say of arguments that a command does not take."""
    option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if option is None:
        return DmxError(f"wanted no further argument, found {' '.join(words)}")
    near = difflib.get_close_matches(option, options, 1)
    return DmxError(f"there is no option {option}" + (f"; did you mean {near[0]}?" if near else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit status.

    2: the user's input cannot be used; 143 and 130: stopped by SIGTERM and SIGINT.
    """
    name = "dmx"

    def named() -> str:
        return name

    with stopping.listening(named, ends=argv is None):
        try:
            args, unknown = build_parser().parse_known_args(argv)
            name = f"dmx {args.command}"
            if unknown:
                raise _unknown(unknown, args.options)
            with listening(progress_bar):
                return int(args.run(args))
        except BaseException as error:
            if stopping.wished() is not None:
                # Whatever ends a command that was told to stop: it may be the way out that stumbled.
                print(f"{name}: {stopping.last_words()}", file=sys.stderr)
                if argv is None:
                    stopping.end(stopping.status())
                return stopping.status()
            if isinstance(error, BrokenPipeError):
                # Whoever read the output has seen enough (`| head`); Python would complain at its exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            if isinstance(error, DmxError | OSError):
                print(f"{name}: error: {error}", file=sys.stderr)
                return _failed(2, ends=argv is None)
            if isinstance(error, Exception) and argv is None:
                traceback.print_exc()
                return _failed(1, ends=True)
            raise


def _failed(status: int, *, ends: bool) -> int:
    """The status of a command that failed, or its end: libraries that it left at work may wait for ever."""
    if ends:
        stopping.end(status)
    return status
