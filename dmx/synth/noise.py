"""Smooth noise for cloth, skin and scenes."""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import njit
from PIL import Image

from dmx.synth.types import Doubles, Floats


@functools.lru_cache(maxsize=64)
def _field(size: int, cells: int, octaves: int, gain: float, aspect: float) -> Floats:
    """A fixed (size, size) field in [0, 1] that tiles; shifting it is far cheaper than making another."""
    rng = np.random.default_rng([size, cells, octaves])
    total = np.zeros((size, size), np.float32)
    weight, weights = 1.0, 0.0
    for _ in range(octaves):
        rows, columns = max(2, int(cells * aspect)), max(2, cells)
        lattice = np.tile(rng.random((rows, columns), np.float32), (3, 3))
        smooth = Image.fromarray(lattice).resize((3 * size, 3 * size), Image.Resampling.BICUBIC)
        total += weight * np.asarray(smooth)[size : 2 * size, size : 2 * size]
        weights += weight
        weight *= gain
        cells *= 2
        if cells > size:
            break
    return np.asarray(total / weights, np.float32)


def texture_noise(
    rng: np.random.Generator, size: int, cells: int, octaves: int = 4, gain: float = 0.5, aspect: float = 1.0
) -> Floats:
    """Noise (size, size), mean about 0.5, `cells` lattice cells across, `aspect` times as many down."""
    field = _field(size, cells, octaves, gain, round(aspect, 2))
    rows = (np.arange(size) + rng.integers(size)) % size
    columns = (np.arange(size) + rng.integers(size)) % size
    if rng.random() < 0.5:
        columns = columns[::-1]
    return np.asarray(field[rows[:, None], columns[None, :]], np.float32)


def patch_noise(rng: np.random.Generator, rows: int, columns: int, cells: float) -> Floats:
    """Noise (rows, columns) in about [0, 1] with square cells, `cells` of them across."""
    lattice = rng.random((max(2, int(cells * rows / max(columns, 1)) + 2), int(cells) + 2), np.float32)
    return np.asarray(Image.fromarray(lattice).resize((columns, rows), Image.Resampling.BICUBIC))


@njit(cache=True)
def _value_noise(a: Doubles, b: Doubles, scale: float, lattice: Floats, out: Floats) -> None:
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            x, y = a[i, j] / scale, b[i, j] / scale
            column, row = math.floor(x), math.floor(y)
            fx, fy = x - column, y - row
            i0, j0 = int(row) & 63, int(column) & 63
            i1, j1 = (i0 + 1) & 63, (j0 + 1) & 63
            top = lattice[i0, j0] * (1 - fx) + lattice[i0, j1] * fx
            bottom = lattice[i1, j0] * (1 - fx) + lattice[i1, j1] * fx
            out[i, j] = top * (1 - fy) + bottom * fy


def surface_noise(rng: np.random.Generator, a: Doubles, b: Doubles, scale_m: float) -> Floats:
    """Noise in [0, 1] at surface coordinates a, b (H, W) in metres, with cells of `scale_m`."""
    out = np.empty(a.shape, np.float32)
    _value_noise(a, b, scale_m, rng.random((64, 64), np.float32), out)
    return out
