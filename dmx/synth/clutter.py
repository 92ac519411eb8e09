"""Things that stand about in a scene, drawn far to near as flat pictures: kiosks, cars, trees, posters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dmx.synth.camera import LEFT, STEP, TOP, Camera
from dmx.synth.colors import hsv, linear
from dmx.synth.noise import patch_noise
from dmx.synth.types import Floats, Mask

# A drawing of a thing: reflectance (rows, columns, 3) and which pixels it covers.
Picture = tuple[Floats, Mask]
Draw = Callable[[np.random.Generator, Floats], Picture]

OUTDOOR = {"box": 0.3, "car": 0.2, "tree": 0.25, "post": 0.15, "poster": 0.1}
INDOOR = {"box": 0.5, "car": 0.0, "tree": 0.1, "post": 0.1, "poster": 0.3}

MAX_PICTURE_PX = 1500


def _unit_grid(base: Floats) -> tuple[Floats, Floats]:
    """Rows and columns in [0, 1] of a picture."""
    rows, columns = base.shape[:2]
    down = (np.arange(rows, dtype=np.float32) + 0.5) / rows
    across = (np.arange(columns, dtype=np.float32) + 0.5) / columns
    return down[:, None], across[None, :]


def _random_color(rng: np.random.Generator, saturation: float, value: float) -> Floats:
    return linear(hsv(rng.random(), saturation, value))


def _draw_box(rng: np.random.Generator, base: Floats) -> Picture:
    down, across = _unit_grid(base)
    if rng.random() < 0.6:
        frame = ((across * rng.integers(2, 6)) % 1 < 0.12) | ((down * rng.integers(1, 5)) % 1 < 0.15)
        base[frame] = _random_color(rng, 0.5, 0.6)
    return base, np.ones(base.shape[:2], bool)


def _draw_post(rng: np.random.Generator, base: Floats) -> Picture:
    return base, np.ones(base.shape[:2], bool)


def _draw_poster(rng: np.random.Generator, base: Floats) -> Picture:
    base[patch_noise(rng, base.shape[0], base.shape[1], 5) > 0.55] = _random_color(rng, 0.7, 0.7)
    return base, np.ones(base.shape[:2], bool)


def _draw_car(rng: np.random.Generator, base: Floats) -> Picture:
    down, across = _unit_grid(base)
    cabin = (down < 0.42) & (np.abs(across - 0.5) < 0.3 - 0.1 * (0.42 - down))
    hull = np.broadcast_to((down >= 0.38) & (down < 0.85), base.shape[:2])
    wheels = ((np.abs(across - 0.2) < 0.09) | (np.abs(across - 0.8) < 0.09)) & (down > 0.72)
    base[cabin & (down > 0.06)] = 0.03
    base[hull & (down > 0.8)] = 0.05
    base[wheels] = 0.02
    return base, cabin | hull | wheels


def _draw_tree(rng: np.random.Generator, base: Floats) -> Picture:
    down, across = _unit_grid(base)
    rows, columns = base.shape[:2]
    ragged = 0.7 * (patch_noise(rng, rows, columns, 9) - 0.5)
    crown = ((across - 0.5) / 0.5) ** 2 + ((down - 0.35) / 0.36) ** 2 + ragged < 0.9
    trunk = (np.abs(across - 0.5) < 0.04) & (down > 0.5)
    green = linear(hsv(rng.uniform(0.2, 0.36), rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.5)))
    leaves = green * (0.3 + 1.4 * patch_noise(rng, rows, columns, 24))[..., None]
    picture = np.where(crown[..., None], leaves, linear((0.3, 0.22, 0.15)))
    return picture.astype(np.float32), crown | trunk


_DRAW: dict[str, Draw] = {
    "box": _draw_box,
    "car": _draw_car,
    "tree": _draw_tree,
    "post": _draw_post,
    "poster": _draw_poster,
}


def _size_m(rng: np.random.Generator, kind: str) -> tuple[float, float, float]:
    """Width, height and height of the lower edge above the ground."""
    if kind == "box":
        return rng.uniform(0.3, 2.2), rng.uniform(0.4, 2.4), 0.0
    if kind == "car":
        return rng.uniform(2.5, 4.4), 1.45, 0.0
    if kind == "tree":
        return rng.uniform(1.2, 3), rng.uniform(2.5, 5), 0.0
    if kind == "post":
        return rng.uniform(0.08, 0.3), rng.uniform(2.5, 6), 0.0
    return rng.uniform(0.5, 2), rng.uniform(0.5, 1.6), rng.uniform(0.8, 2)


def add_clutter(image: Floats, rng: np.random.Generator, camera: Camera, wall_y: float) -> None:
    """Draw a handful of things between the people and the wall into a plate's linear light, in place."""
    shares = INDOOR if camera.style.lighting.indoor else OUTDOOR
    kinds = tuple(shares)
    facing = max(float(-camera.light.direction[1]), 0.0)
    light = (0.6 * camera.light.sky + 0.5 * facing * camera.light.key).astype(np.float32)
    distances = sorted(rng.uniform(camera.distance_m[0] + 1, wall_y, rng.integers(6, 18)), reverse=True)
    for distance in distances:
        kind = kinds[rng.choice(len(kinds), p=list(shares.values()))]
        _add_thing(image, rng, camera, kind, wall_y if kind == "poster" else float(distance), light)


def _add_thing(
    image: Floats, rng: np.random.Generator, camera: Camera, kind: str, y_m: float, light: Floats
) -> None:
    x_m = rng.uniform(-0.75, 0.7) * y_m
    color = linear(hsv(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.08, 0.85)))
    width, height, lift = _size_m(rng, kind)
    left, bottom = camera.image_point(x_m, y_m, lift)
    right, top = camera.image_point(x_m + width, y_m, lift + height)
    rows, columns = int((bottom - TOP) / STEP) - int((top - TOP) / STEP), int((right - left) / STEP)
    row, column = int((top - TOP) / STEP), int((left - LEFT) / STEP)
    if not (4 <= rows <= MAX_PICTURE_PX and 2 <= columns <= MAX_PICTURE_PX):
        return
    shade = 0.75 + 0.5 * patch_noise(rng, rows, columns, rng.uniform(2, 14))
    shade = shade * np.linspace(1.15, 0.65, rows, dtype=np.float32)[:, None]
    picture, mask = _DRAW[kind](rng, color * shade[..., None])
    shown_rows = slice(max(row, 0), min(row + rows, image.shape[0]))
    shown_columns = slice(max(column, 0), min(column + columns, image.shape[1]))
    if shown_rows.start >= shown_rows.stop or shown_columns.start >= shown_columns.stop:
        return
    if kind != "poster" and shown_rows.stop == row + rows:
        # The thing stands on the ground: a little shade at its foot.
        image[shown_rows.stop - 1 : shown_rows.stop + max(1, rows // 16), shown_columns] *= 0.65
    part = (
        slice(shown_rows.start - row, shown_rows.stop - row),
        slice(shown_columns.start - column, shown_columns.stop - column),
    )
    covered = mask[part]
    image[shown_rows, shown_columns][covered] = (picture[part] * light)[covered]
