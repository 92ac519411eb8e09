"""Squared Euclidean distances of queries to the gallery, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numba import njit
from numpy.typing import NDArray

FLOAT32_BYTES = 4

Block = tuple[int, NDArray[np.float32]]


def rows_per_block(columns: int, block_bytes: int) -> int:
    """How many rows of float32 distances to `columns` things fit into `block_bytes`, at least one."""
    return max(1, block_bytes // (FLOAT32_BYTES * max(columns, 1)))


def squared_norms(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared Euclidean norm of each row, (N,) float32, without a copy of x."""
    norms: NDArray[np.float32] = np.einsum("nd,nd->n", x, x)
    return norms


def squared_distances(
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    y_squared_norms: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Write max(0, ||x||^2 + ||y||^2 - 2 x y) to out.

    Args:
        x: (B, D); y: (G, D); y_squared_norms: (G,); out: (B, G), written in place.
    """
    np.matmul(np.float32(-2) * x, y.T, out=out)
    _add_norms(squared_norms(x), y_squared_norms, out)


@njit(cache=True)
def _add_norms(x_norms, y_norms, out):  # type: ignore[no-untyped-def]
    """One pass over the block instead of three."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = max(np.float32(0), out[i, j] + y_norms[j] + x_norms[i])


def distance_blocks(
    query: NDArray[np.float32], gallery: NDArray[np.float32], block_bytes: int
) -> Iterator[Block]:
    """Yield (first query, distances (B, G) float32) over all queries; a block is overwritten by the next."""
    norms = squared_norms(gallery)
    rows = min(rows_per_block(len(gallery), block_bytes), max(len(query), 1))
    buffer = np.empty((rows, len(gallery)), dtype=np.float32)
    for start in range(0, len(query), rows):
        x = query[start : start + rows]
        block = buffer[: len(x)]
        squared_distances(x, gallery, norms, block)
        yield start, block
