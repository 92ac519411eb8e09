"""Exact nearest neighbours among rows that are listed for every query, on the CPU.

    listed(i) = the k rows j of those listed for query i with the largest (s(i, j), -j)

s of `similarity.py`. A list names groups of equal rows: s is found once for a group, and its members follow.
An approximate search that returns a few more rows than are wanted becomes exact over what it looked at.

Shapes: queries (Q, D), features (N, D) of one type, float32 or float64; result (Q, k) int32 and float64.
Error: none in the order; similarities as in `similarity.py`. Time: D multiply-adds an entry.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import run_blocks
from dmx.kernels.cpu.knn import Distinct, Neighbours, insert, nobody
from dmx.kernels.cpu.similarity import cosine

_ROWS = 256  # queries a call gets


@njit(cache=True, nogil=True)
def _listed(  # type: ignore[no-untyped-def]
    queries, query_squares, features, squares, rows, members, member_starts, starts, entries, least, indices,
    values, begin, end,
):  # fmt: skip
    k = indices.shape[1]
    for i in range(begin, end):
        count = 0
        for t in range(starts[i], starts[i + 1]):
            group = entries[t]
            j = rows[group]
            s = cosine(queries[i], features[j], query_squares[i], squares[j])
            if s < least[i]:
                continue
            # Members ascend: those after the first k would come later still.
            for m in range(member_starts[group], min(member_starts[group + 1], member_starts[group] + k)):
                if count == k and s < values[i, k - 1]:
                    break
                count = insert(s, members[m], values[i], indices[i], count, k)


def listed_knn(
    queries: NDArray[Any], query_squares: NDArray[np.float64], features: NDArray[Any],
    squares: NDArray[np.float64], groups: Distinct, starts: NDArray[np.int64], entries: NDArray[np.int64],
    least: NDArray[np.float64], k: int,
) -> Neighbours:  # fmt: skip
    """The k nearest of the rows listed for every query.

    Args:
        queries: (Q, D); features: (N, D) of the same type; both C-contiguous, with their squared lengths.
        groups: the equal rows among the features.
        starts: (Q + 1,), entries[starts[i] : starts[i + 1]] are the groups listed for query i, each once.
        least: (Q,), who is less similar is not wanted.
        k: columns wanted, >= 1.

    Returns:
        Neighbours (Q, k): higher similarity, then lower index; -1 and `NOBODY` in places that nobody takes.
    """
    out = nobody(len(queries), k)
    run_blocks(
        lambda a, b: _listed(queries, query_squares, features, squares, groups.rows, groups.members,
                             groups.starts, starts, entries, least, out.indices, out.similarities, a, b),
        len(queries), _ROWS,
    )  # fmt: skip
    return out
