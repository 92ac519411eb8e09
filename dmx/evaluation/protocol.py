"""The retrieval test: every query against the gallery, in bounded memory."""

from __future__ import annotations

from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from dmx.errors import DmxError
from dmx.evaluation.distances import distance_blocks
from dmx.evaluation.embedded import UNKNOWN, Embedded
from dmx.evaluation.metrics import AveragePrecision, Metrics, metrics_from_ranks
from dmx.evaluation.ranking import ranks_of_hits
from dmx.evaluation.rerank import reranked_blocks
from dmx.kernels.progress import counting

BLOCK_BYTES = 256 * 2**20


class Side(Protocol):
    """A query or gallery: embeddings, or the images they will be made of."""

    @property
    def identities(self) -> NDArray[np.int64]: ...

    @property
    def cameras(self) -> NDArray[np.int32]: ...


def evaluate(
    query: Embedded,
    gallery: Embedded,
    *,
    ap: AveragePrecision = "default",
    rerank: bool = False,
    k1: int = 20,
    k2: int = 6,
    lambda_: float = 0.3,
    block_bytes: int = BLOCK_BYTES,
    device: str = "cpu",
) -> Metrics:
    """Rank the gallery for each query by Euclidean distance and measure how well it comes out.

    For each query, gallery images of its identity *and* camera are left out, and so is identity -1. Identity
    0, the distractors of Market-like sets, stays. Distances are float32; equal ones keep gallery order.
    Queries without a right answer in the gallery count in nothing but `num_queries`.

    Args:
        query, gallery: embeddings; unit rows make the order that of cosine similarity.
        ap: `default` is the mean precision at the hits, as published numbers use; `trapezoid` is the data
            sets' own code, which interpolates.
        rerank: k-reciprocal re-ranking with k1, k2 and lambda_ (see `reranked_blocks`).
        block_bytes: bytes of distances held at a time.
        device: where re-ranking seeks neighbours, "cpu" or as torch names it; the result is the same.

    Returns:
        Metrics, as fractions.

    Raises:
        DmxError: nothing to compare, differing widths, no valid query, or parameters out of range.
    """
    if ap not in get_args(AveragePrecision):
        raise DmxError(f"ap: wanted one of {', '.join(get_args(AveragePrecision))}, found {ap!r}")
    if query.features.shape[1] != gallery.features.shape[1]:
        raise DmxError(
            f"query and gallery: wanted features of one width, found {query.features.shape[1]} and "
            f"{gallery.features.shape[1]}; embed both with the same model"
        )
    gallery = gallery.known()
    require_answers(query, gallery)
    if rerank:
        blocks = reranked_blocks(query.features, gallery.features, k1, k2, lambda_, block_bytes, device)
    else:
        blocks = distance_blocks(query.features, gallery.features, block_bytes)
    ranks: list[NDArray[np.int64]] = []
    counts: list[NDArray[np.int64]] = []
    with counting(len(query), "evaluation", "queries") as count:
        for start, distances in blocks:
            rows = slice(start, start + len(distances))
            found = ranks_of_hits(
                distances, query.identities[rows], query.cameras[rows], gallery.identities, gallery.cameras
            )
            ranks.append(found[0])
            counts.append(found[1])
            count(len(distances))
    return metrics_from_ranks(np.concatenate(ranks), np.concatenate(counts), ap)


def require_answers(query: Side, gallery: Side) -> None:
    """Check that the gallery has some query's identity under another, or an unknown, camera.

    Raises:
        DmxError: it has not, so that there is nothing to measure; tells why.
    """
    for name, side in (("query", query), ("gallery", gallery)):
        if not (side.identities != UNKNOWN).any():
            raise DmxError(f"{name}: wanted images of known identity, found none")
    cameras: dict[int, set[int]] = {}
    for identity, camera in zip(gallery.identities.tolist(), gallery.cameras.tolist(), strict=True):
        cameras.setdefault(identity, set()).add(camera)
    absent = same = 0
    for identity, camera in zip(query.identities.tolist(), query.cameras.tolist(), strict=True):
        if identity == UNKNOWN or identity not in cameras:
            absent += 1
        elif camera != UNKNOWN and cameras[identity] == {camera}:
            same += 1
        else:
            return
    raise DmxError(
        f"no valid query among {len(query.identities)}: {absent} are of identities that the gallery lacks, "
        f"and {same} of identities that it has under the query's own camera only; check identities and "
        "cameras of both"
    )
