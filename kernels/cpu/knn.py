"""Exact k nearest neighbours on the CPU; what they are stands in `dmx.kernels.knn`.

Method: rows equal bit by bit are joined as one row and spread afterwards (so that a thousand copies cost no
more than one); `candidates.py` gives a short list that provably holds all neighbours; the list is rescored
in float64. Rows whose list overflowed get a longer look in float32, and are compared with everybody if that
overflows too.

Shapes: features (N, D), queries (Q, D); indices (., k) int32, similarities (., k) float64; any k.
Time: N^2 D multiply-adds, half for a self-join, and O(N k D). Memory: O(N (k + D)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import run_blocks
from dmx.kernels.cpu.candidates import (
    Candidates,
    product_dtype,
    query_candidates,
    self_candidates,
)
from dmx.kernels.cpu.similarity import cosine, first_equal, squared_lengths

NOBODY = -3.0  # similarity of a place in a list that nobody takes; its index is -1
_ROWS = 256  # rows a rescoring call gets


@dataclass(frozen=True)
class Neighbours:
    """Nearest rows first: indices (N, k) int32 and their similarities (N, k) float64."""

    indices: NDArray[np.int32]
    similarities: NDArray[np.float64]


def nobody(rows: int, k: int) -> Neighbours:
    """Lists in which all places are free."""
    return Neighbours(np.full((rows, k), -1, np.int32), np.full((rows, k), NOBODY))


@njit(cache=True, nogil=True)
def insert(value, index, values, indices, count, k):  # type: ignore[no-untyped-def]
    """Keeps the k largest (value, -index) in order; returns how many there are now."""
    if count == k:
        if k == 0 or value < values[k - 1] or (value == values[k - 1] and index > indices[k - 1]):
            return count
        t = k - 1
    else:
        t = count
        count += 1
    while t > 0 and (values[t - 1] < value or (values[t - 1] == value and indices[t - 1] > index)):
        values[t] = values[t - 1]
        indices[t] = indices[t - 1]
        t -= 1
    values[t] = value
    indices[t] = index
    return count


@njit(cache=True, nogil=True)
def _rescore(  # type: ignore[no-untyped-def]
    queries, query_squares, features, squares, candidates, counts, at_most, own, indices, values, begin, end
):
    """Neighbours from candidates. `own`: the queries are the features, and each leads its own list."""
    n, k = features.shape[0], indices.shape[1]
    for i in range(begin, end):
        lead = 0
        if own:
            indices[i, 0], values[i, 0] = i, 1.0
            lead = 1
        count = 0
        for t in range(n if counts[i] < 0 else counts[i]):
            j = t if counts[i] < 0 else candidates[i, t]
            if own and j == i:
                continue
            if counts[i] >= 0 and count == k - lead and at_most[i, t] < values[i, k - 1]:
                continue
            s = cosine(queries[i], features[j], query_squares[i], squares[j])
            count = insert(s, j, values[i, lead:], indices[i, lead:], count, k - lead)


@njit(cache=True, nogil=True)
def _spread(near, near_values, group, members, starts, own, indices, values, begin, end):  # type: ignore[no-untyped-def]
    """Neighbours among all rows from those among distinct rows. Row i is in group[i]; see `distinct_rows`."""
    k = indices.shape[1]
    for i in range(begin, end):
        lead = 0
        if own:
            indices[i, 0], values[i, 0] = i, 1.0
            lead = 1
        count = 0
        row = group[i]
        for t in range(near.shape[1]):
            s = near_values[row, t]
            if near[row, t] < 0 or (count == k - lead and (count == 0 or s < values[i, k - 1])):
                break
            for m in range(starts[near[row, t]], starts[near[row, t] + 1]):
                if m - starts[near[row, t]] > k:
                    break  # members ascend: the rest would come later still
                if not (own and members[m] == i):
                    count = insert(s, members[m], values[i, lead:], indices[i, lead:], count, k - lead)


@dataclass(frozen=True)
class Distinct:
    """Rows equal bit by bit, as one."""

    rows: NDArray[np.int64]  # (U,), one row of every group of equal rows: the lowest
    group: NDArray[np.int64]  # (N,), group of every row
    members: NDArray[np.int64]  # (N,), rows by group, ascending
    starts: NDArray[np.int64]  # (U + 1,)


def distinct_rows(features: NDArray[Any]) -> Distinct:
    """Groups of equal rows of (N, D) features."""
    first = first_equal(features)
    rows, group = np.unique(first, return_inverse=True)
    sizes = np.bincount(group, minlength=len(rows))
    return Distinct(rows, group, np.argsort(group, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))


def again_in_float32(
    candidates: Candidates, queries: NDArray[Any], query_squares: NDArray[np.float64],
    features: NDArray[Any], squares: NDArray[np.float64], k: int,
) -> None:  # fmt: skip
    """Another try, in place, for the rows that overflowed because bfloat16 tells too little apart."""
    rows = np.flatnonzero(candidates.counts < 0)
    if len(rows) == 0 or product_dtype(features.shape[1]) != torch.bfloat16:
        return
    found = query_candidates(queries[rows], query_squares[rows], features, squares, k, torch.float32)
    candidates.counts[rows] = found.counts
    candidates.ids[rows] = found.ids
    candidates.at_most[rows] = found.at_most


def rescored(
    queries: NDArray[Any], query_squares: NDArray[np.float64], features: NDArray[Any],
    squares: NDArray[np.float64], candidates: Candidates, k: int, own: bool,
) -> Neighbours:  # fmt: skip
    """The k nearest of the candidates, by exact similarities; arguments as of `_rescore`."""
    out = nobody(len(queries), k)
    run_blocks(
        lambda a, b: _rescore(queries, query_squares, features, squares, candidates.ids, candidates.counts,
                              candidates.at_most, own, out.indices, out.similarities, a, b),
        len(queries), _ROWS, "neighbours, exact order",
    )  # fmt: skip
    return out


def spread_all(
    near: Neighbours, distinct: Distinct, group: NDArray[np.int64], k: int, own: bool
) -> Neighbours:
    """Neighbours (M, k) among all rows, from those among distinct rows.

    Args:
        near: of distinct queries; distinct: the rows that `near` names.
        group: (M,), which row of `near` each result starts from.
        own: the queries are the rows, and each leads its own list.
    """
    out = nobody(len(group), k)
    run_blocks(
        lambda a, b: _spread(near.indices, near.similarities, group, distinct.members, distinct.starts, own,
                             out.indices, out.similarities, a, b),
        len(group), 4096,
    )  # fmt: skip
    return out


def self_knn(features: NDArray[Any], k: int, *, squares: NDArray[np.float64] | None = None) -> Neighbours:
    """The k nearest rows of every row, itself first.

    Args:
        features: (N, D) float32 or float64, C-contiguous, finite, no row zero.
        k: columns wanted, >= 1; min(k, N) are returned.
        squares: (N,) float64 squared lengths where the caller has them already.

    Returns:
        Neighbours of shape (N, min(k, N)).
    """
    squares = squared_lengths(features) if squares is None else squares
    distinct = distinct_rows(features)
    plain = len(distinct.rows) == len(features)
    rows = features if plain else features[distinct.rows]
    row_squares = squares if plain else squares[distinct.rows]
    width = min(k, len(rows))
    candidates = self_candidates(rows, row_squares, width)
    again_in_float32(candidates, rows, row_squares, rows, row_squares, width)
    near = rescored(rows, row_squares, rows, row_squares, candidates, width, True)
    if plain:
        return near
    return spread_all(near, distinct, distinct.group, min(k, len(features)), True)


def knn(queries: NDArray[Any], features: NDArray[Any], k: int) -> Neighbours:
    """The k nearest rows of `features` (N, D) to every query (Q, D): higher similarity, then lower index.

    Args:
        queries: (Q, D) of the features' type, C-contiguous, finite, no row zero.
        features: (N, D) float32 or float64, likewise.
        k: columns wanted, >= 1; min(k, N) are returned.

    Returns:
        Neighbours of shape (Q, min(k, N)).
    """
    distinct = distinct_rows(features)
    rows = features if len(distinct.rows) == len(features) else features[distinct.rows]
    squares, query_squares = squared_lengths(rows), squared_lengths(queries)
    width = min(k, len(rows))
    candidates = query_candidates(queries, query_squares, rows, squares, width)
    again_in_float32(candidates, queries, query_squares, rows, squares, width)
    near = rescored(queries, query_squares, rows, squares, candidates, width, False)
    if rows is features:
        return near
    return spread_all(near, distinct, np.arange(len(queries)), min(k, len(features)), False)
