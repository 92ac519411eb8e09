"""Jaccard distance of sparse rows that sum to 1, only for the pairs that are close.

    m(i, j) = sum over e of min(V(i, e), V(j, e))
    d(i, j) = round_12( 1 - m / (2 - m) )                  pairs i < j with d <= max_distance

Rows sum to 1, so sum max = 2 - m. round_12 rounds to 12 decimals: sums of a few hundred float64 numbers taken
in another order differ by about 1e-15, and on the decimal grid a pair that is tied with a threshold by
construction (duplicates, equal rows, d = 0.6 itself) falls on the same side whatever the order.

Method: an inverted index e -> rows. Row i adds min(V(i, e), V(j, e)) to an accumulator of every j > i met in
the columns of its entries; what reaches the least m wanted becomes a pair.

Shapes: V (N, N) CSR; pairs as CSR rows holding only columns j > i, ascending. d float64.
Error: |d - exact| <= 5e-13 (the rounding) + 1e-15. Memory: O(entries + pairs).
Time: sum over columns of (length of column)^2 / 2.
Source: Zhong et al., CVPR 2017, eq. 10.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import sparse

from dmx.kernels.blocks import run_blocks
from dmx.kernels.k_reciprocal import SparseRows

DECIMALS = 12
_ROWS = 512


def jaccard_reference(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """The formula, dense: (N, N) rows that sum to 1 -> (N, N) distances."""
    m = np.stack([np.minimum(row, v).sum(1) for row in v])
    return np.asarray(np.round(1 - m / (2 - m), DECIMALS) + 0.0)


@njit(cache=True, nogil=True)
def _distance(m):  # type: ignore[no-untyped-def]
    # np.round multiplies, rounds to even and divides; spelled out so that both do the same.
    d = np.rint((1.0 - m / (2.0 - m)) * 1e12) / 1e12
    return d if d > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _join(  # type: ignore[no-untyped-def]
    starts,
    indices,
    values,
    column_starts,
    rows,
    row_values,
    max_distance,
    total,
    begin,
    end,
    out_starts,
    out,
    out_d,
):
    """Pairs of rows [begin, end); returns how many. Fills `out` only while there is room."""
    used = 0
    met = np.empty(total.shape[0], np.int32)
    for i in range(begin, end):
        size = 0
        for t in range(starts[i], starts[i + 1]):
            v, e = values[t], indices[t]
            # Rows of a column ascend, so walking backwards ends where j > i does.
            for u in range(column_starts[e + 1] - 1, column_starts[e] - 1, -1):
                j = rows[u]
                if j <= i:
                    break
                if total[j] == 0.0:
                    met[size] = j
                    size += 1
                total[j] += min(v, row_values[u])
        kept = 0
        for t in range(size):
            j = met[t]
            d = _distance(total[j])
            if d <= max_distance:
                met[kept] = j
                kept += 1
            else:
                total[j] = 0.0
        met[:kept].sort()
        for t in range(kept):
            if used + t < out.shape[0]:
                out[used + t] = met[t]
                out_d[used + t] = _distance(total[met[t]])
            total[met[t]] = 0.0
        used += kept
        out_starts[i - begin + 1] = used
    return used


def jaccard_pairs(v: SparseRows, max_distance: float) -> SparseRows:
    """All pairs i < j with d(i, j) <= max_distance that share at least one entry.

    Args:
        v: rows of `k_reciprocal`, each summing to 1.
        max_distance: in [0, 1]. Pairs that share nothing are at distance 1 and never returned.

    Returns:
        CSR rows of distances holding j > i alone. A distance 0 is an entry like any other.
    """
    n = len(v)
    columns = sparse.csr_array((v.values, v.indices, v.starts), shape=(n, n)).tocsc()
    column_starts = columns.indptr.astype(np.int64)

    def block(begin: int, end: int) -> SparseRows:
        total, starts = np.zeros(n), np.zeros(end - begin + 1, np.int64)
        room = 64 * (end - begin)
        while True:
            out, distances = np.empty(room, np.int32), np.empty(room)
            used = _join(v.starts, v.indices, v.values, column_starts, columns.indices, columns.data,
                         max_distance, total, begin, end, starts, out, distances)  # fmt: skip
            if used <= room:
                return SparseRows(starts, out[:used].copy(), distances[:used].copy())
            room = used

    parts = run_blocks(block, n, _ROWS)
    ends = np.cumsum([0, *(part.starts[-1] for part in parts)])
    return SparseRows(
        np.concatenate(
            [np.zeros(1, np.int64), *(p.starts[1:] + e for p, e in zip(parts, ends, strict=False))]
        ),
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.values for part in parts]),
    )
