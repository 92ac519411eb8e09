"""Skin with a face, painted in MakeHuman's texture coordinates, and the colour of hair."""

from __future__ import annotations

import numpy as np

from dmx.synth.body import Phenotype
from dmx.synth.colors import root
from dmx.synth.noise import texture_noise
from dmx.synth.types import Floats

SKIN_TONES = (
    (0.93, 0.76, 0.65),
    (0.87, 0.68, 0.55),
    (0.78, 0.58, 0.44),
    (0.66, 0.46, 0.33),
    (0.50, 0.33, 0.23),
    (0.36, 0.23, 0.16),
    (0.26, 0.17, 0.12),
)
HAIR_TONES = (
    (0.06, 0.05, 0.05),
    (0.10, 0.07, 0.05),
    (0.20, 0.12, 0.07),
    (0.33, 0.21, 0.12),
    (0.55, 0.40, 0.22),
    (0.50, 0.24, 0.12),
    (0.60, 0.60, 0.60),
    (0.80, 0.78, 0.74),
)

# Places on MakeHuman's texture, in pixels of its 1024-pixel layout (which is stored upside down).
LAYOUT_PX = 1024
EYE_ROWS_PX = (494, 566)


def skin_tone(rng: np.random.Generator, phenotype: Phenotype) -> Floats:
    """An sRGB skin colour."""
    african, asian, caucasian = phenotype.origin
    mean = 5.2 * african + 1.6 * asian + 0.7 * caucasian
    tone = SKIN_TONES[int(np.clip(round(rng.normal(mean, 0.7)), 0, len(SKIN_TONES) - 1))]
    return np.array(tone, np.float32) * np.float32(rng.uniform(0.94, 1.05))


def hair_tone(rng: np.random.Generator, phenotype: Phenotype) -> Floats:
    """An sRGB hair colour: dark mostly, fair or red with some origins, grey with age."""
    caucasian = phenotype.origin[2]
    fair, red = 1.2 * caucasian + 0.1, 0.6 * caucasian + 0.05
    grey = 1.0 if phenotype.age > 0.8 else 0.1
    white = 0.7 if phenotype.age > 0.85 else 0.05
    weights = np.array([5, 5, 3, 2, fair, red, grey, white])
    return np.array(HAIR_TONES[rng.choice(len(HAIR_TONES), p=weights / weights.sum())], np.float32)


def _blob(
    texture: Floats,
    center_px: tuple[float, float],
    radius_px: tuple[float, float],
    color: Floats,
    strength: float,
) -> None:
    """Blend a soft ellipse into the texture, in place; places in layout pixels."""
    size = len(texture)
    scale = size / LAYOUT_PX
    (x, y), (rx, ry) = center_px, radius_px
    columns = slice(int((x - rx) * scale), int((x + rx) * scale) + 2)
    rows = slice(int(size - (y + ry) * scale), int(size - (y - ry) * scale) + 2)
    at_x = (np.arange(size, dtype=np.float32)[columns] + 0.5) / scale
    at_y = LAYOUT_PX - (np.arange(size, dtype=np.float32)[rows] + 0.5) / scale
    distance = ((at_x[None, :] - x) / rx) ** 2 + ((at_y[:, None] - y) / ry) ** 2
    share = np.clip(1.6 - 1.6 * distance, 0, 1)[..., None] * strength
    texture[rows, columns] += (color - texture[rows, columns]) * share


def paint_skin(
    rng: np.random.Generator, size: int, skin: Floats, hair: Floats, *, female: bool, beard: bool
) -> Floats:
    """Roots of linear light (size, size, 3) of skin with eyes, brows, lips and perhaps a beard."""
    shade = 0.95 + 0.1 * texture_noise(rng, size, 12, 3)
    texture = np.asarray(root(skin) * shade[..., None], np.float32)
    for row in EYE_ROWS_PX:
        _blob(texture, (857, row), (16, 22), root(skin * 0.55), 0.7)
        _blob(texture, (834, row), (9, 26), root(hair * 0.8 + skin * 0.1), 0.9)
        _blob(texture, (860, row), (7, 14), root((0.1, 0.08, 0.08)), 0.9)
    lips = (
        np.array([0.65, 0.25, 0.25], np.float32) if female else skin * np.array([0.85, 0.6, 0.6], np.float32)
    )
    _blob(texture, (931, 528), (13, 24), root(lips), 0.8)
    if beard:
        _blob(texture, (965, 528), (45, 80), root(hair * 0.8 + skin * 0.2), 0.75)
        _blob(texture, (912, 528), (9, 26), root(hair), 0.6)
    return texture
