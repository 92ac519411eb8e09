"""Rigid things a person carries: bags, a bun or ponytail, the peak of a cap."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from dmx.synth import body as parts
from dmx.synth.body import Body
from dmx.synth.garment_space import GarmentSpace
from dmx.synth.garments import BAG, HAIR, HEADWEAR
from dmx.synth.types import Doubles, Floats, Ints
from dmx.synth.wardrobe import Outfit


@dataclass(frozen=True)
class Prop:
    """A rigid mesh fixed to a bone.

    Attributes:
        vertices: (n, 3) metres around its own centre; faces (F, 3); uvs (n, 2).
        bone: the bone it moves with.
        position: (3,) its centre in the rest pose, or relative to the bone when it hangs.
        hangs: it keeps upright below the bone instead of turning with it.
        material: material number.
    """

    vertices: Floats
    faces: Ints
    uvs: Floats
    bone: int
    position: Doubles
    hangs: bool
    material: int


@functools.lru_cache(maxsize=16)
def _unit_box(rings: int, roundness: float) -> tuple[Floats, Ints, Floats]:
    """A box with rounded edges (a superellipsoid) of half size 1: vertices, faces, texture coordinates."""
    segments = 2 * rings
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rings)[:, None]
    longitude = np.linspace(-np.pi, np.pi, segments, endpoint=False)[None, :]

    def power(value: Doubles) -> Doubles:
        return np.asarray(np.sign(value) * np.abs(value) ** roundness)

    x = power(np.cos(latitude)) * power(np.cos(longitude))
    y = power(np.cos(latitude)) * power(np.sin(longitude))
    z = power(np.sin(latitude)) * np.ones_like(longitude)
    u = longitude / (2 * np.pi) + 0.5 + np.zeros_like(latitude)
    v = latitude / np.pi + 0.5 + np.zeros_like(longitude)
    faces = []
    for ring in range(rings - 1):
        for k in range(segments):
            here, there = ring * segments + k, ring * segments + (k + 1) % segments
            faces.append([here, there, there + segments])
            faces.append([here, there + segments, here + segments])
    vertices = np.stack([x, y, z], axis=-1).reshape(-1, 3).astype(np.float32)
    uvs = np.stack([u, v], axis=-1).reshape(-1, 2).astype(np.float32)
    return vertices, np.array(faces, np.int32), uvs


def _box(
    body: Body,
    size_m: tuple[float, float, float],
    bone: str,
    position: tuple[float, float, float],
    material: int,
    *,
    rings: int = 8,
    roundness: float = 0.35,
    hangs: bool = False,
) -> Prop:
    vertices, faces, uvs = _unit_box(rings, roundness)
    scaled = vertices * np.array(size_m, np.float32)
    return Prop(scaled, faces, uvs, body.bone[bone], np.array(position), hangs, material)


def bag(body: Body, space: GarmentSpace, outfit: Outfit, rest: Floats, joints: Doubles) -> list[Prop]:
    """The outfit's bag, or nothing; `rest` (V, 3) and `joints` (B, 3) are the person's rest shape, metres."""
    size = outfit.bag_size
    tights = rest[parts.TIGHTS]
    tights_z = space.template[parts.TIGHTS, 2]
    if outfit.bag == "backpack":
        bone = body.bone["spine02"]
        back = tights[np.abs(tights_z - space.joints[bone, 2]) < 0.08, 1].max()
        place = (0.0, float(back) + 0.075 * size + outfit.top_ease_m, float(joints[bone, 2]) - 0.02)
        return [_box(body, (0.15 * size, 0.085 * size, 0.22 * size), "spine02", place, BAG, rings=9)]
    if outfit.bag == "shoulder":
        hip = np.abs(tights[np.abs(tights_z - space.hip_z) < 0.05, 0]).max() + 0.05
        hip_z = float(joints[body.bone["upperleg01.L"], 2])
        place = (float(hip) * (1 if outfit.bag_left else -1), 0.02, hip_z + 0.02)
        return [_box(body, (0.055 * size, 0.15 * size, 0.12 * size), "root", place, BAG)]
    if outfit.bag == "hand":
        finger = "finger3-1.L" if outfit.bag_left else "finger3-1.R"
        below = (0.0, 0.0, -0.2 * size)
        return [_box(body, (0.05 * size, 0.15 * size, 0.13 * size), finger, below, BAG, hangs=True)]
    return []


def head_props(body: Body, outfit: Outfit, scalp: Floats, rng: np.random.Generator) -> list[Prop]:
    """A bun, a ponytail or the peak of a cap; `scalp` (n, 3) are the vertices of hair or hat, metres."""
    if not len(scalp):
        return []
    back, top, front = float(scalp[:, 1].max()), float(scalp[:, 2].max()), float(scalp[:, 1].min())
    if outfit.hair_extra == "bun":
        radius = float(rng.uniform(0.035, 0.055))
        place = (0.0, back + 0.4 * radius, top - float(rng.uniform(0.04, 0.1)))
        return [_box(body, (radius, radius, radius), "head", place, HAIR, rings=7, roundness=1.0)]
    if outfit.hair_extra == "ponytail":
        place = (0.0, back + 0.03, top - 0.2)
        return [_box(body, (0.032, 0.03, 0.14), "head", place, HAIR, rings=7, roundness=0.9)]
    if outfit.headwear == "cap":
        place = (0.0, front - 0.03, top - 0.09)
        return [_box(body, (0.07, 0.06, 0.006), "head", place, HEADWEAR, rings=6, roundness=0.8)]
    return []
