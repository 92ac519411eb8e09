"""Colours. Pictures are computed in linear light; textures and plates are stored as its square root.

The square root spends 8 bits where the eye needs them, and multiplying by a shade stays a multiplication.
"""

from __future__ import annotations

import colorsys

import numpy as np

from dmx.synth.styles import NEUTRALS, Wardrobe
from dmx.synth.types import Bytes, Floats


def linear(srgb: Floats | tuple[float, float, float]) -> Floats:
    """Linear light of an sRGB colour in [0, 1] (gamma 2.2)."""
    return np.asarray(np.asarray(srgb, np.float32) ** np.float32(2.2), np.float32)


def root(srgb: Floats | tuple[float, float, float]) -> Floats:
    """Square root of the linear light of an sRGB colour in [0, 1]."""
    return np.asarray(np.asarray(srgb, np.float32) ** np.float32(1.1), np.float32)


def to_bytes(roots: Floats) -> Bytes:
    """Square roots of linear light in [0, 1] as bytes."""
    return np.asarray(np.clip(roots * 255 + 0.5, 0, 255), np.uint8)


def hsv(hue: float, saturation: float, value: float) -> Floats:
    """An sRGB colour from hue, saturation and value in [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def cloth_color(rng: np.random.Generator, wardrobe: Wardrobe, neutral: float | None = None) -> Floats:
    """An sRGB colour that cloth of this wardrobe has; `neutral` overrides the share of neutral colours."""
    if rng.random() < (wardrobe.neutral if neutral is None else neutral):
        weights = np.array(wardrobe.neutral_weights)
        base = np.array(NEUTRALS[rng.choice(len(NEUTRALS), p=weights / weights.sum())])
        return np.clip(base * rng.uniform(0.8, 1.25) + rng.normal(0, 0.015, 3), 0.02, 0.95).astype(np.float32)
    return hsv(rng.random(), rng.uniform(*wardrobe.saturation), rng.uniform(*wardrobe.value))
