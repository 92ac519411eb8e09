"""Every setting of a run as an option of the command line, in the order in which they were given.

`--schedule.epochs 3`, `--set schedule.epochs=3` and shorter names (`--source`) are ways to say the same: of
two that set one setting the later wins, and all of them win over a recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap
from typing import Any

from dmx.config import Config, field_types, leaves
from dmx.settings import assignment, from_words, limits, unflatten, wanted

GIVEN = "given"
WIDEST = 110
SHORT = {"--source": "data.source", "--target": "data.target", "--init": "model.weights"}


class Give(argparse.Action):
    """Keeps option and words in their order among all options that set something."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        words = values if isinstance(values, list) else [] if values is None else [values]
        setattr(namespace, GIVEN, [*(getattr(namespace, GIVEN, None) or []), (self.option_strings[0], words)])


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """Declare an option for every setting, `--set`, and `--settings`, which tells what they are.

    They stay out of --help, which would be three pages long.
    """
    parser.add_argument(
        "--set", dest=GIVEN, action=Give, metavar="NAME=VALUE", help="the same as --NAME VALUE, value in YAML"
    )
    parser.add_argument(
        "--settings",
        action=_ShowSettings,
        help="tell all settings, each of which is an option (--schedule.epochs 3), with units, defaults and "
        "limits, and exit",
    )
    for name, (kind, _) in leaves().items():
        several = wanted(kind).startswith("a list")
        may_stand_alone = kind is bool
        nargs = "+" if several else "?" if may_stand_alone else None
        parser.add_argument(f"--{name}", dest=GIVEN, action=Give, nargs=nargs, help=argparse.SUPPRESS)


def given_settings(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A layer for `dmx.config.from_tree`: what the command line sets.

    Raises:
        DmxError: a value is no YAML, or a setting is given a value and parts.
    """
    known, tests, values = leaves(), [], []
    for option, words in getattr(args, GIVEN, None) or []:
        if option == "--set":
            values.append(assignment(*words))
        elif option == "--test":
            tests += words
            values.append(("data.tests", list(tests)))
        else:
            name = SHORT.get(option, option.removeprefix("--"))
            values.append((name, from_words(words, known[name][0], option)))
    return "command line", unflatten(values)


class _ShowSettings(argparse.Action):
    """Prints the settings and ends, as --help does, whatever else is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(settings_text(min(shutil.get_terminal_size().columns, WIDEST)))
        parser.exit()


def settings_text(width: int) -> str:
    """Every setting by section: the option with its default, what it means and takes, in lines of `width`."""
    lines, section = [
        *_filled(
            "Every setting is an option, shown with its default; a recipe holds the same names as YAML "
            "(schedule: {epochs: 60}). Of two options that set the same the later wins, and both win over "
            "the recipe.", "", width,
        ),
        "",
        "The run as a whole",
    ], ""  # fmt: skip
    for name, (kind, item) in leaves().items():
        parent = name.rpartition(".")[0]
        if parent != section:
            section = parent
            lines += ["", *_filled(f"{section}: {field_types(Config)[section].__doc__}", "", width)]
        takes = ", ".join(filter(None, (wanted(kind), limits(item))))
        lines.append(f"  --{name} {_as_words(item)}".rstrip())
        lines += _filled(f"{item.metadata['help']} ({takes})", " " * 6, width)
    return "\n".join(lines)


def _filled(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _as_words(item: dataclasses.Field[Any]) -> str:
    """A setting's default as one would write it on the command line."""
    value = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    if isinstance(value, tuple) and value:
        return " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)
