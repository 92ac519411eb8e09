"""Cameras: where they hang, the light around them, and how their sensor renders it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dmx.synth.styles import Lighting, Range, Style
from dmx.synth.types import Doubles, stream

# The part of the image plane (focal length 1) that a background plate covers, and the plate's size.
WIDTH_PX, HEIGHT_PX = 840, 640
LEFT, TOP = -0.7, -0.6
STEP = 1.4 / WIDTH_PX

# People stand this far from the image's middle axis at most, as a share of their distance.
LATERAL_SHARE = 0.38


@dataclass(frozen=True)
class Light:
    """Direction to the key light (3,) and the strengths (3,) of key light, sky and ground, linear RGB."""

    direction: Doubles
    key: Doubles
    sky: Doubles
    ground: Doubles


@dataclass(frozen=True)
class Response:
    """How a camera turns light into pixels; blurs in pixels of its native image."""

    white_balance: Doubles
    exposure: float
    gamma: float
    contrast: float
    brightness: float
    saturation: float
    noise: float
    blur_px: float
    motion_px: float
    jpeg_quality: Range


@dataclass(frozen=True)
class Camera:
    """One camera of a style.

    Attributes:
        seed, style, number: its key.
        height_m: above the ground; it stands at (0, 0, height) and looks along +Y, downwards.
        rotation: (3, 3) rows right, up and forward.
        distance_m: nearest and farthest that people walk.
        focal_px: focal length in pixels of the native image.
        walking: direction in which people mostly walk, radians.
    """

    seed: int
    style: Style
    number: int
    height_m: float
    rotation: Doubles
    distance_m: Range
    focal_px: float
    walking: float
    light: Light
    response: Response

    def rays(self, x: Doubles, y: Doubles) -> Doubles:
        """World directions (..., 3) of image plane points (focal length 1, y down)."""
        right, up, forward = self.rotation
        return np.asarray(x[..., None] * right - y[..., None] * up + forward)

    def image_point(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Image plane x and y of a world point in metres."""
        offset = np.array([x, y, z - self.height_m])
        right, up, forward = (self.rotation * offset).sum(axis=1)
        return float(right / forward), float(-up / forward)


def make_camera(seed: int, style: Style, number: int) -> Camera:
    """The camera of a key."""
    rng = stream("camera", seed, style.number, number)
    optics = style.optics
    height = rng.uniform(*optics.height_m)
    nearest, farthest = max(optics.distance_m[0], height * 1.1), optics.distance_m[1]
    pitch = math.atan2(height - 0.9, 0.5 * (nearest + farthest))
    cosine, sine = math.cos(pitch), math.sin(pitch)
    return Camera(
        seed=seed,
        style=style,
        number=number,
        height_m=height,
        rotation=np.array([[1.0, 0.0, 0.0], [0.0, sine, cosine], [0.0, cosine, -sine]]),
        distance_m=(nearest, farthest),
        focal_px=rng.uniform(*optics.focal_px),
        walking=rng.uniform(0, 2 * math.pi),
        light=_draw_light(rng, style.lighting),
        response=_draw_response(rng, style),
    )


def _draw_light(rng: np.random.Generator, lighting: Lighting) -> Light:
    elevation = math.radians(rng.uniform(*lighting.key_elevation_deg))
    azimuth = rng.uniform(0, 2 * math.pi)
    direction = np.array(
        [
            math.cos(azimuth) * math.cos(elevation),
            math.sin(azimuth) * math.cos(elevation),
            math.sin(elevation),
        ]
    )
    warmth, cool = rng.uniform(*lighting.key_warmth), rng.uniform(*lighting.ambient_coolness)
    green = rng.normal(0, 0.02)
    key = rng.uniform(*lighting.key) * np.array([1 + warmth, 1 + green, 1 - warmth * 1.3])
    sky = rng.uniform(*lighting.ambient) * np.array([1 - cool, 1 + green, 1 + cool])
    return Light(direction=direction, key=key, sky=sky, ground=sky * rng.uniform(0.35, 0.6))


def _draw_response(rng: np.random.Generator, style: Style) -> Response:
    sensor = style.sensor
    balance = np.array([rng.uniform(0.9, 1.12), 1.0, rng.uniform(0.88, 1.12)])
    return Response(
        white_balance=balance * np.array(sensor.tint),
        exposure=rng.uniform(*sensor.exposure),
        gamma=rng.uniform(*sensor.gamma),
        contrast=rng.uniform(0.85, 1.15),
        brightness=rng.uniform(-0.04, 0.04),
        saturation=rng.uniform(*sensor.saturation),
        noise=rng.uniform(*sensor.noise),
        blur_px=rng.uniform(*sensor.blur_px),
        motion_px=rng.uniform(*sensor.motion_px),
        jpeg_quality=sensor.jpeg_quality,
    )
