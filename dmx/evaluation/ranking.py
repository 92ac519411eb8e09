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
    known = gallery_identities != -1
    counts = np.empty(len(distances), dtype=np.int64)
    arrays = (query_identities, query_cameras, gallery_identities, gallery_cameras)
    _count_hits(*arrays, counts)
    ends = np.cumsum(counts)
    ranks = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
    _rank_hits(distances, *arrays, known, ends - counts, counts, ranks)
    return ranks, counts


@njit(cache=True, inline="always")
def _same_camera(a: int, b: int) -> bool:
    return a == b and a != -1


@njit(cache=True, parallel=True)
def _count_hits(query_ids, query_cams, gallery_ids, gallery_cams, counts):  # type: ignore[no-untyped-def]
    for q in prange(len(query_ids)):
        count = 0
        if query_ids[q] != -1:
            for j in range(len(gallery_ids)):
                if gallery_ids[j] == query_ids[q] and not _same_camera(gallery_cams[j], query_cams[q]):
                    count += 1
        counts[q] = count


@njit(cache=True, parallel=True)
def _rank_hits(  # type: ignore[no-untyped-def]
    distances, query_ids, query_cams, gallery_ids, gallery_cams, known, starts, counts, ranks
):
    gallery = len(gallery_ids)
    for q in prange(len(query_ids)):
        n = counts[q]
        if n == 0:
            continue
        row, identity, camera = distances[q], query_ids[q], query_cams[q]
        index = np.empty(n, dtype=np.int64)
        value = np.empty(n, dtype=distances.dtype)
        h = 0
        for j in range(gallery):
            if gallery_ids[j] == identity and not _same_camera(gallery_cams[j], camera):
                index[h], value[h] = j, row[j]
                h += 1
        order = np.argsort(value, kind="mergesort")
        index, value = index[order], value[order]
        before = np.zeros(n, dtype=np.int64)
        last = value[n - 1]
        for j in range(gallery):
            d = row[j]
            if d > last or not known[j]:
                continue
            if gallery_ids[j] == identity and _same_camera(gallery_cams[j], camera):
                continue
            # The first hit at or after (d, j); all hits from there on have j at or before them.
            low, high = 0, n
            while low < high:
                middle = (low + high) // 2
                if value[middle] < d or (value[middle] == d and index[middle] < j):
                    low = middle + 1
                else:
                    high = middle
            if low < n:
                before[low] += 1
        rank = 0
        for i in range(n):
            rank += before[i]
            ranks[starts[q] + i] = rank
