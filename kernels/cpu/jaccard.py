"""Jaccard pairs on the CPU; formula and error bound stand in `dmx.kernels.jaccard`.

Method: an inverted index over the heads of the rows. Order the columns by how many rows hold them, rare
first, and cut every row into a head and a tail of mass t(i) < 0.7 m_min. What a pair shares is in both heads,
or in the tail of the row whose head ends first: so m(i, j) <= (m over the heads) + max(t(i), t(j)). A row
adds up m over the heads for all rows in its lists, and sums whole rows only where this bound reaches m_min.

Time: sum over columns of (rows with the column in their head)^2 / 2. Memory: O(entries + pairs).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import Spare, run_blocks
from dmx.kernels.cpu.sparse import SparseRows, join_rows, together

DECIMALS = 12
_ROWS = 512


@njit(cache=True, nogil=True)
def _distance(m):  # type: ignore[no-untyped-def]
    # np.round multiplies, rounds to even and divides; spelled out so that both do the same.
    d = np.rint((1.0 - m / (2.0 - m)) * 1e12) / 1e12
    return d if d > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _cut(starts, indices, values, rank, most, heads, head_values, sizes, tails, begin, end):  # type: ignore[no-untyped-def]
    """Orders rows [begin, end) by the rank of their columns, and cuts them where `most` mass is left."""
    for i in range(begin, end):
        first, last = starts[i], starts[i + 1]
        keys = np.empty(last - first, np.int64)
        for t in range(first, last):
            keys[t - first] = (np.int64(rank[indices[t]]) << 24) + (t - first)
        keys.sort()
        sizes[i], tails[i] = last - first, 0.0
        for t in range(last - 1, first - 1, -1):
            source = first + (keys[t - first] & 0xFFFFFF)
            heads[t], head_values[t] = indices[source], values[source]
            if sizes[i] == t + 1 - first and tails[i] + values[source] < most:
                tails[i] += values[source]
                sizes[i] -= 1


@njit(cache=True, nogil=True)
def _transpose(starts, sizes, heads, head_values, column_starts, rows, row_values):  # type: ignore[no-untyped-def]
    """Heads by column; the rows of a column ascend."""
    n = sizes.shape[0]
    for i in range(n):
        for t in range(starts[i], starts[i] + sizes[i]):
            column_starts[heads[t] + 1] += 1
    for e in range(n):
        column_starts[e + 1] += column_starts[e]
    fill = column_starts[:n].copy()
    for i in range(n):
        for t in range(starts[i], starts[i] + sizes[i]):
            u = fill[heads[t]]
            rows[u], row_values[u] = i, head_values[t]
            fill[heads[t]] += 1


@njit(cache=True, nogil=True)
def _overlap(weight, indices, values, begin, end):  # type: ignore[no-untyped-def]
    m = 0.0
    for t in range(begin, end):
        w, v = weight[indices[t]], values[t]
        m += w if w < v else v
    return m


@njit(cache=True, nogil=True)
def _join(  # type: ignore[no-untyped-def]
    starts, indices, values, heads, head_values, sizes, tails, column_starts, rows, row_values,
    max_distance, least, total, weight, met, visit, begin, end, out_starts, out, out_d,
):  # fmt: skip
    """Pairs of rows visit[begin:end]; returns how many. Fills `out` only while there is room."""
    used = 0
    for place in range(begin, end):
        i = visit[place]
        size = 0
        for t in range(starts[i], starts[i] + sizes[i]):
            v, e = head_values[t], heads[t]
            # Rows of a column ascend, so walking backwards ends where j > i does.
            for u in range(column_starts[e + 1] - 1, column_starts[e] - 1, -1):
                j = rows[u]
                if j <= i:
                    break
                # Without branches: whether j is new here is beyond prediction.
                met[size] = j
                size += total[j] == 0.0
                w = row_values[u]
                total[j] += w if w < v else v
        for t in range(starts[i], starts[i + 1]):
            weight[indices[t]] = values[t]
        kept = 0
        for t in range(size):
            j = met[t]
            if total[j] + max(tails[i], tails[j]) >= least:
                met[kept] = j
                kept += 1
            total[j] = 0.0
        met[:kept].sort()
        for t in range(kept):
            j = met[t]
            d = _distance(_overlap(weight, indices, values, starts[j], starts[j + 1]))
            if d <= max_distance:
                if used < out.shape[0]:
                    out[used], out_d[used] = j, d
                used += 1
        for t in range(starts[i], starts[i + 1]):
            weight[indices[t]] = 0.0
        out_starts[place - begin + 1] = used
    return used


@njit(cache=True, nogil=True)
def _meet(  # type: ignore[no-untyped-def]
    starts, columns, weights, list_starts, list_rows, list_weights, first, enough, total, met, begin, end,
    out_starts, out,
):  # fmt: skip
    """Rows j > first + i that share `enough` with row i of [begin, end); fills `out` while there is room."""
    used = 0
    for i in range(begin, end):
        size = 0
        for t in range(starts[i], starts[i + 1]):
            weight, e = np.int32(weights[t]), columns[t]
            for u in range(list_starts[e + 1] - 1, list_starts[e] - 1, -1):
                j = list_rows[u]
                if j <= first + i:
                    break
                met[size] = j
                size += total[j] == 0
                total[j] += min(weight, np.int32(list_weights[u]))
        for t in range(size):
            j = met[t]
            if total[j] >= enough:
                if used < out.shape[0]:
                    out[used] = j
                used += 1
            total[j] = 0
        if used <= out.shape[0]:
            out[out_starts[i - begin] : used].sort()
        out_starts[i - begin + 1] = used
    return used


@njit(cache=True, nogil=True)
def _distances(starts, indices, values, pair_starts, others, weight, begin, end, out):  # type: ignore[no-untyped-def]
    """d of rows [begin, end) and the `others` that each is paired with; `weight` is zero before and after."""
    for i in range(begin, end):
        for t in range(starts[i], starts[i + 1]):
            weight[indices[t]] = values[t]
        for t in range(pair_starts[i], pair_starts[i + 1]):
            j = others[t]
            out[t] = _distance(_overlap(weight, indices, values, starts[j], starts[j + 1]))
        for t in range(starts[i], starts[i + 1]):
            weight[indices[t]] = 0.0


@dataclass(frozen=True)
class _Heads:
    indices: NDArray[np.int32]  # (entries,), every row ordered by rank; its head are the first sizes[i]
    values: NDArray[np.float32]
    sizes: NDArray[np.int64]  # (N,)
    tails: NDArray[np.float64]  # (N,), mass of what is not in the head
    column_starts: NDArray[np.int64]  # (N + 1,), the heads by column
    rows: NDArray[np.int32]
    row_values: NDArray[np.float32]


def _heads(v: SparseRows, most: float) -> _Heads:
    n = len(v)
    rank = np.empty(n, np.int32)
    rank[np.argsort(np.bincount(v.indices, minlength=n), kind="stable")] = np.arange(n, dtype=np.int32)
    indices, values = np.empty_like(v.indices), np.empty(len(v.values), np.float32)
    sizes, tails = np.empty(n, np.int64), np.empty(n)
    run_blocks(
        lambda a, b: _cut(v.starts, v.indices, v.values, rank, most, indices, values, sizes, tails, a, b),
        n, _ROWS,
    )  # fmt: skip
    entries = int(sizes.sum())
    column_starts = np.zeros(n + 1, np.int64)
    rows, row_values = np.empty(entries, np.int32), np.empty(entries, np.float32)
    _transpose(v.starts, sizes, indices, values, column_starts, rows, row_values)
    return _Heads(indices, values, sizes, tails, column_starts, rows, row_values)


def jaccard_pairs(v: SparseRows, max_distance: float) -> SparseRows:
    """All pairs i < j with d(i, j) <= max_distance that share at least one entry.

    Args:
        v: rows of `k_reciprocal`, each summing to 1.
        max_distance: in [0, 1]. Pairs that share nothing are at distance 1 and never returned.

    Returns:
        CSR rows of distances holding j > i alone. A distance 0 is an entry like any other.
    """
    n = len(v)
    # Heads are summed in float32 and only rule pairs out, so the bound gives way by more than their rounding:
    # up to (entries of a row) 2^-24 of a sum of at most 1.
    longest = int(np.diff(v.starts).max(initial=0))
    least = max(2 * (1 - max_distance) / (2 - max_distance) - 1e-6 - longest * 2.0**-23, 0.0)
    heads = _heads(v, 0.7 * least)
    visit = together(v)
    scratch = Spare(lambda: (np.zeros(n, np.float32), np.zeros(n), np.empty(n + 1, np.int32)))

    def block(begin: int, end: int) -> SparseRows:
        starts, room = np.zeros(end - begin + 1, np.int64), 64 * (end - begin)
        while True:
            out, distances = np.empty(room, np.int32), np.empty(room)
            with scratch.lent() as (total, weight, met):
                used = _join(v.starts, v.indices, v.values, heads.indices, heads.values, heads.sizes,
                             heads.tails, heads.column_starts, heads.rows, heads.row_values, max_distance,
                             least, total, weight, met, visit, begin, end, starts, out,
                             distances)  # fmt: skip
            if used <= room:
                return SparseRows(starts, out[:used].copy(), distances[:used].copy())
            room = used

    return join_rows(run_blocks(block, n, _ROWS, "Jaccard distances")).put_back(visit)


def candidates(
    starts: NDArray[np.int64], columns: NDArray[np.int32], weights: NDArray[np.int16],
    list_starts: NDArray[np.int64], list_rows: NDArray[np.int32], list_weights: NDArray[np.int16],
    first: int, n: int, enough: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:  # fmt: skip
    """As of `dmx.kernels.partial_join`: CSR (starts, rows j) of the candidates of every row."""
    scratch = Spare(lambda: (np.zeros(n, np.int32), np.empty(n + 1, np.int32)))

    def block(begin: int, end: int) -> SparseRows:
        found, room = np.zeros(end - begin + 1, np.int64), 64 * (end - begin)
        while True:
            out = np.empty(room, np.int32)
            with scratch.lent() as (total, met):
                used = _meet(starts, columns, weights, list_starts, list_rows, list_weights, first, enough,
                             total, met, begin, end, found, out)  # fmt: skip
            if used <= room:
                return SparseRows(found, out[:used].copy(), np.empty(used))
            room = used

    pairs = join_rows(run_blocks(block, len(starts) - 1, 4 * _ROWS))
    return pairs.starts, pairs.indices


def pair_distances(
    rows: SparseRows, pair_starts: NDArray[np.int64], others: NDArray[np.int32], n: int
) -> NDArray[np.float64]:
    """d of each of the first rows and those of `rows` that it is paired with; columns are below `n`."""
    out, scratch = np.empty(len(others)), Spare(lambda: np.zeros(n))

    def block(begin: int, end: int) -> None:
        with scratch.lent() as weight:
            _distances(rows.starts, rows.indices, rows.values, pair_starts, others, weight, begin, end, out)

    run_blocks(block, len(pair_starts) - 1, 4 * _ROWS)
    return out
