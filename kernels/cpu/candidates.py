"""Candidates for exact nearest neighbours: a cheap matrix product that provably misses nobody.

Rows are made unit and centred, u_j = x_j / |x_j| - m, because real features share a large mean that would
only eat precision. For a fixed row i, ordering j by similarity is ordering by

    key(i, j) = <u_i, u_j> + a_j,      a_j = <m, x_j / |x_j|> - mean_j(a)      (plus what depends on i alone)

The product is taken in bfloat16 where the processor multiplies it natively, else in float32. A computed key c
is off from s(i, j) less what depends on i alone, s as `similarity.py` computes it, by at most

    E_i(c) = base_i + r |c|
    base_i = e_i max_j(|u_j| + e_j) + |u_i| max_j e_j        rounding of the factors, e_i = |u_i - round(u_i)|
           + (D + 8) 2^-23 |u_i| max_j |u_j|                 summation in float32, in any order
           + r max_j |a_j| + 2^-21 (1 + max_j |a_j|) w       rounding of the product, of a_j and of the sum
           + 2^-45 + (D + 8) 2^-52                           rounding of s to its grid; s and a_j in float64
    r      = 2^-8 for a bfloat16 product, 2^-24 for float32;   w = |u_i| max_j |u_j| + max_j |a_j|

The e_i are measured. r is half a step: numbers of p significant bits, 8 in bfloat16 and 24 in float32, lie
2^(1-p) apart in [1, 2), so rounding to nearest moves a number by up to 2^-p of its size.

If c_k is the k-th largest computed key of row i, no true neighbour has a computed key below
c_k - 2.02 E_i(c_k) (the 1 % covers the second order, as r < 0.0099). Keys that reach this threshold are
appended while it rises; a row with more of them than fit is given up (count -1) for the caller to do in full.

Self-joins use symmetry: only tiles with J >= I are computed, each tested against the thresholds of its rows
and of its columns. Shapes: features (N, D), squares (N,), ids (Q, capacity) int32, counts (Q,) int32.
Memory: one centred copy of the features in the product's type, 8 bytes a candidate, one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import Workers, run_blocks
from dmx.kernels.cpu.similarity import GRID
from dmx.kernels.progress import counting

LABEL, UNIT = "neighbours", "pairs"  # as progress is told
TILE = 512  # rows and columns of a tile: 1 MB in float32, and the product runs at its full rate
_CHUNK = 16  # scores tested at once: a chunk without a hit costs a few vector instructions
_NARROW = 128  # below this width a product costs nothing, and float32 needs far fewer candidates


@dataclass(frozen=True)
class Candidates:
    """`ids[i, :counts[i]]` holds every true neighbour of row i; counts[i] = -1 where they did not fit.

    The likeliest k come first, so that most of the others are ruled out by `at_most`: their similarity is no
    more than that.
    """

    ids: NDArray[np.int32]
    counts: NDArray[np.int32]
    at_most: NDArray[np.float32]


@dataclass(frozen=True)
class _Rows:
    """Centred unit rows, rounded, and what the error bound needs to know of them."""

    low: torch.Tensor  # (N, D), bfloat16 or float32
    offset: NDArray[np.float32]  # (N,), a_j
    along_mean: NDArray[np.float64]  # (N,), <m, x_j / |x_j|>, which is a_j before its mean is taken off
    error: NDArray[np.float64]  # (N,), e_i
    length: NDArray[np.float64]  # (N,), |u_i|


@njit(cache=True, nogil=True)
def _kth_largest(values, work, count, k):  # type: ignore[no-untyped-def]
    # Hoare's selection on a copy: linear on average, k counted from 1.
    for t in range(count):
        work[t] = values[t]
    low, high, target = 0, count - 1, k - 1
    while low < high:
        pivot = work[(low + high) // 2]
        a, b = low, high
        while a <= b:
            while work[a] > pivot:
                a += 1
            while work[b] < pivot:
                b -= 1
            if a <= b:
                work[a], work[b] = work[b], work[a]
                a += 1
                b -= 1
        if target <= b:
            high = b
        elif target >= a:
            low = a
        else:
            break
    return work[target]


@njit(cache=True, nogil=True)
def _compact(i, k, keys, ids, counts, threshold, base, rounding, work):  # type: ignore[no-untyped-def]
    """Raises the threshold of row i to what its buffer proves, and drops what is below."""
    count = counts[i]
    if count < k:
        return
    best = np.float64(_kth_largest(keys[i], work, count, k))
    limit = max(np.float32(best - 2.02 * (base[i] + rounding * abs(best))), threshold[i])
    kept = 0
    for t in range(count):
        if keys[i, t] >= limit:
            keys[i, kept] = keys[i, t]
            ids[i, kept] = ids[i, t]
            kept += 1
    counts[i] = kept
    threshold[i] = limit
    if kept > keys.shape[1] * 7 // 8:  # hardly any room left: compacting again and again would be slower
        counts[i] = -1
        threshold[i] = np.inf


# The two scans spell out the same few lines: a call with this many arrays costs more than the work itself.
@njit(cache=True, nogil=True)
def _scan_rows(  # type: ignore[no-untyped-def]
    tile, first_row, first_column, offset, k, keys, ids, counts, threshold, base, rounding, begin, end
):
    """Appends the hits of a tile's rows [begin, end) to the buffers of these rows."""
    work = np.empty(keys.shape[1], np.float32)
    width = tile.shape[1]
    for r in range(begin, end):
        i = first_row + r
        limit, count = threshold[i], counts[i]
        for left in range(0, width, _CHUNK):
            right = min(left + _CHUNK, width)
            if right - left == _CHUNK:
                hits = 0
                for c in range(left, left + _CHUNK):
                    hits += tile[r, c] + offset[first_column + c] >= limit
                if hits == 0:
                    continue
            for c in range(left, right):
                key = tile[r, c] + offset[first_column + c]
                if key < limit or count < 0:
                    continue
                keys[i, count] = key
                ids[i, count] = first_column + c
                count += 1
                if count == keys.shape[1]:
                    counts[i] = count
                    _compact(i, k, keys, ids, counts, threshold, base, rounding, work)
                    limit, count = threshold[i], counts[i]
        counts[i] = count


@njit(cache=True, nogil=True)
def _scan_columns(  # type: ignore[no-untyped-def]
    tile, first_row, first_column, offset, k, keys, ids, counts, threshold, base, rounding, begin, end
):
    """Appends the hits of a tile's columns [begin, end) to the buffers of these columns."""
    work = np.empty(keys.shape[1], np.float32)
    for strip in range(begin, end, 4 * _CHUNK):
        for r in range(tile.shape[0]):
            shift = offset[first_row + r]
            for left in range(strip, min(strip + 4 * _CHUNK, end), _CHUNK):
                right = min(left + _CHUNK, end)
                if right - left == _CHUNK:
                    hits = 0
                    for c in range(left, left + _CHUNK):
                        hits += tile[r, c] + shift >= threshold[first_column + c]
                    if hits == 0:
                        continue
                for c in range(left, right):
                    j = first_column + c
                    key = tile[r, c] + shift
                    if key < threshold[j] or counts[j] < 0:
                        continue
                    keys[j, counts[j]] = key
                    ids[j, counts[j]] = first_row + r
                    counts[j] += 1
                    if counts[j] == keys.shape[1]:
                        _compact(j, k, keys, ids, counts, threshold, base, rounding, work)


@njit(cache=True, nogil=True)
def _finish(k, keys, ids, counts, threshold, base, rounding, constant, begin, end):  # type: ignore[no-untyped-def]
    """Drops what the final thresholds rule out, moves the k best to the front, turns keys into `at_most`."""
    work = np.empty(keys.shape[1], np.float32)
    for i in range(begin, end):
        if counts[i] < k:
            continue
        _compact(i, k, keys, ids, counts, threshold, base, rounding, work)
        if counts[i] < 0:
            continue
        limit, front = _kth_largest(keys[i], work, counts[i], k), 0
        for t in range(counts[i]):
            key, j = keys[i, t], ids[i, t]
            # The key in float64 is exact; 2^-22 covers rounding a sum near 1 to float32.
            bound = key + base[i] + rounding * abs(key) + constant[i] + 2.0**-22
            place = t
            if key >= limit:
                keys[i, t], ids[i, t] = keys[i, front], ids[i, front]
                place, front = front, front + 1
            keys[i, place], ids[i, place] = bound, j


# Sums may be reordered to be vectorised: their rounding is part of the bound.
@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _centre(  # type: ignore[no-untyped-def]
    features, squares, mean, dropped_bits, rounded, offset, error, length, begin, end
):
    """u_i in float32 less `dropped_bits` of its bits, to nearest even; a_i (not yet centred), e_i, |u_i|."""
    half = np.uint32((1 << dropped_bits) // 2)
    for i in range(begin, end):
        scale = 1.0 / np.sqrt(squares[i])
        shift, lost, size = 0.0, 0.0, 0.0
        bits = rounded[i - begin].view(np.uint32)
        for c in range(features.shape[1]):
            rounded[i - begin, c] = features[i, c] * scale - mean[c]
        if half:
            for c in range(features.shape[1]):
                odd = (bits[c] >> np.uint32(dropped_bits)) & np.uint32(1)
                bits[c] = np.uint32(bits[c] + (half - np.uint32(1)) + odd) & ~np.uint32(2 * half - 1)
        for c in range(features.shape[1]):
            unit = features[i, c] * scale
            u = unit - mean[c]
            shift += unit * mean[c]
            size += u * u
            lost += (u - rounded[i - begin, c]) ** 2
        offset[i], error[i], length[i] = shift, np.sqrt(lost), np.sqrt(size)


def product_dtype(width: int) -> torch.dtype:
    """The type a matrix product of this inner width is cheapest in, exact results being wanted."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native and width >= _NARROW else torch.float32


def mean_of_some(features: NDArray[Any], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """m, (D,) float64: any vector near the mean of unit rows serves, so a few hundred rows are enough."""
    step = -(-len(features) // 512)
    rows = features[::step].astype(np.float64)
    return np.asarray(1 / np.sqrt(squares[::step]) @ rows / len(rows))


def prepare(
    features: NDArray[Any], squares: NDArray[np.float64], mean: NDArray[np.float64], dtype: torch.dtype
) -> _Rows:
    """Centred unit rows in the product's type, with their measured errors.

    Args:
        features: (N, D) float32 or float64; squares: (N,) float64.
        mean: (D,) float64, taken off; dtype: bfloat16 or float32.
    """
    n, width = features.shape
    low = torch.empty((n, width), dtype=dtype)
    offset, error, length = np.empty(n), np.empty(n), np.empty(n)
    bfloat = dtype == torch.bfloat16
    target = low.view(torch.int16).numpy().view(np.uint16) if bfloat else low.numpy()

    def block(begin: int, end: int) -> None:
        rounded = np.empty((end - begin, width), np.float32)
        _centre(features, squares, mean, 16 if bfloat else 0, rounded, offset, error, length, begin, end)
        target[begin:end] = rounded.view(np.uint32) >> 16 if bfloat else rounded

    run_blocks(block, n, 32)
    # The 1e-3 and 1e-15 cover the rounding of these norms and of the centred rows themselves.
    centred = (offset - offset.mean()).astype(np.float32)
    return _Rows(low, centred, offset, error * 1.001 + 1e-15, length * 1.001 + 1e-15)


def bound_errors(rows: _Rows, others: _Rows, rounding: float) -> NDArray[np.float64]:
    """base_i of the formula on top of the file."""
    longest, worst = float(others.length.max()), float(others.error.max())
    shift = float(np.abs(others.offset).max())
    size = rows.length * longest
    summation = (rows.low.shape[1] + 8) * 2.0**-23 * size
    small = rounding * shift + 2.0**-21 * (1 + shift) * (size + shift)
    small += 0.5 / GRID + (rows.low.shape[1] + 8) * 2.0**-52
    return np.asarray(rows.error * (longest + worst) + rows.length * worst + summation + small)


def _product(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.float32]:
    if a.dtype == torch.bfloat16:
        return np.asarray((a @ b.T).float().numpy())
    # NumPy's float32 product, since torch may be told to round float32 factors to less.
    return np.asarray(a.numpy() @ b.numpy().T)


def constants_of(rows: _Rows, others: _Rows, mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """s(i, j) - key(i, j), which depends on i alone."""
    return np.asarray(rows.along_mean + others.along_mean.mean() - mean @ mean)


@dataclass(frozen=True)
class _Tile:
    scores: NDArray[np.float32]
    row: int
    column: int

    @property
    def pairs(self) -> int:
        """Pairs of rows that it compares, each once."""
        rows = len(self.scores)
        return pairs_within(rows) if self.row == self.column else self.scores.size


def tile_of(rows: _Rows, others: _Rows, row: int, column: int) -> _Tile:
    """The product of rows from `row` and columns from `column` on."""
    return _Tile(_product(rows.low[row : row + TILE], others.low[column : column + TILE]), row, column)


class Buffers:
    """The candidates so far, and the scan that feeds them."""

    def __init__(self, n: int, k: int, base: NDArray[np.float64], rounding: float) -> None:
        capacity = max(8 * k, 128)
        self.k, self.base, self.rounding = k, base, rounding
        self.keys = np.empty((n, capacity), np.float32)
        self.ids = np.empty((n, capacity), np.int32)
        self.counts = np.zeros(n, np.int32)
        self.threshold = np.full(n, -np.inf, np.float32)

    def scan(self, tile: _Tile, by_row: bool, offset: NDArray[np.float32]) -> None:
        """Feeds the buffers of a tile's rows (by_row) or columns; offset: a_j of all of the other side."""
        kernel, owners = (_scan_rows, 0) if by_row else (_scan_columns, 1)
        kernel(tile.scores, tile.row, tile.column, offset, self.k, self.keys, self.ids, self.counts,
               self.threshold, self.base, self.rounding, 0, tile.scores.shape[owners])  # fmt: skip

    def want(self, least: NDArray[np.float64], constant: NDArray[np.float64]) -> None:
        """Starts with the thresholds that similarities of at least `least` (n,) prove."""
        key = least - constant
        limit = (key - 1.02 * (self.base + self.rounding * np.abs(key))).astype(np.float32)
        self.threshold[:] = np.nextafter(limit, np.float32(-np.inf))

    def finish(self, constant: NDArray[np.float64]) -> Candidates:
        run_blocks(
            lambda a, b: _finish(self.k, self.keys, self.ids, self.counts, self.threshold, self.base,
                                 self.rounding, constant, a, b),
            len(self.counts), 1024,
        )  # fmt: skip
        return Candidates(self.ids, self.counts, self.keys)


def pairs_within(n: int) -> int:
    """Pairs of n rows, each row with itself among them."""
    return n * (n + 1) // 2


def rounding_of(dtype: torch.dtype) -> float:
    """r of the formula on top of the file."""
    return 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24


def self_candidates(features: NDArray[Any], squares: NDArray[np.float64], k: int) -> Candidates:
    """Candidates for the k nearest rows of every row, itself included, on the CPU."""
    dtype = product_dtype(features.shape[1])
    mean = mean_of_some(features, squares)
    rows = prepare(features, squares, mean, dtype)
    buffers = Buffers(len(features), k, bound_errors(rows, rows, rounding_of(dtype)), rounding_of(dtype))

    blocks = -(-len(features) // TILE)

    def along_rows(block: int) -> _Tile:
        tile = tile_of(rows, rows, block * TILE, (block + distance) * TILE)
        buffers.scan(tile, True, rows.offset)
        return tile

    def along_columns(tile: int) -> None:
        buffers.scan(tiles[tile], False, rows.offset)

    with Workers() as workers, counting(pairs_within(len(features)), LABEL, UNIT) as count:
        # Along a diagonal of tiles all rows differ, and so do all columns: no two threads feed one buffer.
        for distance in range(blocks):
            for first in range(0, blocks - distance, workers.count):
                tiles = workers.each(along_rows, range(first, min(first + workers.count, blocks - distance)))
                if distance:
                    workers.each(along_columns, range(len(tiles)))
                count(sum(tile.pairs for tile in tiles))
    return buffers.finish(constants_of(rows, rows, mean))


def query_candidates(
    queries: NDArray[Any], query_squares: NDArray[np.float64],
    features: NDArray[Any], squares: NDArray[np.float64], k: int, dtype: torch.dtype | None = None,
) -> Candidates:  # fmt: skip
    """Candidates for the k nearest rows of `features` (N, D) to every query (Q, D), on the CPU."""
    dtype = dtype or product_dtype(features.shape[1])
    mean = mean_of_some(features, squares)
    others = prepare(features, squares, mean, dtype)
    rows = prepare(queries, query_squares, mean, dtype)
    buffers = Buffers(len(queries), k, bound_errors(rows, others, rounding_of(dtype)), rounding_of(dtype))

    def strip(row: int) -> int:
        for column in range(0, len(features), TILE):
            tile = tile_of(rows, others, row, column)
            buffers.scan(tile, True, others.offset)
        return len(tile.scores) * len(features)

    with Workers() as workers, counting(len(queries) * len(features), LABEL, UNIT) as count:
        for pairs in workers.results(strip, range(0, len(queries), TILE)):
            count(pairs)
    return buffers.finish(constants_of(rows, others, mean))
