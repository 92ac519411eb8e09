"""Sparse rows on the CPU, and an order in which to make them.

Rows of one person name the same columns, and what one of them has brought into the cache is there for the
next. So rows are made in an order in which those that share columns follow each other (`order_by`), and then
put back into their own (`make_rows`). Results do not depend on the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import run_blocks

_ROWS = 4096


@dataclass(frozen=True)
class SparseRows:
    """CSR rows: columns `indices[starts[i]:starts[i + 1]]`, each once, with their `values`."""

    starts: NDArray[np.int64]
    indices: NDArray[np.int32]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def cut(self) -> SparseRows:
        """A copy without the room behind the last row."""
        used = int(self.starts[-1])
        return SparseRows(self.starts, self.indices[:used].copy(), self.values[:used].copy())


@njit(cache=True, nogil=True)
def _leads(starts, indices, values, leads, begin, end):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        most = 0.0
        for t in range(starts[i], starts[i + 1]):
            most = max(most, values[t])
        leads[i] = -1
        for t in range(starts[i], starts[i + 1]):
            if values[t] >= 0.5 * most and (leads[i] == -1 or indices[t] < leads[i]):
                leads[i] = indices[t]


@njit(cache=True, nogil=True)
def _put(starts, indices, values, rows, to_starts, to_indices, to_values):  # type: ignore[no-untyped-def]
    for place in range(len(rows)):
        to = to_starts[rows[place]]
        for t in range(starts[place], starts[place + 1]):
            to_indices[to], to_values[to] = indices[t], values[t]
            to += 1


def leads(rows: SparseRows) -> NDArray[np.int32]:
    """(N,) the lowest of every row's strong columns, of at least half its largest value; -1 without columns.

    Rows of one person have the same lead more often than not; the lowest of all columns is often a stranger.
    """
    found = np.empty(len(rows), np.int32)
    run_blocks(lambda a, b: _leads(rows.starts, rows.indices, rows.values, found, a, b), len(rows), _ROWS)
    return found


def order_by(leads: NDArray[np.int32]) -> NDArray[np.int64]:
    """(N,) the rows in an order in which those with the same lead follow each other."""
    return np.argsort(leads, kind="stable")


def make_rows(
    visit: NDArray[np.int64], block: Callable[[int, int], SparseRows], rows_per_block: int
) -> SparseRows:
    """Rows that are made in blocks, in another order than theirs.

    Args:
        visit: (N,) the order.
        block: makes rows visit[begin:end], in that order, when it is called with begin and end.
        rows_per_block: how many at most.
    """
    parts = run_blocks(block, len(visit), rows_per_block)
    sizes = np.empty(len(visit), np.int64)
    sizes[visit] = np.concatenate([np.empty(0, np.int64), *(np.diff(part.starts) for part in parts)])
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    indices, values = np.empty(starts[-1], np.int32), np.empty(starts[-1])

    def put(number: int, _: int) -> None:
        part, first = parts[number], number * rows_per_block
        rows = visit[first : first + len(part)]
        _put(part.starts, part.indices, part.values, rows, starts, indices, values)

    run_blocks(put, len(parts), 1)
    return SparseRows(starts, indices, values)


def join_rows(parts: Sequence[SparseRows]) -> SparseRows:
    """Blocks of consecutive rows as one."""
    ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
    starts = [part.starts[1:] + end for part, end in zip(parts, ends, strict=False)]
    return SparseRows(
        np.concatenate([np.zeros(1, np.int64), *starts]),
        np.concatenate([np.empty(0, np.int32), *(part.indices for part in parts)]),
        np.concatenate([np.empty(0), *(part.values for part in parts)]),
    )
