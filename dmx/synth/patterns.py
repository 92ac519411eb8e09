"""Cloth patterns: square textures in which u runs around the body and v upwards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dmx.synth.colors import root
from dmx.synth.noise import texture_noise
from dmx.synth.types import Doubles, Floats

Index = NDArray[np.intp]
Colors = tuple[Floats, Floats, Floats]


class Cloth:
    """A patch of cloth to be covered: coordinates in metres and the measures of one pattern."""

    def __init__(self, rng: np.random.Generator, size: int, width_m: float, height_m: float) -> None:
        self.rng = rng
        self.size = size
        self.x = ((np.arange(size, dtype=np.float32) + 0.5) / size * width_m)[None, :]
        self.y = ((np.arange(size, dtype=np.float32) + 0.5) / size * height_m)[:, None]
        self.height_m = height_m
        self.aspect = height_m / width_m
        self.width_m = width_m
        self.period_m = rng.uniform(0.035, 0.13)
        self.duty = rng.uniform(0.25, 0.6)
        self.phase = rng.random()

    def stripe(self, along: Floats | Doubles) -> NDArray[np.bool_]:
        """Whether a coordinate in metres lies on a stripe."""
        return np.asarray((along / self.period_m + self.phase) % 1 < self.duty)

    def noise(self, cell_m: float, octaves: int) -> Floats:
        """Noise with cells of about that size."""
        cells = max(2, round(self.width_m / cell_m))
        return texture_noise(self.rng, self.size, cells, octaves, aspect=self.aspect)


def _horizontal(cloth: Cloth) -> Index:
    return np.broadcast_to(cloth.stripe(cloth.y), (cloth.size, cloth.size)).astype(np.intp)


def _vertical(cloth: Cloth) -> Index:
    return np.broadcast_to(cloth.stripe(cloth.x), (cloth.size, cloth.size)).astype(np.intp)


def _check(cloth: Cloth) -> Index:
    return np.asarray((cloth.x // cloth.period_m + cloth.y // cloth.period_m) % 2, np.intp)


def _dots(cloth: Cloth) -> Index:
    pitch = cloth.period_m * 1.2
    x = (cloth.x + (np.floor(cloth.y / pitch) % 2) * pitch / 2) % pitch - pitch / 2
    y = cloth.y % pitch - pitch / 2
    return np.asarray(x**2 + y**2 < (pitch * cloth.rng.uniform(0.2, 0.36)) ** 2, np.intp)


def _camouflage(cloth: Cloth) -> Index:
    field = cloth.noise(0.16, 3)
    return np.asarray(np.digitize(field, np.quantile(field, [0.4, 0.72])), np.intp)


def _floral(cloth: Cloth) -> Index:
    field = cloth.noise(0.07, 2)
    low, high = np.quantile(field, [0.12, 0.8])
    return np.where(field > high, 1, np.where(field < low, 2, 0)).astype(np.intp)


def _block(cloth: Cloth) -> Index:
    edge = cloth.rng.uniform(0.57, 0.75)
    if cloth.rng.random() < 0.7:
        band = cloth.y > edge
    else:
        band = np.abs(cloth.y - edge) < cloth.rng.uniform(0.04, 0.1)
    return np.broadcast_to(band, (cloth.size, cloth.size)).astype(np.intp)


def _chevron(cloth: Cloth) -> Index:
    zigzag = 0.12 * np.abs((cloth.x / 0.12) % 1 - 0.5)
    return np.asarray(cloth.stripe(cloth.y + zigzag), np.intp)


_INDEXED: dict[str, Callable[[Cloth], Index]] = {
    "horizontal stripes": _horizontal,
    "vertical stripes": _vertical,
    "check": _check,
    "dots": _dots,
    "camouflage": _camouflage,
    "floral": _floral,
    "block": _block,
    "chevron": _chevron,
}

PATTERNS = (*_INDEXED, "plaid", "gradient")


def _plaid(cloth: Cloth, first: Floats, second: Floats, third: Floats) -> Floats:
    texture = np.empty((cloth.size, cloth.size, 3), np.float32)
    texture[:] = first
    for along in (cloth.x, cloth.y):
        wide = np.broadcast_to(cloth.stripe(along), (cloth.size, cloth.size))
        texture[wide] = 0.5 * texture[wide] + 0.5 * second
    for along in (cloth.x, cloth.y):
        thin = (along / cloth.period_m + cloth.phase + 0.75) % 1 < 0.1
        texture[np.broadcast_to(thin, (cloth.size, cloth.size))] = third
    return texture


def pattern(
    kind: str, colors: Colors, seed: int, size: int, width_m: float = 1.0, height_m: float = 1.0
) -> Floats:
    """Paint a cloth.

    Args:
        kind: one of `PATTERNS`, `denim` or `solid`.
        colors: three sRGB colours.
        seed: the same seed gives the same pattern, also on another width: sleeves match their shirt.
        size: pixels a side.
        width_m: metres that the texture spans around the body; `height_m`: upwards.

    Returns:
        (size, size, 3) roots of linear light.
    """
    cloth = Cloth(np.random.default_rng([seed, 1]), size, width_m, height_m)
    first, second, third = (root(color) for color in colors)
    if kind in _INDEXED:
        return np.stack([first, second, third])[_INDEXED[kind](cloth)]
    if kind == "plaid":
        return _plaid(cloth, first, second, third)
    if kind == "gradient":
        share = np.clip((cloth.y / cloth.height_m - 0.2) / 0.6, 0, 1)[..., None]
        return np.broadcast_to(first + (second - first) * share, (size, size, 3)).astype(np.float32)
    if kind == "denim":
        return first * (0.8 + 0.4 * texture_noise(cloth.rng, size, 60, 2, aspect=0.3))[..., None]
    return np.broadcast_to(first, (size, size, 3)).astype(np.float32)
