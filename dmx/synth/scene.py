"""Background plates: what a camera sees when nobody is there.

A camera has several plates, as if it turned between a few positions, so that a background does not give the
camera away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from dmx.synth.camera import HEIGHT_PX, LEFT, STEP, TOP, WIDTH_PX, Camera
from dmx.synth.clutter import add_clutter
from dmx.synth.colors import hsv, linear
from dmx.synth.noise import surface_noise
from dmx.synth.types import Doubles, Floats, Mask, stream


@dataclass(frozen=True)
class Plate:
    """A background.

    Attributes:
        image: roots of linear light divided by `peak`, 8 bits.
        peak: linear light of white.
        exposure: factor that brings the view to the camera's mean brightness.
    """

    image: Image.Image
    peak: float
    exposure: float


@dataclass(frozen=True)
class _View:
    """Coordinates in metres of what every pixel sees: a point of the ground or of the wall behind it."""

    ground: Mask
    ground_x: Doubles
    ground_y: Doubles
    wall_x: Doubles
    wall_z: Doubles


def make_plate(camera: Camera, number: int) -> Plate:
    """The `number`-th background of a camera."""
    rng = stream("plate", camera.seed, camera.style.number, camera.number, number)
    lighting, light = camera.style.lighting, camera.light
    wall_y = camera.distance_m[1] + rng.uniform(1, 12)
    wall_height = 8.0 if lighting.indoor else rng.uniform(3, 12)
    view = _look(camera, wall_y)
    upward = max(float(light.direction[2]), 0.0)
    facing = max(float(-light.direction[1]), 0.0)
    ground = _paint_ground(rng, camera, view) * (0.9 * (light.sky + light.key * upward)).astype(np.float32)
    wall_light = (0.75 * light.sky + 0.8 * facing * light.key).astype(np.float32)
    wall = _paint_wall(rng, view, wall_light, lit=rng.random() < lighting.lit_windows)
    image = np.where(view.ground[..., None], ground, wall)
    if not lighting.indoor:
        image[~view.ground & (view.wall_z > wall_height)] = light.sky * np.array([0.94, 1.05, 1.21])
    add_clutter(image, rng, camera, wall_y)
    return _develop(rng, camera, image.astype(np.float32))


def _develop(rng: np.random.Generator, camera: Camera, image: Floats) -> Plate:
    light = camera.light
    brightness = 0.6 * float(np.clip(image, 0, 3).mean(dtype=np.float64))
    brightness += 0.16 * float(light.sky.mean() + 0.6 * light.key.mean())
    peak = float(min(image.max(), 3.0))
    roots = np.sqrt(np.clip(image / peak, 0, 1)) * 255
    blurred = Image.fromarray(roots.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6)))
    return Plate(blurred, peak, camera.response.exposure / brightness)


def _look(camera: Camera, wall_y: float) -> _View:
    x, y = np.meshgrid(
        LEFT + (np.arange(WIDTH_PX) + 0.5) * STEP, TOP + (np.arange(HEIGHT_PX) + 0.5) * STEP, indexing="xy"
    )
    ray = camera.rays(x, y)
    to_wall = wall_y / np.maximum(ray[..., 1], 1e-3)
    to_ground = camera.height_m / np.maximum(-ray[..., 2], 1e-6)
    ground = to_ground < to_wall
    reach = np.minimum(to_ground, to_wall)
    return _View(
        ground=ground,
        ground_x=ray[..., 0] * reach,
        ground_y=ray[..., 1] * reach,
        wall_x=ray[..., 0] * to_wall,
        wall_z=camera.height_m + ray[..., 2] * to_wall,
    )


def _grid_lines(a: Doubles, b: Doubles, pitch: float, share: float) -> Mask:
    return np.asarray(((a / pitch) % 1 < share) | ((b / pitch) % 1 < share))


def _muted(rng: np.random.Generator, low: float, high: float) -> Floats:
    return linear(hsv(rng.random(), rng.uniform(0, 0.2), rng.uniform(low, high)))


def _paint_ground(rng: np.random.Generator, camera: Camera, view: _View) -> Floats:
    """Reflectance (H, W, 3) of asphalt, tiles, pavers, grass or carpet, and perhaps a second surface."""
    x, y = view.ground_x, view.ground_y
    texture = 0.7 + 0.4 * surface_noise(rng, x, y, 0.9) + 0.25 * surface_noise(rng, x, y, 0.13)
    color = _muted(rng, 0.25, 0.7) * texture[..., None]
    kinds = ("asphalt", "tiles", "pavers", "grass", "carpet")
    shares = (0, 0.55, 0.15, 0, 0.3) if camera.style.lighting.indoor else (0.35, 0.3, 0.25, 0.1, 0)
    kind = kinds[rng.choice(5, p=shares)]
    if kind in ("tiles", "pavers"):
        pitch = rng.uniform(0.3, 1.2)
        color[_grid_lines(x, y, pitch, 0.04)] *= rng.uniform(0.4, 0.75)
        if rng.random() < 0.4:
            color[(np.floor(x / pitch) + np.floor(y / pitch)) % 2 == 0] *= rng.uniform(0.55, 0.85)
    elif kind == "asphalt" and rng.random() < 0.6:
        angle = rng.uniform(0, math.pi)
        across = x * math.cos(angle) + y * math.sin(angle)
        marking = np.abs((across / rng.uniform(0.9, 3.5)) % 1 - 0.5) < rng.uniform(0.03, 0.16)
        color[marking] = linear((0.8, 0.8, 0.75))
    elif kind == "grass":
        meadow = x * rng.uniform(-1, 1) + y > rng.uniform(5, 9)
        blades = 0.5 + surface_noise(rng, x, y, 0.08)
        color = np.where(meadow[..., None], linear((0.25, 0.38, 0.16)) * blades[..., None], color)
    if rng.random() < 0.7:
        _lay_second_surface(rng, camera, view, color)
    return color


def _lay_second_surface(rng: np.random.Generator, camera: Camera, view: _View, color: Floats) -> None:
    """A pavement, lawn or lane beyond an edge with a kerb; in place."""
    x, y = view.ground_x, view.ground_y
    if rng.random() < 0.35:
        beyond = x - rng.uniform(-2, 2)
    else:
        slant = rng.uniform(-0.5, 0.5)
        middle = 0.5 * (camera.distance_m[0] + camera.distance_m[1])
        beyond = x * math.sin(slant) + y * math.cos(slant) - rng.uniform(0.5, 1.1) * middle
    texture = 0.6 + 0.5 * surface_noise(rng, x, y, 0.5) + 0.3 * surface_noise(rng, x, y, 0.1)
    if rng.random() < 0.5:
        texture[_grid_lines(x, y, rng.uniform(0.2, 0.6), 0.06)] *= 0.6
    there = beyond > 0
    color[there] = (_muted(rng, 0.2, 0.75) * texture[..., None])[there]
    color[np.abs(beyond) < 0.09] = linear((0.7, 0.7, 0.68))


def _paint_wall(rng: np.random.Generator, view: _View, light: Floats, *, lit: bool) -> Floats:
    """Light (H, W, 3) from a wall with windows, bricks, panels or shop fronts; `lit` from within."""
    x, z = view.wall_x, view.wall_z
    wall = _muted(rng, 0.25, 0.7) * (0.8 + 0.3 * surface_noise(rng, x, z, 0.6))[..., None] * light
    kind = rng.integers(4)
    glow = np.array([1.5, 1.05, 0.55], np.float32) * np.float32(rng.uniform(0.25, 0.8))
    if kind == 0:
        window = ((x / rng.uniform(1.5, 3)) % 1 < 0.55) & ((z / rng.uniform(2, 3.2)) % 1 > 0.4)
        depth = (0.3 + 0.8 * surface_noise(rng, x, z, 1.5))[..., None]
        glass = glow * depth if lit else _muted(rng, 0.25, 0.7) * depth * light
        wall = np.where(window[..., None], glass, wall)
    elif kind == 1:
        course = np.floor(z / 0.09)
        mortar = ((z / 0.09) % 1 < 0.12) | (((x + (course % 2) * 0.12) / 0.24) % 1 < 0.06)
        wall[mortar] *= 0.6
    elif kind == 2:
        wall[(x / rng.uniform(0.8, 2.5)) % 1 < 0.06] *= 0.4
    else:
        goods = (0.2 + 1.3 * surface_noise(rng, x, z, 0.5) * surface_noise(rng, x, z, 2.0))[..., None]
        window = goods * (glow if lit else _muted(rng, 0.25, 0.7) * light)
        wall = np.where((z < 2.6)[..., None], window, wall)
        sign = linear(hsv(rng.random(), rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.8)))
        wall[(z > 2.6) & (z < 3.3)] = sign * (glow if lit else light)
        wall[((x / 2.2) % 1 < 0.05) & (z < 2.6)] = 0.05 * light
    return np.asarray(wall, np.float32)
