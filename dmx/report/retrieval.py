"""A test set, measured anew with the run's model: distances, and the queries that are worth a look."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmx.data.shards import Split
from dmx.evaluation.distances import distance_blocks, squared_distances, squared_norms
from dmx.evaluation.embedded import UNKNOWN, Embedded
from dmx.evaluation.histogram import DistanceHistogram
from dmx.evaluation.metrics import Metrics, average_precisions, metrics_from_ranks
from dmx.evaluation.protocol import BLOCK_BYTES, require_answers
from dmx.evaluation.ranking import ranks_of_hits
from dmx.search.ranking import Answer, Hit


@dataclass(frozen=True)
class Judged:
    """A query's ranking.

    Attributes:
        answer: its hits, among them the first right one, wherever that stands.
        precision: its average precision.
        first_right: rank of the first right hit.
    """

    answer: Answer
    precision: float
    first_right: int


@dataclass(frozen=True)
class Retrieval:
    """What a model does on a test set.

    Attributes:
        metrics: as `dmx evaluate` measures them.
        histogram: of distances between cameras.
        hardest: queries with the least average precision, the worst first.
        random: a choice of the others.
    """

    metrics: Metrics
    histogram: DistanceHistogram
    hardest: list[Judged]
    random: list[Judged]


def measure(
    query: Split,
    gallery: Split,
    features: tuple[NDArray[np.float32], NDArray[np.float32]],
    *,
    queries: int,
    top: int,
    seed: int,
) -> Retrieval:
    """One pass over all distances, a block at a time, and one over those of the chosen queries.

    Args:
        query, gallery: the images.
        features: (Q, D) and (G, D), theirs, of unit length.
        queries: how many are chosen, half of them the hardest.
        top: hits of each.
        seed: of the random choice.

    Raises:
        DmxError: no query has a right answer.
    """
    q = Embedded(features[0], query.identities, query.cameras)
    g, rows = _known(gallery, features[1])
    require_answers(q, g)
    histogram = DistanceHistogram()
    ranks, counts = [], []
    for start, block in distance_blocks(q.features, g.features, BLOCK_BYTES):
        part = slice(start, start + len(block))
        labels = q.identities[part], q.cameras[part], g.identities, g.cameras
        histogram.add(block, *labels)
        found = ranks_of_hits(block, *labels)
        ranks.append(found[0])
        counts.append(found[1])
    all_ranks, all_counts = np.concatenate(ranks), np.concatenate(counts)
    valid = np.flatnonzero(all_counts)
    precisions = average_precisions(all_ranks, all_counts)
    firsts = all_ranks[(np.cumsum(all_counts) - all_counts)[valid]]
    norms = squared_norms(g.features)

    def judged(places: NDArray[np.int64]) -> list[Judged]:
        found = []
        for place in places.tolist():
            row = int(valid[place])
            distances = np.empty((1, len(g)), np.float32)
            squared_distances(q.features[row : row + 1], g.features, norms, distances)
            hits = _hits(q, row, g, distances[0], rows, gallery.keys, top)
            answer = Answer(query.keys[row], _number(q.identities[row]), _number(q.cameras[row]), row, hits)
            found.append(Judged(answer, float(precisions[place]), int(firsts[place])))
        return found

    hardest, random = _chosen(precisions, queries, seed)
    metrics = metrics_from_ranks(all_ranks, all_counts)
    return Retrieval(metrics, histogram, judged(hardest), judged(random))


def _known(gallery: Split, features: NDArray[np.float32]) -> tuple[Embedded, NDArray[np.int64]]:
    """The gallery without junk, and its rows."""
    rows = np.flatnonzero(gallery.identities != UNKNOWN)
    return Embedded(features[rows], gallery.identities[rows], gallery.cameras[rows]), rows


def _chosen(
    precisions: NDArray[np.float64], queries: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the hardest and of a random choice among the others, the latter in their order."""
    order = np.argsort(precisions, kind="stable")
    half = (queries + 1) // 2
    others = order[half:]
    count = min(queries - half, len(others))
    drawn = np.random.default_rng(seed).choice(others, count, replace=False) if count else others[:0]
    return order[:half], np.sort(drawn)


def _hits(
    q: Embedded, row: int, g: Embedded, distances: NDArray[np.float32], rows: NDArray[np.int64],
    keys: list[str], top: int,
) -> tuple[Hit, ...]:  # fmt: skip
    """The protocol's ranking for one query: images of its identity and camera are left out."""
    is_same = g.identities == q.identities[row]
    left_out = is_same & (g.cameras == q.cameras[row]) & (g.cameras != UNKNOWN)
    order = np.argsort(np.where(left_out, np.inf, distances), kind="stable")
    order = order[: len(order) - int(left_out.sum())]
    first_right = int(np.argmax(is_same[order]))
    places = [*range(min(top, len(order))), *([first_right] if first_right >= top else [])]
    return tuple(
        Hit(
            place + 1,
            keys[rows[found]],
            1 - float(distances[found]) / 2,
            _number(g.identities[found]),
            _number(g.cameras[found]),
            bool(is_same[found]),
            int(rows[found]),
        )
        for place, found in ((place, order[place]) for place in places)
    )


def _number(label: int | np.integer) -> int | None:
    return None if label == UNKNOWN else int(label)
