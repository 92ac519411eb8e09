"""What pages take from the code while they are built: settings, recipes, help texts, docstrings.

A page holds `<!-- settings -->`, `<!-- commands -->` or `<!-- recipes -->` where the text is to stand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from typing import Any

import sphinx.application

from dmx.cli import build_parser
from dmx.config import Config, field_types, leaves, recipe, recipe_names
from dmx.settings import limits, wanted

Parsers = argparse._SubParsersAction
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
# Emphasis, substitutions, and references such as lambda_; in front of a colon napoleon sees to those.
SIGNS = re.compile(r"[*|]|(?<=\w)_(?=[^\w:]|$)")
os.environ["COLUMNS"] = "96"  # of help texts


def settings() -> str:
    """A table for every section: name, default, what it takes, meaning."""
    parts, section = [_head()], ""
    for name, (kind, item) in leaves().items():
        parent, _, field = name.rpartition(".")
        if parent != section:
            section = parent
            parts += ["", f"## {section}", "", str(field_types(Config)[section].__doc__), "", _head()]
        takes = ", ".join(filter(None, (wanted(kind), limits(item))))
        cells = (f"`{field}`", f"`{_default(item)}`", takes, item.metadata["help"])
        parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(parts)


def _head() -> str:
    return "| setting | default | takes | meaning |\n|---|---|---|---|"


def _default(item: dataclasses.Field[Any]) -> str:
    value = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return value if isinstance(value, str) else json.dumps(value)


def recipes() -> str:
    """Each recipe that comes with DMX, as far as it differs from the defaults."""
    import yaml

    parts = []
    for name in recipe_names():
        text = yaml.safe_dump(dict(recipe(name)[1]), sort_keys=False, default_flow_style=None)
        parts += [f"## {name}", "", "```yaml", text.rstrip(), "```", ""]
    return "\n".join(parts)


def commands() -> str:
    """The help of every command."""
    parser = build_parser()
    subparsers = next(action for action in parser._actions if isinstance(action, Parsers)).choices
    named = {"dmx": parser, **{f"dmx {name}": sub for name, sub in subparsers.items()}}
    return "\n".join(
        f"## {name}\n\n```text\n{sub.format_help().rstrip()}\n```\n" for name, sub in named.items()
    )


SOURCES = {"settings": settings, "recipes": recipes, "commands": commands}


def fill(_: object, __: str, source: list[str]) -> None:
    """Put the texts where a page wants them."""
    for name, text in SOURCES.items():
        mark = f"<!-- {name} -->"
        if mark in source[0]:
            source[0] = source[0].replace(mark, text())


def as_markup(_: object, __: str, ___: str, ____: object, _____: object, lines: list[str]) -> None:
    """Docstrings are plain text: signs of reStructuredText outside of `code` are themselves.

    An indented paragraph in front of the first section is code, as in Markdown.
    """
    result: list[str] = []
    is_code = in_section = False
    for line in lines:
        in_section |= SECTION.match(line) is not None
        indented = line.startswith("    ") and not in_section
        if indented and not is_code:
            result += ["::", ""]
        is_code = indented or (is_code and not line)
        result.append(line if is_code else _escaped(line))
    lines[:] = result


def _escaped(line: str) -> str:
    parts = line.split("`")
    parts[::2] = [SIGNS.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts)


def setup(app: sphinx.application.Sphinx) -> dict[str, bool]:
    """Connect both."""
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", as_markup, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
