"""k-reciprocal encoding with numba; formulas, symbols and source stand in `kernels/k_reciprocal.py`.

Method: reciprocity by searching every neighbour's list; members of R*(i) collected with marks in an array of
N that is never cleared, because a row's marks hold its own number; expansion by adding rows up in an array of
N. Columns of V come in any order. Blocks of 1,024 rows run side by side.

Memory: 24 N bytes a thread beside V, O(N k2 K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import run_blocks
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


def join_rows(parts: Sequence[SparseRows]) -> SparseRows:
    """Blocks of consecutive rows as one."""
    ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
    starts = [part.starts[1:] + end for part, end in zip(parts, ends, strict=False)]
    return SparseRows(
        np.concatenate([np.zeros(1, np.int64), *starts]),
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.values for part in parts]),
    )


def half_columns(k1: int) -> int:
    """Columns of the half list: round_half_even(k1 / 2) + 1, at most k1."""
    return min(round(k1 / 2) + 1, k1)


@njit(cache=True, nogil=True)
def _mutual(neighbours, half, out, begin, end):  # type: ignore[no-untyped-def]
    """out[i, c]: 0 not mutual, 1 mutual in the full lists, 3 in the half lists too."""
    for i in range(begin, end):
        for c in range(neighbours.shape[1]):
            j = neighbours[i, c]
            out[i, c] = 0
            for d in range(neighbours.shape[1]):
                if neighbours[j, d] == i:
                    out[i, c] = 3 if c < half and d < half else 1
                    break


@njit(cache=True, nogil=True)
def _expand(neighbours, mutual, half, i, seen, members):  # type: ignore[no-untyped-def]
    """Writes R*(i) into `members` and returns its size. seen[e] = 2 i + 1 marks R(i), 2 i + 2 the rest."""
    size = 0
    for c in range(neighbours.shape[1]):
        if mutual[i, c]:
            seen[neighbours[i, c]] = 2 * i + 1
            members[size] = neighbours[i, c]
            size += 1
    for t in range(size):  # only R(i): what is added below does not expand further
        j = members[t]
        common, total = 0, 0
        for c in range(half):
            if mutual[j, c] == 3:
                total += 1
                common += seen[neighbours[j, c]] == 2 * i + 1
        if 3 * common > 2 * total:
            for c in range(half):
                e = neighbours[j, c]
                if mutual[j, c] == 3 and seen[e] != 2 * i + 1 and seen[e] != 2 * i + 2:
                    seen[e] = 2 * i + 2
                    members[size] = e
                    size += 1
    return size


@njit(cache=True, nogil=True)
def _encode(  # type: ignore[no-untyped-def]
    features,
    squares,
    neighbours,
    similarities,
    mutual,
    half,
    seen,
    known,
    starts,
    indices,
    values,
    begin,
    end,
):
    """Rows [begin, end) of V before expansion; starts, indices, values are of this block alone."""
    used = 0
    for i in range(begin, end):
        members = indices[used:]
        size = _expand(neighbours, mutual, half, i, seen, members)
        members[:size].sort()
        for c in range(neighbours.shape[1]):
            known[neighbours[i, c]] = similarities[i, c]
        total = 0.0
        for t in range(size):
            e = members[t]
            s = known[e]
            if seen[e] != 2 * i + 1:
                s = cosine(features[i], features[e], squares[i], squares[e])
            weight = np.exp(-(2.0 - 2.0 * s))
            values[used + t] = weight
            total += weight
        for t in range(size):
            values[used + t] /= total
        used += size
        starts[i - begin + 1] = used


@njit(cache=True, nogil=True)
def _average(neighbours, k2, row_starts, row_indices, row_values, total, starts, indices, values, begin, end):  # type: ignore[no-untyped-def]
    """Rows [begin, end) of V after expansion; `total` (N,) is zero before and after."""
    used = 0
    for i in range(begin, end):
        size = 0
        for c in range(k2):
            j = neighbours[i, c]
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


def _rows_by_block(
    n: int, capacity: Callable[[int, int], int], fill: Callable[[SparseRows, int, int], None]
) -> SparseRows:
    """Joins blocks of rows, each written by `fill` into arrays of `capacity` entries."""

    def block(begin: int, end: int) -> SparseRows:
        size = capacity(begin, end)
        part = SparseRows(np.zeros(end - begin + 1, np.int64), np.empty(size, np.int32), np.empty(size))
        fill(part, begin, end)
        used = int(part.starts[-1])
        return SparseRows(part.starts, part.indices[:used].copy(), part.values[:used].copy())

    return join_rows(run_blocks(block, n, _ROWS))


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
    indices, n = neighbours.indices, len(neighbours.indices)
    columns = indices.shape[1]
    half = min(half_columns(k1), columns)
    mutual = np.empty(indices.shape, np.int8)
    run_blocks(lambda a, b: _mutual(indices, half, mutual, a, b), n, _ROWS)

    def encode(part: SparseRows, begin: int, end: int) -> None:
        seen, known = np.zeros(n, np.int64), np.empty(n)
        _encode(features, squares, indices, neighbours.similarities, mutual, half, seen, known,
                part.starts, part.indices, part.values, begin, end)  # fmt: skip

    rows = _rows_by_block(n, lambda a, b: (b - a) * columns * (1 + half), encode)
    near = min(k2, columns)
    if near == 1:
        return rows
    sizes = np.diff(rows.starts)

    def average(part: SparseRows, begin: int, end: int) -> None:
        _average(indices, near, rows.starts, rows.indices, rows.values, np.zeros(n),
                 part.starts, part.indices, part.values, begin, end)  # fmt: skip

    return _rows_by_block(n, lambda a, b: int(sizes[indices[a:b, :near]].sum()), average)
