"""The ranking, written: a table on the terminal, JSON, or a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmx.errors import DmxError
from dmx.page import PAGES
from dmx.search.index import Index
from dmx.search.page import write_page
from dmx.search.pictures import Pictures
from dmx.search.queries import Queries
from dmx.search.ranking import Answer, table, to_tree, told
from dmx.writing import replaced

FORMAT = 1
SUFFIXES = (".json", *PAGES)


def write_json(out: Path, answers: Sequence[Answer], index: Index) -> None:
    """Write a ranking as JSON: `null` is unknown."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "model": asdict(index.model),
        "gallery": index.gallery,
        "images": len(index),
        "lists": None if index.lists is None else asdict(index.lists),
        "left_out": [item._asdict() for item in index.left_out],
        "queries": [to_tree(answer) for answer in answers],
    }
    with replaced(out) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def write_html(
    out: Path,
    answers: Sequence[Answer],
    index: Index,
    queries: Queries,
    with_pictures: bool,
    warn: Callable[[str], None],
) -> None:
    """Write a ranking as a page.

    Args:
        out: the file.
        answers: what it shows.
        index: what was searched; queries: for what.
        with_pictures: whether it has any.
        warn: called with a sentence about pictures that cannot be had.
    """
    approximate = f"; {index.lists.told()[0]}" if index.lists else ", exact search"
    facts = [
        told(answers),
        f"gallery {index.gallery}: {len(index):,} images{approximate}",
        f"model {index.model.model}",
    ]
    pictures: tuple[Pictures | None, Pictures | None] = (None, None)
    if with_pictures:
        pictures = Pictures(queries.split, warn), _gallery_pictures(index, warn)
    with replaced(out) as file:
        write_page(file, f"Ranking of {Path(index.gallery).name}", facts, answers, *pictures)


def print_tables(answers: Sequence[Answer]) -> None:
    """Print a ranking."""
    for answer in answers:
        print(table(answer), end="\n\n")


def _gallery_pictures(index: Index, warn: Callable[[str], None]) -> Pictures:
    if index.origin is None:
        warn(f"no pictures of the gallery: nothing tells which images the features in {index.gallery} are of")
        return Pictures(None, warn)
    try:
        return Pictures(index.origin.open(), warn)
    except (DmxError, OSError) as error:
        warn(f"no pictures of the gallery: {error}")
        return Pictures(None, warn)
