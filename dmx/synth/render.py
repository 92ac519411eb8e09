"""From a key to a JPEG: the renderer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dmx.errors import DmxError
from dmx.synth import shading
from dmx.synth.body import load_body
from dmx.synth.camera import HEIGHT_PX, LEFT, STEP, TOP, WIDTH_PX, Camera, make_camera
from dmx.synth.cloth import GLOSS
from dmx.synth.colors import hsv, linear
from dmx.synth.effects import develop
from dmx.synth.gait import Stance, pose
from dmx.synth.identity import LABELLED, PASSER_BY, Identity, build_identity
from dmx.synth.raster import bounds, depth_map, project, rasterize, to_basis, vertex_normals
from dmx.synth.scene import Plate, make_plate
from dmx.synth.styles import Style, style_named
from dmx.synth.types import MAX_SEED, Doubles, Floats, stream
from dmx.synth.view import NEAREST_PASSER_BY_M, Framing, Obstacle, View, draw_view, turned

SAMPLES = 2  # a side of a pixel
SHADOW_MAP_PX = 160
MIN_HEIGHT, MAX_HEIGHT = 64, 1024
MAX_IDENTITY, MAX_CAMERA, MAX_INDEX = 999_999, 99, 999_999


@dataclass(frozen=True)
class Figure:
    """A posed person: world vertices (V, 3), their projection (V, 3), and where they stand (metres)."""

    person: Identity
    vertices: Floats
    points: Floats
    feet: tuple[float, float]


@dataclass(frozen=True)
class Window:
    """The part of the image plane that an image shows: corner, width and height."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Lamp:
    """This image's light: (4, 3) as `shade` takes it, and the axes (3, 3) of the key light's shadow map."""

    rows: Doubles
    basis: Doubles


@dataclass(frozen=True)
class Exposure:
    """A picture before the camera develops it.

    Attributes:
        image: (H, W, 3) linear light.
        coverage: (H, W) share of the pixel that the labelled person covers, obstacles not counted.
        exposure: factor on the light.
        native_height: pixels in which the camera records the crop.
    """

    image: Floats
    coverage: Floats
    exposure: float
    native_height: float


class Renderer:
    """Renders images of one style and size; an image depends on nothing but its key.

    Args:
        style: a style or its name.
        height: pixels; images are half as wide.
        seed: which world: another seed has other people, cameras and scenes.
        identities: how many people are kept ready.

    Raises:
        DmxError: for an unknown style, a height that is odd or out of bounds, a bad seed, or when the body
            data is not installed.
    """

    def __init__(self, style: Style | str, height: int = 256, seed: int = 0, identities: int = 8) -> None:
        self.style = style_named(style) if isinstance(style, str) else style
        if not MIN_HEIGHT <= height <= MAX_HEIGHT or height % 2:
            raise DmxError(f"height must be an even number from {MIN_HEIGHT} to {MAX_HEIGHT}, found {height}")
        _check_range("seed", seed, MAX_SEED)
        self.height, self.width, self.seed = height, height // 2, seed
        self.body = load_body()
        self.camera = functools.lru_cache(maxsize=128)(self._make_camera)
        self._identity = functools.lru_cache(maxsize=identities)(self._make_identity)
        self._passer_by = functools.lru_cache(maxsize=16)(self._make_passer_by)
        self._plate = functools.lru_cache(maxsize=64)(self._make_plate)

    def render(self, identity: int, camera: int, index: int) -> bytes:
        """One image as JPEG bytes, height x width pixels.

        Args:
            identity: which person, 0 to 999,999.
            camera: which camera, 0 to 99.
            index: which moment, 0 to 999,999.

        Raises:
            DmxError: when a number is out of range.
        """
        _check_range("identity", identity, MAX_IDENTITY)
        _check_range("camera", camera, MAX_CAMERA)
        _check_range("index", index, MAX_INDEX)
        rng = stream("view", self.seed, self.style.number, identity, camera, index)
        exposed = self.expose(identity, camera, rng)
        response = self.camera(camera).response
        return develop(exposed.image, response, exposed.exposure, exposed.native_height, rng)

    def expose(self, identity: int, camera_number: int, rng: np.random.Generator) -> Exposure:
        """The scene in linear light, before the camera's own effects."""
        camera = self.camera(camera_number)
        view = draw_view(rng, camera)
        person = self._identity(identity)
        figure = self._figure(camera, person, view.stance, view.heading, view.place_m)
        window = _frame(figure, view.framing)
        plate = self._plate(camera_number, view.plate)
        lamp = _light(camera, view)
        figures = [figure, *self._passers_by(camera, view, window)]
        figures.sort(key=lambda one: -one.feet[1])
        image = self._background(plate, window, view.brightness)
        layers = [self._draw(image, one, camera, window, lamp) for one in figures]
        for layer in layers:
            shading.lay_over(image, layer, float(SAMPLES**2))
        self._obstruct(image, view.obstacle, lamp)
        coverage = layers[figures.index(figure)][..., 3] / np.float32(SAMPLES**2)
        return Exposure(image, coverage, plate.exposure, window.height * camera.focal_px)

    def _make_camera(self, number: int) -> Camera:
        return make_camera(self.seed, self.style, number)

    def _make_identity(self, number: int) -> Identity:
        size = 256 if self.height > 128 else 128
        return build_identity(self.body, self.style, self.seed, number, kind=LABELLED, texture_size=size)

    def _make_passer_by(self, number: int) -> Identity:
        return build_identity(self.body, self.style, self.seed, number, kind=PASSER_BY, texture_size=64)

    def _make_plate(self, camera: int, number: int) -> Plate:
        return make_plate(self.camera(camera), number)

    def _figure(
        self, camera: Camera, person: Identity, stance: Stance, heading: float, feet: tuple[float, float]
    ) -> Figure:
        vertices = pose(self.body, person, stance, heading, feet)
        points = np.empty_like(vertices)
        project(vertices, camera.rotation, camera.height_m, points)
        return Figure(person, vertices, points, feet)

    def _passers_by(self, camera: Camera, view: View, window: Window) -> list[Figure]:
        obstacle = view.obstacle
        if obstacle.kind != "person" or obstacle.stance is None:
            return []
        distance = max(NEAREST_PASSER_BY_M, view.place_m[1] + obstacle.depth_m)
        # The place at that distance that appears `side` crop widths beside the crop's middle.
        middle = window.left + (0.5 + obstacle.side) * window.width
        forward = camera.rotation[2]
        depth = forward[1] * distance + forward[2] * (0.9 - camera.height_m)
        feet = (middle * float(depth), distance)
        person = self._passer_by(obstacle.number)
        return [self._figure(camera, person, obstacle.stance, obstacle.heading, feet)]

    def _background(self, plate: Plate, window: Window, brightness: float) -> Floats:
        """Linear light (H, W, 3) of the plate behind the window, which is moved inside the plate's edges."""
        left, top = (window.left - LEFT) / STEP, (window.top - TOP) / STEP
        width, height = min(window.width / STEP, WIDTH_PX), min(window.height / STEP, HEIGHT_PX)
        left, top = min(max(left, 0.0), WIDTH_PX - width), min(max(top, 0.0), HEIGHT_PX - height)
        box = (left, top, left + width, top + height)
        crop = plate.image.resize((self.width, self.height), Image.Resampling.BILINEAR, box=box)
        table = (np.arange(256, dtype=np.float32) / 255) ** 2 * np.float32(plate.peak * brightness)
        return np.asarray(table[np.asarray(crop)], np.float32)

    def _draw(self, image: Floats, figure: Figure, camera: Camera, window: Window, lamp: Lamp) -> Floats:
        """Shadow a figure onto the image, in place, and return its own layer (H, W, 4)."""
        person, mesh = figure.person, figure.person.mesh
        rows, columns = self.height * SAMPLES, self.width * SAMPLES
        nearest = np.zeros((rows, columns), np.float32)
        face_at = np.full((rows, columns), -1, np.int32)
        weight_at = np.empty((rows, columns, 2), np.float32)
        scale = (window.left, window.top, columns / window.width, rows / window.height)
        rasterize(figure.points, scale, mesh.faces, mesh.keep, nearest, face_at, weight_at)
        shadow, shadow_window = _shadow_map(figure, lamp)
        plane = (window.left, window.top, window.width / self.width, window.height / self.height)
        key, sky = lamp.rows[1] * max(lamp.rows[0, 2], 0.0), lamp.rows[2]
        strength = float(np.clip(key.mean() / (key.mean() + sky.mean()), 0, 0.8))
        shading.shade_ground(
            image,
            plane,
            camera.rotation,
            camera.height_m,
            figure.feet,
            shadow,
            lamp.basis,
            shadow_window,
            strength,
        )
        normals = np.empty_like(figure.vertices)
        vertex_normals(figure.vertices, mesh.faces, normals)
        layer = np.zeros((self.height, self.width, 4), np.float32)
        shading.shade(
            face_at,
            weight_at,
            mesh.faces,
            mesh.texture,
            mesh.material,
            figure.vertices,
            normals,
            person.textures,
            GLOSS,
            camera.height_m,
            lamp.rows,
            shadow,
            lamp.basis,
            shadow_window,
            SAMPLES,
            layer,
        )
        return layer

    def _obstruct(self, image: Floats, obstacle: Obstacle, lamp: Lamp) -> None:
        """Draw a pole or the upper edge of a box in front of everything, in place."""
        if obstacle.kind not in ("pole", "box"):
            return
        light = (lamp.rows[2] + 0.4 * lamp.rows[1]).astype(np.float32)
        color = linear(hsv(obstacle.hue, obstacle.saturation, obstacle.value)) * light
        if obstacle.kind == "pole":
            left, right = obstacle.side * self.width, (obstacle.side + obstacle.size) * self.width
            columns = slice(int(left), int(right) + 1)
            count = len(range(*columns.indices(self.width)))
            round_shade = 0.7 + 0.5 * np.sin(np.linspace(0.3, 2.6, count, dtype=np.float32))
            image[:, columns] = color * round_shade[None, :, None]
        else:
            across = np.linspace(1.1, 0.8, self.width, dtype=np.float32)
            image[int(self.height * obstacle.size) :] = color * across[None, :, None]


def render(seed: int, style: Style | str, identity: int, camera: int, index: int, height: int = 256) -> bytes:
    """One image as JPEG bytes: a pure function of its arguments. See `Renderer` for many images."""
    return Renderer(style, height, seed, identities=1).render(identity, camera, index)


def _check_range(name: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise DmxError(f"{name} must be from 0 to {most}, found {value}")


def _frame(figure: Figure, framing: Framing) -> Window:
    """The crop a detector would cut around the figure."""
    left, top, right, bottom = bounds(figure.points, figure.person.mesh.used)
    height = (bottom - top) * framing.height
    width = max(height * framing.aspect, (right - left) * framing.least_width)
    middle_x = 0.5 * (left + right) + framing.shift_x * width
    middle_y = 0.5 * (top + bottom) + (framing.shift_y - framing.cut_feet) * height
    return Window(middle_x - width / 2, middle_y - height / 2, width, height)


def _light(camera: Camera, view: View) -> Lamp:
    """The camera's light as it is at this moment."""
    light = camera.light
    direction = turned(light.direction, view.light_turn)
    right = np.cross([0.0, 0.0, 1.0], direction)
    right /= np.sqrt((right**2).sum())
    rows = np.stack(
        [
            direction,
            light.key * (view.brightness * view.key_share),
            light.sky * view.brightness,
            light.ground * view.brightness,
        ]
    )
    return Lamp(rows, np.stack([right, np.cross(direction, right), direction]))


def _shadow_map(figure: Figure, lamp: Lamp) -> tuple[Floats, tuple[float, float, float]]:
    """What the key light sees of a figure: nearness (n, n), and corner x, y and pixels per metre."""
    seen = np.empty_like(figure.vertices)
    to_basis(figure.vertices, lamp.basis, seen)
    left, top, right, bottom = bounds(seen, figure.person.mesh.used)
    scale = (SHADOW_MAP_PX - 4) / max(right - left, bottom - top)
    window = (left - 2 / scale, top - 2 / scale, scale)
    shadow = np.full((SHADOW_MAP_PX, SHADOW_MAP_PX), -1e9, np.float32)
    depth_map(seen, window, figure.person.mesh.faces, figure.person.mesh.keep, shadow)
    return shadow, window
