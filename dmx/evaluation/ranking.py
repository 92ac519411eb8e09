"""Ranks of the right answers, without sorting the gallery.

The rank of a hit is the number of gallery entries at or before it when the gallery is sorted by
(distance, index), which is what a stable sort by distance gives. Counting needs only the hits in order: one
pass over the gallery with a binary search among the query's few hits.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray


def ranks_of_hits(
    distances: NDArray[np.float32],
    query_identities: NDArray[np.int64],
    query_cameras: NDArray[np.int32],
    gallery_identities: NDArray[np.int64],
    gallery_cameras: NDArray[np.int32],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank the gallery for each query and find where the right answers stand.

    Gallery entries of the query's identity and camera are left out, and so are those of identity -1. Camera
    -1 equals no camera. A query of identity -1 has no right answer.

    Args:
        distances: (B, G).
        query_identities, query_cameras: (B,).
        gallery_identities, gallery_cameras: (G,).

    Returns:
        ranks: ranks of all hits, from 1, ascending within a query, query after query.
        counts: (B,) number of hits of each query.
    """
    arrays = (query_identities, query_cameras, gallery_identities, gallery_cameras)
    counts = _count_hits(*arrays)
    index = _find_hits(*arrays, counts)
    query = np.repeat(np.arange(len(counts)), counts)
    value = distances[query, index]
    order = np.lexsort((index, value, query))
    ranks = np.empty(len(index), dtype=np.int64)
    _rank_hits(distances, *arrays, counts, index[order], value[order], ranks)
    return ranks, counts


@njit(cache=True, inline="always")
def _same_camera(a: int, b: int) -> bool:
    return a == b and a != -1


@njit(cache=True)
def _count_hits(query_ids, query_cams, gallery_ids, gallery_cams):  # type: ignore[no-untyped-def]
    counts = np.zeros(len(query_ids), dtype=np.int64)
    for q in range(len(query_ids)):
        if query_ids[q] == -1:
            continue
        for j in range(len(gallery_ids)):
            if gallery_ids[j] == query_ids[q] and not _same_camera(gallery_cams[j], query_cams[q]):
                counts[q] += 1
    return counts


@njit(cache=True)
def _find_hits(query_ids, query_cams, gallery_ids, gallery_cams, counts):  # type: ignore[no-untyped-def]
    """Gallery indices of the hits, query after query."""
    index = np.empty(counts.sum(), dtype=np.int64)
    h = 0
    for q in range(len(query_ids)):
        if counts[q] == 0:
            continue
        for j in range(len(gallery_ids)):
            if gallery_ids[j] == query_ids[q] and not _same_camera(gallery_cams[j], query_cams[q]):
                index[h] = j
                h += 1
    return index


@njit(cache=True, parallel=True)
def _rank_hits(  # type: ignore[no-untyped-def]
    distances, query_ids, query_cams, gallery_ids, gallery_cams, counts, index, value, ranks
):
    """`index` and `value` (distance) of the hits are sorted within each query."""
    ends = np.cumsum(counts)
    for q in prange(len(query_ids)):
        first, end = ends[q] - counts[q], ends[q]
        if first == end:
            continue
        ranks[first:end] = 0
        row, identity, camera, last = distances[q], query_ids[q], query_cams[q], value[end - 1]
        for j in range(len(gallery_ids)):
            d = row[j]
            if d > last or gallery_ids[j] == -1:
                continue
            if gallery_ids[j] == identity and _same_camera(gallery_cams[j], camera):
                continue
            # The first hit at or after (d, j); all hits from there on have j at or before them.
            low, high = first, end
            while low < high:
                middle = (low + high) // 2
                if value[middle] < d or (value[middle] == d and index[middle] < j):
                    low = middle + 1
                else:
                    high = middle
            if low < end:
                ranks[low] += 1
        for h in range(first + 1, end):
            ranks[h] += ranks[h - 1]
