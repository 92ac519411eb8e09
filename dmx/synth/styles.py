"""The styles: what people wear, how a place is lit and what its cameras do to a picture.

A style is a domain. Its cameras differ from each other as cameras of one site do; styles differ as sites do.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmx.errors import DmxError

Range = tuple[float, float]

# sRGB; the order that `Wardrobe.neutral_weights` refers to: black, coal, charcoal, grey, light grey, pale,
# white, navy, denim blue, beige, brown, olive, burgundy.
NEUTRALS: tuple[tuple[float, float, float], ...] = (
    (0.05, 0.05, 0.06),
    (0.10, 0.10, 0.11),
    (0.18, 0.18, 0.20),
    (0.35, 0.35, 0.36),
    (0.55, 0.55, 0.55),
    (0.80, 0.80, 0.80),
    (0.92, 0.92, 0.90),
    (0.10, 0.13, 0.25),
    (0.16, 0.20, 0.36),
    (0.62, 0.55, 0.42),
    (0.42, 0.33, 0.22),
    (0.30, 0.30, 0.20),
    (0.40, 0.10, 0.13),
)


@dataclass(frozen=True)
class Wardrobe:
    """Shares (0 to 1) of people who wear something; colours as ranges of HSV saturation and value."""

    neutral: float
    neutral_weights: tuple[float, ...]
    saturation: Range
    value: Range
    patterned: float
    short_sleeves: float
    shorts: float
    skirts: float
    coats: float
    bags: float
    bag_weights: tuple[float, float, float]
    hats: float
    scarves: float


@dataclass(frozen=True)
class Lighting:
    """Light of a place.

    Strengths are relative, the key light's elevation is in degrees, warmth is red minus blue, and
    `lit_windows` is the share of walls whose windows glow.
    """

    indoor: bool
    key: Range
    key_elevation_deg: Range
    key_warmth: Range
    ambient: Range
    ambient_coolness: Range
    lit_windows: float


@dataclass(frozen=True)
class Optics:
    """Where cameras hang and what they see: metres, and the focal length in pixels of the native image."""

    height_m: Range
    distance_m: Range
    focal_px: Range


@dataclass(frozen=True)
class Sensor:
    """What cameras do to a picture. Blurs in pixels of the native image; JPEG quality 1 to 95."""

    noise: Range
    blur_px: Range
    motion_px: Range
    jpeg_quality: Range
    gamma: Range
    exposure: Range
    saturation: Range
    tint: tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """One domain; `number` is part of every key and the scene number in file names."""

    name: str
    number: int
    caption: str
    wardrobe: Wardrobe
    lighting: Lighting
    optics: Optics
    sensor: Sensor
    occlusion: float
    plates: int = 3


STREET = Style(
    name="street",
    number=0,
    caption="street: a summer day outdoors, hard sun, sharp cameras",
    wardrobe=Wardrobe(
        neutral=0.55,
        neutral_weights=(2, 1.5, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1),
        saturation=(0.3, 0.85),
        value=(0.3, 0.95),
        patterned=0.45,
        short_sleeves=0.5,
        shorts=0.25,
        skirts=0.3,
        coats=0.12,
        bags=0.45,
        bag_weights=(0.45, 0.35, 0.2),
        hats=0.15,
        scarves=0.1,
    ),
    lighting=Lighting(
        indoor=False,
        key=(0.9, 2.2),
        key_elevation_deg=(25, 70),
        key_warmth=(-0.06, 0.10),
        ambient=(0.45, 0.8),
        ambient_coolness=(0.0, 0.12),
        lit_windows=0.0,
    ),
    optics=Optics(height_m=(2.2, 5.0), distance_m=(4.5, 13.0), focal_px=(700, 1500)),
    sensor=Sensor(
        noise=(0.004, 0.02),
        blur_px=(0.0, 0.7),
        motion_px=(0.0, 0.0),
        jpeg_quality=(55, 95),
        gamma=(0.9, 1.15),
        exposure=(0.3, 0.52),
        saturation=(0.65, 1.15),
        tint=(1.0, 1.0, 1.0),
    ),
    occlusion=0.15,
)

MALL = Style(
    name="mall",
    number=1,
    caption="mall: winter clothes indoors, warm flat light, poor cameras seen from above",
    wardrobe=Wardrobe(
        neutral=0.8,
        neutral_weights=(6, 6, 4, 2, 4, 1, 1, 4, 2, 2, 1, 1.5, 1),
        saturation=(0.2, 0.7),
        value=(0.2, 0.7),
        patterned=0.25,
        short_sleeves=0.12,
        shorts=0.04,
        skirts=0.15,
        coats=0.4,
        bags=0.55,
        bag_weights=(0.35, 0.35, 0.3),
        hats=0.12,
        scarves=0.16,
    ),
    lighting=Lighting(
        indoor=True,
        key=(0.1, 0.6),
        key_elevation_deg=(45, 80),
        key_warmth=(0.02, 0.28),
        ambient=(0.5, 0.95),
        ambient_coolness=(-0.17, -0.01),
        lit_windows=0.0,
    ),
    optics=Optics(height_m=(2.8, 6.5), distance_m=(4.0, 10.0), focal_px=(420, 900)),
    sensor=Sensor(
        noise=(0.012, 0.05),
        blur_px=(0.3, 1.3),
        motion_px=(0.0, 0.0),
        jpeg_quality=(25, 70),
        gamma=(0.8, 1.35),
        exposure=(0.3, 0.52),
        saturation=(0.65, 1.15),
        tint=(1.0, 1.0, 1.0),
    ),
    occlusion=0.25,
)

CAMPUS = Style(
    name="campus",
    number=2,
    caption="campus: dusk, a low orange sun against blue shade, long lenses at eye level",
    wardrobe=Wardrobe(
        neutral=0.5,
        neutral_weights=(2, 1, 2, 3, 2, 1, 1, 3, 3, 1, 0.5, 2, 2),
        saturation=(0.35, 0.9),
        value=(0.25, 0.85),
        patterned=0.35,
        short_sleeves=0.35,
        shorts=0.2,
        skirts=0.2,
        coats=0.15,
        bags=0.75,
        bag_weights=(0.7, 0.22, 0.08),
        hats=0.2,
        scarves=0.08,
    ),
    lighting=Lighting(
        indoor=False,
        key=(1.1, 2.6),
        key_elevation_deg=(9, 24),
        key_warmth=(0.18, 0.42),
        ambient=(0.28, 0.5),
        ambient_coolness=(0.14, 0.34),
        lit_windows=0.8,
    ),
    optics=Optics(height_m=(1.5, 2.6), distance_m=(7.0, 20.0), focal_px=(900, 2200)),
    sensor=Sensor(
        noise=(0.012, 0.035),
        blur_px=(0.0, 0.8),
        motion_px=(0.0, 4.0),
        jpeg_quality=(45, 85),
        gamma=(0.85, 1.12),
        exposure=(0.32, 0.55),
        saturation=(0.8, 1.25),
        tint=(0.97, 0.98, 1.06),
    ),
    occlusion=0.2,
)

STATION = Style(
    name="station",
    number=3,
    caption="station: an underground platform in autumn, greenish tubes overhead, wide lenses",
    wardrobe=Wardrobe(
        neutral=0.65,
        neutral_weights=(4, 3, 3, 2, 1, 1, 1, 3, 3, 2, 2, 2, 2),
        saturation=(0.25, 0.8),
        value=(0.2, 0.8),
        patterned=0.3,
        short_sleeves=0.2,
        shorts=0.06,
        skirts=0.2,
        coats=0.3,
        bags=0.65,
        bag_weights=(0.5, 0.25, 0.25),
        hats=0.18,
        scarves=0.14,
    ),
    lighting=Lighting(
        indoor=True,
        key=(0.3, 0.9),
        key_elevation_deg=(55, 85),
        key_warmth=(-0.1, 0.04),
        ambient=(0.35, 0.7),
        ambient_coolness=(0.0, 0.1),
        lit_windows=0.0,
    ),
    optics=Optics(height_m=(2.4, 3.8), distance_m=(3.5, 9.0), focal_px=(380, 800)),
    sensor=Sensor(
        noise=(0.01, 0.04),
        blur_px=(0.1, 1.0),
        motion_px=(0.0, 2.0),
        jpeg_quality=(30, 75),
        gamma=(0.85, 1.25),
        exposure=(0.26, 0.45),
        saturation=(0.55, 1.0),
        tint=(0.96, 1.04, 0.95),
    ),
    occlusion=0.25,
)

STYLES: dict[str, Style] = {style.name: style for style in (STREET, MALL, CAMPUS, STATION)}


def style_named(name: str) -> Style:
    """The style of that name.

    Raises:
        DmxError: when there is none.
    """
    if name not in STYLES:
        raise DmxError(f"unknown style {name!r}; choose one of {', '.join(STYLES)}")
    return STYLES[name]
