"""Who is found for whom: hits of every query, as a table or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmx.evaluation.embedded import UNKNOWN
from dmx.kernels.progress import counting
from dmx.names import printable
from dmx.search.index import Index
from dmx.search.queries import Queries

# Queries that are compared at a time: faiss has a block of products for all of them.
QUERIES = 1024
MARKS = {True: "right", False: "wrong", None: ""}


@dataclass(frozen=True)
class Hit:
    """A gallery image in a ranking.

    Attributes:
        rank: from 1.
        key: of the image.
        similarity: cosine.
        identity, camera: None where unknown.
        right: whether it shows the query's identity; None where that is unknown.
        row: of the image in the gallery.
    """

    rank: int
    key: str
    similarity: float
    identity: int | None
    camera: int | None
    right: bool | None
    row: int


@dataclass(frozen=True)
class Answer:
    """A query and its hits, best first; `row` is the query's in its split."""

    key: str
    identity: int | None
    camera: int | None
    row: int
    hits: tuple[Hit, ...]


def rank(index: Index, queries: Queries, embeddings: NDArray[np.float32], top: int) -> Iterator[Answer]:
    """The `top` gallery images most similar to each query, the query itself left out.

    Args:
        index: the gallery.
        queries: N images; embeddings: (N, D), theirs.
        top: hits of each, at least 1; as many as there are, where the gallery has fewer.
    """
    spare = int(queries.of_gallery.any())
    with counting(len(embeddings), "search", "queries") as count:
        for begin in range(0, len(embeddings), QUERIES):
            rows, similarities = index.search(embeddings[begin : begin + QUERIES], top + spare)
            for place, (found, values) in enumerate(zip(rows, similarities, strict=True)):
                yield _answer(index, queries, begin + place, found, values, top)
            count(len(rows))


def _answer(
    index: Index,
    queries: Queries,
    row: int,
    found: NDArray[np.int64],
    similarities: NDArray[np.float32],
    top: int,
) -> Answer:
    key = queries.split.keys[row]
    identity, camera = _known(queries.split.identities[row]), _known(queries.split.cameras[row])
    hits: list[Hit] = []
    for image, similarity in zip(index.rows.take(found).to_pylist(), similarities.tolist(), strict=True):
        if len(hits) == top or (queries.of_gallery[row] and image["key"] == key):
            continue
        other = _known(image["identity"])
        is_known = queries.same_people[row] and identity is not None and other is not None
        hits.append(
            Hit(
                len(hits) + 1,
                image["key"],
                round(similarity, 6),
                other,
                _known(image["camera"]),
                identity == other if is_known else None,
                image["row"],
            )
        )
    return Answer(key, identity, camera, row, tuple(hits))


def _known(number: int) -> int | None:
    return None if number == UNKNOWN else int(number)


def to_tree(answer: Answer) -> dict[str, Any]:
    """An answer as JSON has it: `null` for what is unknown."""
    tree = asdict(answer)
    del tree["row"]
    for hit in tree["hits"]:
        del hit["row"]
    return tree


def table(answer: Answer) -> str:
    """An answer for a terminal."""
    lines = [f"{printable(answer.key)}{_whose(answer.identity, answer.camera)}"]
    lines.append(f"{'rank':>6}{'similarity':>12}{'identity':>10}{'camera':>8}  {'':5}  image")
    for hit in answer.hits:
        identity, camera = ("-" if number is None else str(number) for number in (hit.identity, hit.camera))
        lines.append(
            f"{hit.rank:6d}{hit.similarity:12.4f}{identity:>10}{camera:>8}  {MARKS[hit.right]:5}  "
            f"{printable(hit.key)}"
        )
    return "\n".join(lines)


def _whose(identity: int | None, camera: int | None) -> str:
    known = [
        f"{name} {number}"
        for name, number in (("identity", identity), ("camera", camera))
        if number is not None
    ]
    return f" ({', '.join(known)})" if known else ""


def told(answers: Sequence[Answer]) -> str:
    """How many queries there are, and how often the first hit is right, where that can be told."""
    queries = "1 query" if len(answers) == 1 else f"{len(answers)} queries"
    judged = [a.hits[0].right for a in answers if a.hits and a.hits[0].right is not None]
    if not judged:
        return queries
    return f"{queries}; the first hit is right for {sum(judged)} of {len(judged)} whose identity is known"
