"""k-reciprocal encoding with numba; formulas, symbols and source stand in `kernels/k_reciprocal.py`.

Method: reciprocity by searching every neighbour's list; members of R*(i) collected with marks in an array of
N that is never cleared, because a row's marks hold its own number; expansion by adding rows up in an array of
N. Columns of V come in the order in which they are met, and are added up in it, so that results do not depend
on how rows are numbered. Blocks of 1,024 rows run side by side.

Memory: 8 N bytes a thread beside V, O(N k2 K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import rows_with_scratch, run_blocks
from dmx.kernels.cpu.knn import Neighbours
from dmx.kernels.cpu.similarity import cosine

_ROWS = 1024


@dataclass(frozen=True)
class SparseRows:
    """CSR rows: columns `indices[starts[i]:starts[i + 1]]`, each once, with their `values`."""

    starts: NDArray[np.int64]
    indices: NDArray[np.int32]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def cut(self) -> SparseRows:
        """Without the room behind the last row."""
        used = int(self.starts[-1])
        return SparseRows(self.starts, self.indices[:used].copy(), self.values[:used].copy())

    def put_back(self, visit: NDArray[np.int64]) -> SparseRows:
        """The rows in their own order, from rows in the order of a visit: row t of these is visit[t]."""
        place = np.empty_like(visit)
        place[visit] = np.arange(len(visit))
        sizes = np.diff(self.starts)[place]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        entries = np.repeat(self.starts[place] - starts[:-1], sizes) + np.arange(starts[-1])
        return SparseRows(starts, self.indices[entries], self.values[entries])

    def together(self) -> NDArray[np.int64]:
        """An order of all rows in which those that hold the same columns tend to follow each other.

        What one row has brought into the cache is there for the next. Rows of one person share their lowest
        column more often than not.
        """
        first = np.full(len(self), -1, np.int32)
        filled = self.starts[:-1] < self.starts[1:]
        if filled.any():
            first[filled] = np.minimum.reduceat(self.indices, self.starts[:-1][filled])
        return np.argsort(first, kind="stable")


def _together(lists: NDArray[np.int32]) -> NDArray[np.int64]:
    """As `SparseRows.together`, of rows that have as many columns each."""
    return np.argsort(lists.min(1, initial=np.iinfo(np.int32).max), kind="stable")


def join_rows(parts: Sequence[SparseRows]) -> SparseRows:
    """Blocks of consecutive rows as one."""
    ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
    starts = [part.starts[1:] + end for part, end in zip(parts, ends, strict=False)]
    return SparseRows(
        np.concatenate([np.zeros(1, np.int64), *starts]),
        np.concatenate([np.empty(0, np.int32), *(part.indices for part in parts)]),
        np.concatenate([np.empty(0), *(part.values for part in parts)]),
    )


def half_columns(k1: int) -> int:
    """Columns of the half list: round_half_even(k1 / 2) + 1, at most k1."""
    return min(round(k1 / 2) + 1, k1)


@njit(cache=True, nogil=True)
def _mutual(lists, full, half, visit, begin, end):  # type: ignore[no-untyped-def]
    """full[i, c]: i is in the list of its c-th neighbour; half[i, c]: so it is in the half lists."""
    columns = half.shape[1]
    for i in visit[begin:end]:
        half[i] = False
        for c in range(lists.shape[1]):
            j = lists[i, c]
            full[i, c] = False
            for d in range(lists.shape[1]):
                if lists[j, d] == i:
                    full[i, c] = True
                    if c < columns:
                        half[i, c] = d < columns
                    break


@njit(cache=True, nogil=True)
def _expand(lists, full, half, i, seen, members):  # type: ignore[no-untyped-def]
    """Writes R*(i) into `members`, R(i) first, and returns how many both are.

    seen[e] = 2 i + 1 marks R(i), 2 i + 2 the rest.
    """
    size = 0
    for c in range(lists.shape[1]):
        if full[i, c]:
            seen[lists[i, c]] = 2 * i + 1
            members[size] = lists[i, c]
            size += 1
    near = size
    for t in range(near):  # only R(i): what is added below does not expand further
        j = members[t]
        common, total = 0, 0
        for c in range(half.shape[1]):
            if half[j, c]:
                total += 1
                common += seen[lists[j, c]] == 2 * i + 1
        if 3 * common > 2 * total:
            for c in range(half.shape[1]):
                e = lists[j, c]
                if half[j, c] and seen[e] != 2 * i + 1 and seen[e] != 2 * i + 2:
                    seen[e] = 2 * i + 2
                    members[size] = e
                    size += 1
    return near, size


@njit(cache=True, nogil=True)
def _members(lists, similarities, full, half, seen, visit, starts, ids, weights, begin, end):  # type: ignore[no-untyped-def]
    """R*(i) of rows visit[begin:end] and weights, 0 where no list has the similarity."""
    used = 0
    for place in range(begin, end):
        i = visit[place]
        near, size = _expand(lists, full, half, i, seen, ids[used:])
        t = used
        for c in range(lists.shape[1]):
            if full[i, c]:
                weights[t] = np.exp(-(2.0 - 2.0 * similarities[i, c]))
                t += 1
        for t in range(used + near, used + size):
            weights[t] = 0.0
            for c in range(lists.shape[1]):
                if lists[i, c] == ids[t]:
                    weights[t] = np.exp(-(2.0 - 2.0 * similarities[i, c]))
        used += size
        starts[place - begin + 1] = used


@njit(cache=True, nogil=True)
def _weigh(features, squares, first, starts, ids, weights, begin, end):  # type: ignore[no-untyped-def]
    """Fills in what is missing among the weights of rows [begin, end): row i is features[first + i]."""
    for i in range(begin, end):
        for t in range(starts[i], starts[i + 1]):
            if weights[t] == 0.0:
                own, e = first + i, ids[t]
                s = cosine(features[own], features[e], squares[own], squares[e])
                weights[t] = np.exp(-(2.0 - 2.0 * s))


@njit(cache=True, nogil=True)
def _sum_to_one(starts, weights, begin, end):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        total = 0.0
        for t in range(starts[i], starts[i + 1]):
            total += weights[t]
        for t in range(starts[i], starts[i + 1]):
            weights[t] /= total


@njit(cache=True, nogil=True)
def _average(  # type: ignore[no-untyped-def]
    lists, k2, row_starts, row_indices, row_values, total, visit, starts, indices, values, begin, end
):
    """Rows visit[begin:end] of V after expansion; `total` (N,) is zero before and after."""
    used = 0
    for place in range(begin, end):
        i = visit[place]
        size = 0
        for c in range(k2):
            j = lists[i, c]
            for t in range(row_starts[j], row_starts[j + 1]):
                e = row_indices[t]
                if total[e] == 0.0:
                    indices[used + size] = e
                    size += 1
                total[e] += row_values[t]
        for t in range(used, used + size):
            values[t] = total[indices[t]] / k2
            total[indices[t]] = 0.0
        used += size
        starts[place - begin + 1] = used


def mutual(lists: NDArray[np.int32], rows: int, half: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Reciprocity of the first `rows` of (U, K) lists, whose entries are rows of them or beyond U.

    Returns:
        (rows, K) bool of the full lists and (rows, half) bool of the half lists.
    """
    full = np.empty((rows, lists.shape[1]), np.bool_)
    near = np.empty((rows, half), np.bool_)
    visit = _together(lists[:rows])
    run_blocks(lambda a, b: _mutual(lists, full, near, visit, a, b), rows, _ROWS)
    return full, near


def members(
    lists: NDArray[np.int32], similarities: NDArray[np.float64], full: NDArray[np.bool_],
    half: NDArray[np.bool_], begin: int, end: int, names: int,
) -> SparseRows:  # fmt: skip
    """R*(i) of rows [begin, end) with weights exp(-(2 - 2 s)), 0 where no list has s.

    Args:
        lists: (U, K), entries below `names`; similarities: (U or end, K), theirs.
        full: (U or end, K); half: (U, h). As of `mutual`.
    """
    visit = _together(lists[begin:end]) + begin

    def block(first: int, last: int) -> SparseRows:
        size = (last - first) * lists.shape[1] * (1 + half.shape[1])
        part = SparseRows(np.zeros(last - first + 1, np.int64), np.empty(size, np.int32), np.empty(size))
        _members(lists, similarities, full, half, np.zeros(names, np.int64), visit,
                 part.starts, part.indices, part.values, first, last)  # fmt: skip
        return part.cut()

    found = run_blocks(block, end - begin, rows_with_scratch(end - begin, _ROWS))
    return join_rows(found).put_back(visit - begin)


def weigh(rows: SparseRows, features: NDArray[Any], squares: NDArray[np.float64], first: int) -> None:
    """Fills in, in place, the weights that `members` left open; row i is features[first + i]."""
    run_blocks(
        lambda a, b: _weigh(features, squares, first, rows.starts, rows.indices, rows.values, a, b),
        len(rows), _ROWS,
    )  # fmt: skip


def sum_to_one(rows: SparseRows) -> None:
    """Divides every row by its sum, in place."""
    run_blocks(lambda a, b: _sum_to_one(rows.starts, rows.values, a, b), len(rows), _ROWS)


def expand(lists: NDArray[np.int32], rows: SparseRows, columns: int) -> SparseRows:
    """Means of rows: of those in each of the (R, k2) lists. Columns are below `columns`."""
    sizes, near, visit = np.diff(rows.starts), lists.shape[1], _together(lists)

    def block(first: int, last: int) -> SparseRows:
        size = int(sizes[lists[visit[first:last]]].sum())
        part = SparseRows(np.zeros(last - first + 1, np.int64), np.empty(size, np.int32), np.empty(size))
        _average(lists, near, rows.starts, rows.indices, rows.values, np.zeros(columns), visit,
                 part.starts, part.indices, part.values, first, last)  # fmt: skip
        return part.cut()

    found = run_blocks(block, len(lists), rows_with_scratch(len(lists), _ROWS))
    return join_rows(found).put_back(visit)


def k_reciprocal(
    features: NDArray[Any], squares: NDArray[np.float64], neighbours: Neighbours, k1: int, k2: int
) -> SparseRows:
    """V of every row.

    Args:
        features: (N, D) float32 or float64.
        squares: (N,) float64, squared lengths of the rows.
        neighbours: of `self_knn(features, k1)`.
        k1: length of the neighbour lists asked for; decides the length of the half lists.
        k2: neighbours averaged by query expansion, itself included; 1 for none.

    Returns:
        V as CSR rows (N, N).
    """
    lists = neighbours.indices
    n, columns = lists.shape
    full, half = mutual(lists, n, min(half_columns(k1), columns))
    rows = members(lists, neighbours.similarities, full, half, 0, n, n)
    weigh(rows, features, squares, 0)
    sum_to_one(rows)
    return rows if min(k2, columns) == 1 else expand(lists[:, :k2], rows, n)
