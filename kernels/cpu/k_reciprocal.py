"""k-reciprocal encoding with numba; formulas, symbols and source stand in `kernels/k_reciprocal.py`.

Method: reciprocity by searching every neighbour's list; members of R*(i) collected with marks in an array of
N that is never cleared, because a row's marks hold its own number; expansion by adding rows up in an array of
N. Columns of V come in the order in which they are met, and are added up in it, so that results do not depend
on how rows are numbered. Blocks of 1,024 rows run side by side.

Memory: V, O(N k2 K), twice while its rows are put back; 16 N K bytes for neighbours in the order of the
visit; and 12 N bytes a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import Spare, run_blocks
from dmx.kernels.cpu.knn import Neighbours
from dmx.kernels.cpu.similarity import cosine
from dmx.kernels.cpu.sparse import SparseRows, join_rows

_ROWS = 1024


@dataclass(frozen=True)
class Nearby:
    """As `kernels.k_reciprocal.Nearby`."""

    own: NDArray[np.int32]
    places: NDArray[np.int32]
    lists: NDArray[np.int32]


def half_columns(k1: int) -> int:
    """Columns of the half list: round_half_even(k1 / 2) + 1, at most k1."""
    return min(round(k1 / 2) + 1, k1)


@njit(cache=True, nogil=True)
def _mutual(own, places, lists, full, half, begin, end):  # type: ignore[no-untyped-def]
    """full[i, c]: i is in the list of its c-th neighbour; half[i, c]: so it is in the half lists."""
    columns = half.shape[1]
    for i in range(begin, end):
        half[i] = False
        for c in range(own.shape[1]):
            j = places[i, c]
            full[i, c] = False
            for d in range(own.shape[1]):
                if lists[j, d] == own[i, 0]:
                    full[i, c] = True
                    if c < columns:
                        half[i, c] = d < columns
                    break


@njit(cache=True, nogil=True)
def _expand(own, places, lists, full, half, i, seen, members):  # type: ignore[no-untyped-def]
    """Writes R*(i) into `members`, R(i) first, and returns how many both are.

    seen[e] = 2 i + 1 marks R(i), 2 i + 2 the rest: fewer than 2^30 rows a call.
    """
    size = 0
    for c in range(own.shape[1]):
        if full[i, c]:
            seen[own[i, c]] = 2 * i + 1
            members[size] = own[i, c]
            size += 1
    near = size
    for t in range(own.shape[1]):  # only R(i): what is added below does not expand further
        if not full[i, t]:
            continue
        j = places[i, t]
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
def _members(  # type: ignore[no-untyped-def]
    own, places, lists, similarities, full, half, seen, starts, ids, weights, begin, end
):
    """R*(i) of rows [begin, end) and weights, 0 where no list has the similarity."""
    used = 0
    for i in range(begin, end):
        near, size = _expand(own, places, lists, full, half, i, seen, ids[used:])
        t = used
        for c in range(own.shape[1]):
            if full[i, c]:
                weights[t] = np.exp(-(2.0 - 2.0 * similarities[i, c]))
                t += 1
        for t in range(used + near, used + size):
            weights[t] = 0.0
            for c in range(own.shape[1]):
                if own[i, c] == ids[t]:
                    weights[t] = np.exp(-(2.0 - 2.0 * similarities[i, c]))
        used += size
        starts[i - begin + 1] = used


@njit(cache=True, nogil=True)
def _weigh(  # type: ignore[no-untyped-def]
    features, squares, numbers, others, other_squares, starts, ids, weights, begin, end
):
    """Fills in what is missing among the weights of rows [begin, end): row i is features[numbers[i]]."""
    for i in range(begin, end):
        for t in range(starts[i], starts[i + 1]):
            if weights[t] == 0.0:
                own, e = numbers[i], ids[t]
                s = cosine(features[own], others[e], squares[own], other_squares[e])
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
    lists, k2, row_starts, row_indices, row_values, total, starts, indices, values, begin, end
):
    """Rows [begin, end) of V after expansion; `total` (N,) is zero before and after."""
    used = 0
    for i in range(begin, end):
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
        starts[i - begin + 1] = used


def mutual(near: Nearby, half: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Reciprocity of R rows.

    Returns:
        (R, K) bool of the full lists and (R, half) bool of the half lists.
    """
    rows = len(near.own)
    full = np.empty(near.own.shape, np.bool_)
    tight = np.empty((rows, half), np.bool_)
    run_blocks(
        lambda a, b: _mutual(near.own, near.places, near.lists, full, tight, a, b), rows, _ROWS, "reciprocity"
    )
    return full, tight


def members(
    near: Nearby, similarities: NDArray[np.float64], full: NDArray[np.bool_], half: NDArray[np.bool_], n: int
) -> SparseRows:
    """R*(i) of R rows with weights exp(-(2 - 2 s)), 0 where no list has s.

    Args:
        similarities: (R, K), of `near.own`; full: (R, K) and half: (U, h), of `mutual`.
        n: all numbers in the lists are below it.
    """
    marks = Spare(lambda: np.zeros(n, np.int32))

    def block(first: int, last: int) -> SparseRows:
        size = (last - first) * near.own.shape[1] * (1 + half.shape[1])
        part = SparseRows(np.zeros(last - first + 1, np.int64), np.empty(size, np.int32), np.empty(size))
        with marks.lent() as seen:
            _members(near.own, near.places, near.lists, similarities, full, half, seen,
                     part.starts, part.indices, part.values, first, last)  # fmt: skip
        return part.cut()

    return join_rows(run_blocks(block, len(near.own), _ROWS, "k-reciprocal sets"))


def weigh(
    rows: SparseRows, features: NDArray[Any], squares: NDArray[np.float64], numbers: NDArray[np.int64],
    others: NDArray[Any], other_squares: NDArray[np.float64],
) -> None:  # fmt: skip
    """Fills in, in place, the weights that `members` left open; row i is features[numbers[i]]."""

    def block(begin: int, end: int) -> None:
        _weigh(features, squares, numbers, others, other_squares, rows.starts, rows.indices, rows.values,
               begin, end)  # fmt: skip

    run_blocks(block, len(rows), _ROWS, "k-reciprocal weights")


def sum_to_one(rows: SparseRows) -> None:
    """Divides every row by its sum, in place."""
    run_blocks(lambda a, b: _sum_to_one(rows.starts, rows.values, a, b), len(rows), _ROWS)


def expand(lists: NDArray[np.int32], rows: SparseRows, columns: int) -> SparseRows:
    """Means of rows: of those in each of the (R, k2) lists. Columns are below `columns`."""
    sizes, near = np.diff(rows.starts), lists.shape[1]
    sums = Spare(lambda: np.zeros(columns))

    def block(first: int, last: int) -> SparseRows:
        size = int(sizes[lists[first:last]].sum())
        part = SparseRows(np.zeros(last - first + 1, np.int64), np.empty(size, np.int32), np.empty(size))
        with sums.lent() as total:
            _average(lists, near, rows.starts, rows.indices, rows.values, total,
                     part.starts, part.indices, part.values, first, last)  # fmt: skip
        return part.cut()

    return join_rows(run_blocks(block, len(lists), _ROWS, "query expansion"))


def k_reciprocal(
    features: NDArray[Any], squares: NDArray[np.float64], neighbours: Neighbours, k1: int, k2: int,
    order: NDArray[np.int64] | None = None,
) -> SparseRows:  # fmt: skip
    """V of every row.

    Args:
        features: (N, D) float32 or float64.
        squares: (N,) float64, squared lengths of the rows.
        neighbours: of `self_knn(features, k1)`.
        k1: length of the neighbour lists asked for; decides the length of the half lists.
        k2: neighbours averaged by query expansion, itself included; 1 for none.
        order: (N,) in which rows are visited, and lie meanwhile, as `dmx.kernels.sparse.together` has it;
            None: as they stand. The result is the same.

    Returns:
        V as CSR rows (N, N).
    """
    n, columns = neighbours.indices.shape
    order = np.arange(n) if order is None else order
    place = np.empty(n, np.int32)
    place[order] = np.arange(n, dtype=np.int32)
    lists = neighbours.indices[order]
    near = Nearby(lists, place[lists], lists)
    full, half = mutual(near, min(half_columns(k1), columns))
    rows = members(near, neighbours.similarities[order], full, half, n)
    weigh(rows, features, squares, order, features, squares)
    sum_to_one(rows)
    if min(k2, columns) > 1:
        rows = expand(near.places[:, :k2], rows, n)
    return rows.put_back(order)
