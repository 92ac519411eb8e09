"""Cosine similarity of two rows on the CPU, as `dmx.kernels.similarity` defines it, and rows that are equal.

Rows whose bits are equal are the same row: `first_equal` finds them, and they get the very same values.

Shapes: features (N, D) float32 or float64; squares (N,) float64.
Error: |s - exact| <= 2^-45 + D 2^-53.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import run_blocks

GRID = 2.0**44
_ROWS = 4096


# Reordering a sum is what lets it be vectorised; the grid absorbs the order.
@njit(cache=True, nogil=True, fastmath={"reassoc"})
def dot(x, y):  # type: ignore[no-untyped-def]
    """<x, y> in float64."""
    total = 0.0
    for c in range(x.shape[0]):
        total += np.float64(x[c]) * np.float64(y[c])
    return total


@njit(cache=True, nogil=True)
def cosine(x, y, square_x, square_y):  # type: ignore[no-untyped-def]
    """s(x, y) from two rows and their squared lengths."""
    return np.rint(dot(x, y) / np.sqrt(square_x * square_y) * GRID) / GRID


@njit(cache=True, nogil=True)
def _squares(features, out, begin, end):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        out[i] = dot(features[i], features[i])


@njit(cache=True, nogil=True)
def _hashes(words, out, begin, end):  # type: ignore[no-untyped-def]
    # FNV-1a over 32-bit words, in four lanes so that the multiplications overlap.
    width = words.shape[1]
    for i in range(begin, end):
        a = np.uint64(14695981039346656037)
        b, c, d = a + np.uint64(1), a + np.uint64(2), a + np.uint64(3)
        prime = np.uint64(1099511628211)
        whole = width - width % 4
        for w in range(0, whole, 4):
            a = (a ^ np.uint64(words[i, w])) * prime
            b = (b ^ np.uint64(words[i, w + 1])) * prime
            c = (c ^ np.uint64(words[i, w + 2])) * prime
            d = (d ^ np.uint64(words[i, w + 3])) * prime
        for w in range(whole, width):
            a = (a ^ np.uint64(words[i, w])) * prime
        out[i] = (((a * prime ^ b) * prime ^ c) * prime ^ d) * prime


@njit(cache=True, nogil=True)
def _first_equal(words, hashes, order, out):  # type: ignore[no-untyped-def]
    # `order` sorts by hash, equal hashes by row: the first of equal rows is met first.
    n = order.shape[0]
    start = 0
    for t in range(n):
        i = order[t]
        if hashes[i] != hashes[order[start]]:
            start = t
        out[i] = i
        for u in range(start, t):
            j = order[u]
            if out[j] != j:
                continue
            same = True
            for w in range(words.shape[1]):
                if words[i, w] != words[j, w]:
                    same = False
                    break
            if same:
                out[i] = j
                break


def squared_lengths(features: NDArray[Any]) -> NDArray[np.float64]:
    """|x_i|^2 of every row, (N, D) -> (N,) float64. Not finite where the row is not."""
    out = np.empty(len(features), np.float64)
    run_blocks(lambda a, b: _squares(features, out, a, b), len(features), _ROWS)
    return out


def first_equal(features: NDArray[Any]) -> NDArray[np.int64]:
    """For every row the lowest row whose bits are the same, (N, D) -> (N,) int64.

    Args:
        features: (N, D) float32 or float64, C-contiguous.

    Returns:
        `first` with first[i] <= i and features[first[i]] equal to features[i] bit by bit.
    """
    words = features.view(np.uint32)
    hashes = np.empty(len(features), np.uint64)
    run_blocks(lambda a, b: _hashes(words, hashes, a, b), len(features), _ROWS)
    order = np.argsort(hashes, kind="stable")
    out = np.empty(len(features), np.int64)
    _first_equal(words, hashes, order, out)
    return out
