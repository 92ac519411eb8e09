"""A ranking to look at: one HTML file with all that it shows, which asks no network for anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

from dmx.page import CLOSING, framed, opening, text
from dmx.search.pictures import Pictures
from dmx.search.ranking import MARKS, Answer, Hit

SIGNS = {True: " ✓", False: " ✗", None: ""}
LEGEND = (
    '<div class="legend"><span class="right">✓ right: the query\'s identity</span>'
    '<span class="wrong">✗ wrong: another identity</span><span>plain: not known</span></div>\n'
)

# The frame with the picture of an image, from its key and its row; None leaves pictures out.
Frame = Callable[[str, int], str] | None


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
    file.write(opening(title))
    file.write("".join(f"<p>{text(fact)}</p>\n" for fact in facts))
    file.write(LEGEND)
    query_frame, hit_frame = _frame_of(query_pictures), _frame_of(gallery_pictures)
    for answer in answers:
        file.write(answer_section(answer, query_frame, hit_frame))
    file.write(CLOSING)


def _frame_of(pictures: Pictures | None) -> Frame:
    return None if pictures is None else lambda key, row: framed([pictures.uri(row)], key)


def answer_section(
    answer: Answer, query_frame: Frame, hit_frame: Frame, *, named: bool = True, notes: Sequence[str] = ()
) -> str:
    """A query and its hits.

    Args:
        answer: what is shown.
        query_frame, hit_frame: of their pictures.
        named: whether file names are shown.
        notes: lines about the query, plain text.
    """
    hits = "".join(_hit(hit, hit_frame, named) for hit in answer.hits)
    name = answer.key if named else None
    caption = f"<b>query</b>{_caption(name, answer.identity, answer.camera, notes)}"
    return (
        f'<section class="answer"><figure class="query">{_picture(answer.key, answer.row, query_frame)}'
        f"<figcaption>{caption}</figcaption></figure>\n<ol>\n{hits}</ol></section>\n"
    )


def _hit(hit: Hit, frame: Frame, named: bool) -> str:
    caption = (
        f"<b>{hit.rank}{SIGNS[hit.right]}</b> {hit.similarity:.3f}"
        f"{_caption(hit.key if named else None, hit.identity, hit.camera)}"
    )
    kind = f' class="{MARKS[hit.right]}"' if MARKS[hit.right] else ""
    return (
        f"<li{kind}><figure>{_picture(hit.key, hit.row, frame)}"
        f"<figcaption>{caption}</figcaption></figure></li>\n"
    )


def _picture(key: str, row: int, frame: Frame) -> str:
    return "" if frame is None else frame(key, row)


def _caption(key: str | None, identity: int | None, camera: int | None, notes: Sequence[str] = ()) -> str:
    known = [
        f"{name} {number}"
        for name, number in (("identity", identity), ("camera", camera))
        if number is not None
    ]
    lines = "".join(f"<span>{text(line)}</span>" for line in [*known, *notes])
    if key is None:
        return lines
    # Of a path the last part, broken after underscores rather than anywhere.
    name = text(key.rpartition("/")[2]).replace("_", "_<wbr>")
    return lines + f'<span class="key" title="{text(key)}">{name}</span>'
