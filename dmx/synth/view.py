"""One view: everything about an image that chance decides, drawn at once from the image's key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dmx.synth.camera import LATERAL_SHARE, Camera
from dmx.synth.gait import Stance, draw_stance
from dmx.synth.types import Doubles

# Passers-by of a data set: few, so that they can be kept at hand.
PASSERS_BY = 16
NEAREST_PASSER_BY_M = 2.2

ObstacleKind = Literal["none", "person", "pole", "box"]


@dataclass(frozen=True)
class Framing:
    """The crop around a person, relative to the person's bounding box (1 is the box's height or width)."""

    height: float
    aspect: float
    least_width: float
    shift_x: float
    shift_y: float
    cut_feet: float


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way.

    Attributes:
        kind: a `person` is passer-by `number` in their own stance and heading (radians), `depth_m` farther
            away than the subject and `side` crop widths beside the crop's middle; a `pole` begins at `side`
            of the crop's width and is `size` of it wide; a `box` covers the rows below `size` of the height.
        hue, saturation, value: the colour of a pole or box.
    """

    kind: ObstacleKind
    number: int = 0
    stance: Stance | None = None
    heading: float = 0.0
    depth_m: float = 0.0
    side: float = 0.0
    size: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    value: float = 0.0


@dataclass(frozen=True)
class View:
    """One image's chances.

    Attributes:
        stance, heading: of the subject; a heading is a turn about the vertical in radians.
        place_m: where the subject stands.
        plate: number of the background.
        framing: the crop.
        light_turn: turn of the key light about the vertical in radians, as time passes.
        brightness: factor on all light; key_share: factor on the key light alone.
        obstacle: what stands in the way.
    """

    stance: Stance
    heading: float
    place_m: tuple[float, float]
    plate: int
    framing: Framing
    light_turn: float
    brightness: float
    key_share: float
    obstacle: Obstacle


def draw_view(rng: np.random.Generator, camera: Camera) -> View:
    """Draw a view of some person by a camera."""
    if rng.random() < 0.75:
        back = math.pi if rng.random() < 0.5 else 0.0
        heading = camera.walking + back + rng.normal(0, 0.35)
    else:
        heading = rng.uniform(0, 2 * math.pi)
    stance = draw_stance(rng)
    distance = rng.uniform(*camera.distance_m)
    return View(
        stance=stance,
        heading=heading,
        place_m=(rng.uniform(-LATERAL_SHARE, LATERAL_SHARE) * distance, distance),
        plate=int(rng.integers(camera.style.plates)),
        framing=Framing(
            height=rng.uniform(1.02, 1.13),
            aspect=0.5 * rng.uniform(0.84, 1.06),
            least_width=rng.uniform(0.9, 1.05),
            shift_x=rng.normal(0, 0.025),
            shift_y=rng.normal(0, 0.018),
            cut_feet=rng.uniform(0.05, 0.2) if rng.random() < 0.08 else 0.0,
        ),
        light_turn=rng.normal(0, 0.25),
        brightness=math.exp(rng.normal(0, 0.12)),
        key_share=rng.uniform(0.5, 1.1),
        obstacle=_draw_obstacle(rng, camera),
    )


def _draw_obstacle(rng: np.random.Generator, camera: Camera) -> Obstacle:
    if rng.random() >= camera.style.occlusion:
        return Obstacle("none")
    if rng.random() < 0.55:
        side = -1 if rng.random() < 0.5 else 1
        return Obstacle(
            "person",
            number=int(rng.integers(PASSERS_BY)),
            stance=draw_stance(rng),
            heading=rng.uniform(0, 2 * math.pi),
            depth_m=rng.uniform(0.4, 2.0) * (1 if rng.random() < 0.45 else -0.6),
            side=side * rng.uniform(0.4, 0.68),
        )
    pole = rng.random() < 0.5
    return Obstacle(
        "pole" if pole else "box",
        side=rng.uniform(0, 0.9),
        size=rng.uniform(0.05, 0.16) if pole else rng.uniform(0.62, 0.85),
        hue=rng.random(),
        saturation=rng.uniform(0, 0.5),
        value=rng.uniform(0.05, 0.7),
    )


def turned(direction: Doubles, angle: float) -> Doubles:
    """A direction (3,) turned about the vertical by `angle` radians."""
    cosine, sine = math.cos(angle), math.sin(angle)
    x, y, z = direction
    return np.array([cosine * x - sine * y, sine * x + cosine * y, z])
