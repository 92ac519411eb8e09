"""Sparse rows on the CPU, and an order in which to visit them.

Rows of one person name the same columns, and what one of them has brought into the cache is there for the
next. So rows are visited in an order in which those that share columns follow each other (`together`), and
what is made of them is put back into their own. Results do not depend on the order.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def put_back(self, order: NDArray[np.int64]) -> SparseRows:
        """The same in another order: row i of these becomes row order[i]."""
        sizes = np.empty(len(order), np.int64)
        sizes[order] = np.diff(self.starts)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        indices, values = np.empty(starts[-1], np.int32), np.empty(starts[-1])
        run_blocks(
            lambda a, b: _put(self.starts, self.indices, self.values, order, starts, indices, values, a, b),
            len(order), _ROWS,
        )  # fmt: skip
        return SparseRows(starts, indices, values)


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
def _put(starts, indices, values, order, to_starts, to_indices, to_values, begin, end):  # type: ignore[no-untyped-def]
    for place in range(begin, end):
        to = to_starts[order[place]]
        for t in range(starts[place], starts[place + 1]):
            to_indices[to], to_values[to] = indices[t], values[t]
            to += 1


def together(rows: SparseRows) -> NDArray[np.int64]:
    """(N,) an order of rows in which those with the same lowest strong column follow each other.

    Strong are columns of at least half a row's largest value. Rows of one person have their lowest in common
    more often than not; the lowest of all columns is often a stranger.
    """
    leads = np.empty(len(rows), np.int32)
    run_blocks(lambda a, b: _leads(rows.starts, rows.indices, rows.values, leads, a, b), len(rows), _ROWS)
    return np.argsort(leads, kind="stable")


def join_rows(parts: Sequence[SparseRows]) -> SparseRows:
    """Blocks of consecutive rows as one."""
    ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
    starts = [part.starts[1:] + end for part, end in zip(parts, ends, strict=False)]
    return SparseRows(
        np.concatenate([np.zeros(1, np.int64), *starts]),
        np.concatenate([np.empty(0, np.int32), *(part.indices for part in parts)]),
        np.concatenate([np.empty(0), *(part.values for part in parts)]),
    )
