"""The look of a person: one texture a material, painted from the person's key."""

from __future__ import annotations

import numpy as np

from dmx.synth import garments
from dmx.synth.body import Phenotype
from dmx.synth.colors import cloth_color, root, to_bytes
from dmx.synth.face import hair_tone, paint_skin, skin_tone
from dmx.synth.garment_space import TRUNK_TEXTURE_SHIFT_M
from dmx.synth.noise import texture_noise
from dmx.synth.patterns import PATTERNS, Colors, pattern
from dmx.synth.styles import Wardrobe
from dmx.synth.types import Bytes, Floats
from dmx.synth.wardrobe import Outfit

# Strength of the highlight of each material, in the order of the material numbers.
GLOSS = np.array([0.05, 0.3, 0.015, 0.015, 0.01, 0.12, 0.015, 0.1, 0.06, 0.015], np.float32)

# Straps end at the hip, in metres of the trunk texture.
LOWEST_STRAP_M = 0.3

JEANS = ((0.13, 0.17, 0.30), (0.20, 0.27, 0.42), (0.07, 0.08, 0.10), (0.33, 0.40, 0.50))
TIGHTS = ((0.06, 0.06, 0.07), (0.25, 0.20, 0.20), (0.50, 0.40, 0.33))


class Painter:
    """Paints the textures of one person.

    Args:
        rng: the person's own random numbers.
        size: pixels a side of every texture.
        neck_z: height of the collar on the template, metres.
    """

    def __init__(
        self, rng: np.random.Generator, size: int, wardrobe: Wardrobe, outfit: Outfit, neck_z: float
    ) -> None:
        self.rng = rng
        self.size = size
        self.wardrobe = wardrobe
        self.outfit = outfit
        self.collar = neck_z + TRUNK_TEXTURE_SHIFT_M

    def paint(self, phenotype: Phenotype) -> Bytes:
        """All textures: (materials, size, size, 3) roots of linear light as bytes."""
        rng, outfit = self.rng, self.outfit
        textures = np.zeros((garments.MATERIALS, self.size, self.size, 3), np.uint8)
        skin, hair = skin_tone(rng, phenotype), hair_tone(rng, phenotype)
        beard = not outfit.female and rng.random() < 0.35
        face = paint_skin(rng, self.size, skin, hair, female=outfit.female, beard=beard)
        textures[garments.SKIN] = to_bytes(face)
        textures[garments.EYE] = to_bytes(root((0.35, 0.32, 0.30)))
        top, sleeve = self._top()
        textures[garments.TOP], textures[garments.SLEEVE] = to_bytes(top), to_bytes(sleeve)
        legs, skirt = self._lower()
        textures[garments.LEGS] = to_bytes(legs)
        if skirt is not None:
            textures[garments.SKIRT] = to_bytes(skirt)
        textures[garments.SHOE] = to_bytes(self._shoes())
        textures[garments.HAIR] = to_bytes(self._strands(hair) + 0.03)
        if outfit.headwear != "none":
            textures[garments.HEADWEAR] = to_bytes(self._headwear())
        if outfit.bag != "none":
            textures[garments.BAG] = to_bytes(self._bag())
        return textures

    def _color(self, neutral: float | None = None) -> Floats:
        return cloth_color(self.rng, self.wardrobe, neutral)

    def _colors(self) -> Colors:
        return self._color(), self._color(), self._color()

    def _wrinkles(self, strength: float, aspect: float) -> Floats:
        """Folds as a factor (size, size, 1) of the root of light."""
        folds = texture_noise(self.rng, self.size, 7, 4, 0.6, aspect)
        return np.asarray(np.sqrt(1 + 2 * strength * (folds - 0.5))[..., None], np.float32)

    def _top(self) -> tuple[Floats, Floats]:
        rng = self.rng
        colors, seed = self._colors(), int(rng.integers(1 << 30))
        kind = str(rng.choice(PATTERNS)) if rng.random() < self.wardrobe.patterned else "solid"
        if self.outfit.coat:
            kind = "solid" if rng.random() < 0.8 else "plaid"
        trunk = pattern(kind, colors, seed, self.size)
        sleeve = pattern(kind, colors, seed, self.size, width_m=0.38)
        if rng.random() < 0.15:
            sleeve = np.broadcast_to(root(colors[1]), sleeve.shape)
        trunk = np.array(trunk)
        self._decorate(trunk, colors)
        return trunk * self._wrinkles(0.16, 0.8), sleeve * self._wrinkles(0.2, 1.4)

    def _lower(self) -> tuple[Floats, Floats | None]:
        rng, outfit = self.rng, self.outfit
        colors = self._colors()
        skirt = outfit.lower == "skirt"
        if rng.random() < 0.4 and outfit.lower == "trousers":
            jeans = np.array(JEANS[rng.integers(len(JEANS))], np.float32) * np.float32(
                rng.uniform(0.85, 1.15)
            )
            colors = (jeans, colors[1], colors[2])
        if rng.random() < self.wardrobe.patterned * (0.9 if skirt else 0.35):
            kind = str(rng.choice(PATTERNS))
        else:
            kind = "denim" if rng.random() < 0.6 else "solid"
        seed = int(rng.integers(1 << 30))
        if skirt:
            tights = np.broadcast_to(root(TIGHTS[rng.integers(len(TIGHTS))]), (self.size, self.size, 3))
            cloth = pattern(kind, colors, seed, self.size, width_m=1.1)
            return tights * self._wrinkles(0.1, 1.2), cloth * self._wrinkles(0.16, 0.4)
        legs = np.array(pattern(kind, colors, seed, self.size, width_m=0.55))
        if rng.random() < 0.12:
            for left, right in ((0.22, 0.28), (0.72, 0.78)):
                legs[:, int(left * self.size) : int(right * self.size)] = root(colors[1])
        return legs * self._wrinkles(0.2, 1.2), None

    def _shoes(self) -> Floats:
        color = self._color(neutral=0.85)
        shoes = np.empty((self.size, self.size, 3), np.float32)
        shoes[:] = root(color)
        sole = root((0.85, 0.85, 0.83)) if self.rng.random() < 0.4 else root(color * 0.6)
        shoes[: int(0.06 * self.size)] = sole
        return shoes

    def _strands(self, color: Floats) -> Floats:
        strands = texture_noise(self.rng, self.size, 56, 3, 0.7, 0.1)
        return np.asarray(root(color) * np.sqrt(0.45 + 1.1 * strands)[..., None])

    def _headwear(self) -> Floats:
        texture = self._strands(self._color())
        if self.rng.random() < 0.3 and self.outfit.headwear != "scarf":
            texture[int(0.05 * self.size) :: max(2, int(0.12 * self.size))] = root(self._color())
        return texture

    def _bag(self) -> Floats:
        bag = root(self._color(neutral=0.6)) * self._wrinkles(0.2, 1.0)
        if self.rng.random() < 0.5:
            bag[int(0.3 * self.size) : int(0.45 * self.size)] = root(self._color())
        return np.asarray(bag, np.float32)

    def _decorate(self, trunk: Floats, colors: Colors) -> None:
        """An open front, a zip or a print in front, a print behind, the straps of a bag; in place."""
        rng = self.rng
        canvas = Canvas(trunk)
        kind = rng.random()
        opened = kind < (0.7 if self.outfit.coat else 0.14)
        if opened:
            half = rng.uniform(0.015, 0.06)
            canvas.rectangle(-half, half, 0, self.collar, self._color())
            if rng.random() < 0.5:
                canvas.rectangle(-0.008, 0.008, 0, self.collar - 0.05, colors[1])
        elif kind < 0.2:
            canvas.rectangle(-0.006, 0.006, 0, self.collar, colors[0] * 0.5)
        elif kind < 0.42:
            self._chest_print(canvas, colors)
        if rng.random() < 0.22:
            half, height = rng.uniform(0.06, 0.14), rng.uniform(0.06, 0.25)
            middle = self.collar - rng.uniform(0.14, 0.25)
            behind = (np.abs(np.abs(canvas.x) - 0.5) < half) & (np.abs(canvas.y - middle) < height / 2)
            trunk[behind] = root(self._color())
        self._straps(canvas)

    def _chest_print(self, canvas: Canvas, colors: Colors) -> None:
        rng = self.rng
        half, height = rng.uniform(0.05, 0.12), rng.uniform(0.05, 0.2)
        middle = self.collar - rng.uniform(0.16, 0.26)
        color = self._color() if rng.random() < 0.6 else np.clip(1 - colors[0], 0, 1)
        kind = rng.integers(4)
        if kind == 0:
            canvas.rectangle(-half, half, middle - height / 2, middle + height / 2, color)
        elif kind == 1:
            disc = (canvas.x / half) ** 2 + ((canvas.y - middle) / (half * 1.1)) ** 2 < 1
            canvas.texture[disc] = root(color)
        elif kind == 2:
            for line in range(3):
                top = middle - 0.045 * line
                left, right = half * rng.uniform(0.5, 1, 2)
                canvas.rectangle(-left, right, top, top + 0.025, color)
        else:
            speckled = texture_noise(rng, self.size, 60, 2) > 0.5
            inside = (np.abs(canvas.x) < half) & (np.abs(canvas.y - middle) < height / 2)
            canvas.texture[inside & speckled] = root(color)

    def _straps(self, canvas: Canvas) -> None:
        if self.outfit.bag not in ("backpack", "shoulder"):
            return
        color = self._color(neutral=0.6) * 0.7
        if self.outfit.bag == "backpack":
            for side in (-1, 1):
                left, right = sorted((side * 0.085, side * 0.125))
                canvas.rectangle(left, right, self.collar - 0.33, self.collar + 0.2, color)
            return
        lean = 2.3 if self.outfit.bag_left else -2.3
        behind = np.where(canvas.x > 0, 0.5 - canvas.x, -0.5 - canvas.x)
        slope = lean * np.where(np.abs(canvas.x) < 0.25, canvas.x, behind)
        strap = np.abs(canvas.y - (self.collar - 0.2) + slope) < 0.035
        canvas.texture[strap & (canvas.y > LOWEST_STRAP_M)] = root(color)


class Canvas:
    """A trunk texture to draw on: x from -0.5 to 0.5 around the body with 0 in front, y upwards in metres."""

    def __init__(self, texture: Floats) -> None:
        size = len(texture)
        self.texture = texture
        self.x = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None, :]
        self.y = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]

    def rectangle(self, left: float, right: float, bottom: float, top: float, color: Floats) -> None:
        """Fill a rectangle with an sRGB colour."""
        inside = (self.x > left) & (self.x < right) & (self.y > bottom) & (self.y < top)
        self.texture[inside] = root(color)
