"""A ranking to look at: one HTML file with all that it shows, which asks no network for anything."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable, Sequence
from typing import TextIO

from dmx.search.pictures import Pictures
from dmx.search.ranking import MARKS, Answer, Hit, printable

# Nothing but the page's own pictures and styles: whatever a file name holds, no browser runs or fetches it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SIGNS = {True: " ✓", False: " ✗", None: ""}


def write_page(
    file: TextIO,
    title: str,
    facts: Sequence[str],
    answers: Iterable[Answer],
    query_pictures: Pictures | None,
    gallery_pictures: Pictures | None,
) -> None:
    """Write a page, an answer at a time.

    Args:
        file: to write to, as UTF-8.
        title: of the page.
        facts: sentences below it.
        answers: what it shows.
        query_pictures, gallery_pictures: None leaves pictures out.
    """
    css = (importlib.resources.files("dmx.search") / "page.css").read_text(encoding="utf-8")
    file.write(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_text(title)}</title>
<style>
{css}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{"".join(f"<p>{_text(fact)}</p>{chr(10)}" for fact in facts)}\
<div class="legend"><span class="right">✓ right: the query's identity</span>\
<span class="wrong">✗ wrong: another identity</span><span>plain: not known</span></div>
"""
    )
    for answer in answers:
        file.write(_section(answer, query_pictures, gallery_pictures))
    file.write("</body>\n</html>\n")


def _section(answer: Answer, query_pictures: Pictures | None, gallery_pictures: Pictures | None) -> str:
    hits = "".join(_hit(hit, gallery_pictures) for hit in answer.hits)
    caption = f"<b>query</b>{_caption(answer.key, answer.identity, answer.camera)}"
    return (
        f'<section><figure class="query">{_picture(answer.key, answer.row, query_pictures)}'
        f"<figcaption>{caption}</figcaption></figure>\n<ol>\n{hits}</ol></section>\n"
    )


def _hit(hit: Hit, pictures: Pictures | None) -> str:
    caption = (
        f"<b>{hit.rank}{SIGNS[hit.right]}</b> {hit.similarity:.3f}"
        f"{_caption(hit.key, hit.identity, hit.camera)}"
    )
    kind = f' class="{MARKS[hit.right]}"' if MARKS[hit.right] else ""
    return (
        f"<li{kind}><figure>{_picture(hit.key, hit.row, pictures)}"
        f"<figcaption>{caption}</figcaption></figure></li>\n"
    )


def _picture(key: str, row: int, pictures: Pictures | None) -> str:
    if pictures is None:
        return ""
    uri = pictures.uri(row)
    inner = '<span class="none">no picture</span>' if uri is None else f'<img src="{uri}" alt="{_text(key)}">'
    return f'<div class="frame">{inner}</div>'


def _caption(key: str, identity: int | None, camera: int | None) -> str:
    known = [
        f"{name} {number}"
        for name, number in (("identity", identity), ("camera", camera))
        if number is not None
    ]
    lines = [f"<span>{line}</span>" for line in known]
    # Of a path the last part, broken after underscores rather than anywhere.
    name = _text(key.rpartition("/")[2]).replace("_", "_<wbr>")
    return "".join(lines) + f'<span class="key" title="{_text(key)}">{name}</span>'


def _text(text: str) -> str:
    """Text as HTML shows it, whatever is in it."""
    return html.escape(printable(text))
