"""Where on the body a vertex is, in the terms of a tailor: along an arm, along a leg, around the trunk.

All of it is measured once, on the template, so that a sleeve length or a pattern means the same on every
body.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmx.synth.body import GROUP_TIGHTS, SKIN, Body
from dmx.synth.types import Doubles, Floats, Ints

TRUNK, LEFT_ARM, RIGHT_ARM, LEFT_LEG, RIGHT_LEG = range(5)
SIDES = (".L", ".R")
ARM_BONES = ("upperarm", "lowerarm", "wrist", "finger", "metacarpal")
LEG_BONES = ("upperleg", "lowerleg", "foot", "toe")

SEAM_SMOOTHING_STEPS = 12

# Trunk texture coordinates start this far below the origin, which puts the collar near the texture's top.
TRUNK_TEXTURE_SHIFT_M = 0.35


@dataclass(frozen=True)
class GarmentSpace:
    """Template measures.

    Attributes:
        template: (V, 3) metres; joints (B, 3) its joints.
        arm_share: (2, V) share of the left and right arm in a vertex's movement, smoothed over the garment.
        arm: (V,) 0 at the shoulder joint, 1 at the wrist; 0 away from the arms.
        height: (V,) metres like the template's z, arms lifted to the shoulders so that no hem cuts them.
        leg: (V,) 0 at the hip joint, 1 at the ankle.
        azimuth: (V,) angle around the trunk, 0 in front, radians.
        part: (V,) TRUNK, LEFT_ARM, ...
        around, along: (5, V) texture coordinates of a vertex as seen from each part, radians and metres.
        hip_z, ankle_z, neck_z, crown_z, face_y: metres on the template.
    """

    template: Floats
    joints: Doubles
    arm_share: Floats
    arm: Floats
    height: Floats
    leg: Floats
    azimuth: Floats
    part: NDArray[np.int8]
    around: Floats
    along: Floats
    hip_z: float
    ankle_z: float
    neck_z: float
    crown_z: float
    face_y: float

    def texture_coordinates(self, faces: Ints, part: int | None = None) -> Floats:
        """Texture coordinates (F, 3, 2) of garment faces, whole across the texture's edge.

        Args:
            faces: (F, 3).
            part: TRUNK, LEFT_ARM, ... whose coordinates to use; None: the one that each face belongs to.
        """
        parts = np.median(self.part[faces], axis=1).astype(np.int32) if part is None else np.array([part])
        around = unwrap(self.around[parts[:, None], faces])
        along = self.along[parts[:, None], faces]
        return np.stack([around / (2 * np.pi) + 0.5, along], axis=-1).astype(np.float32)


def unwrap(angles: Floats) -> Floats:
    """Angles (F, 3) of triangle corners, shifted by whole turns to within half a turn of the first corner."""
    first = angles[:, :1]
    return np.asarray(first + (angles - first + np.pi) % (2 * np.pi) - np.pi, np.float32)


@functools.lru_cache(maxsize=1)
def measure(body: Body) -> GarmentSpace:
    """The measures of a body's template."""
    template = body.template
    joints = body.joints(template)
    bone = body.bone
    arm_weights = [_weight_of(body, ARM_BONES, side) for side in SIDES]
    leg_weights = [_weight_of(body, LEG_BONES, side) for side in SIDES]
    arm_share = np.stack([_smooth(body, weight) for weight in arm_weights])
    arms = arm_share.sum(axis=0)
    shoulder_z = joints[bone["upperarm01.L"], 2]
    height = template[:, 2] * (1 - arms) + shoulder_z * arms
    hip_z = float(joints[bone["upperleg01.L"], 2])
    ankle_z = float(joints[bone["foot.L"], 2])
    azimuth = np.arctan2(template[:, 0], -(template[:, 1] - joints[bone["spine03"], 1]))
    part = np.zeros(len(template), np.int8)
    for number, weight in enumerate([*arm_weights, *leg_weights], start=LEFT_ARM):
        part[weight > 0.5] = number
    around, along = _part_coordinates(body, joints, azimuth, ankle_z)
    head = template[SKIN][_weight_of(body, ("head",), "")[SKIN] > 0.5]
    return GarmentSpace(
        template=template,
        joints=joints,
        arm_share=arm_share,
        arm=_arm_coordinate(body, joints, arm_weights),
        height=height.astype(np.float32),
        leg=((hip_z - height) / (hip_z - ankle_z)).astype(np.float32),
        azimuth=azimuth.astype(np.float32),
        part=part,
        around=around,
        along=along,
        hip_z=hip_z,
        ankle_z=ankle_z,
        neck_z=float(joints[bone["neck01"], 2]),
        crown_z=float(head[:, 2].max()),
        face_y=float(head[:, 1].min()),
    )


def _weight_of(body: Body, prefixes: tuple[str, ...], side: str) -> Floats:
    """(V,) share of a vertex's skinning weight on bones with these prefixes and this side."""
    chosen = np.array([name.startswith(prefixes) and name.endswith(side) for name in body.bone_names])
    if not side:
        chosen = np.array([name in prefixes for name in body.bone_names])
    return np.asarray((body.weights * chosen[body.weight_bones]).sum(axis=1), np.float32)


def _smooth(body: Body, values: Floats) -> Floats:
    """Average values (V,) along the edges of the tights: what is cut along them gets a smooth edge."""
    faces = body.faces_of(GROUP_TIGHTS)
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    start, end = np.concatenate([edges, edges[:, ::-1]]).T
    neighbours = np.bincount(start, minlength=len(values))
    smooth = values.astype(np.float64)
    for _ in range(SEAM_SMOOTHING_STEPS):
        mean = np.bincount(start, smooth[end], minlength=len(values)) / np.maximum(neighbours, 1)
        smooth = np.where(neighbours > 0, 0.5 * (smooth + mean), smooth)
    return smooth.astype(np.float32)


def _arm_coordinate(body: Body, joints: Doubles, arm_weights: list[Floats]) -> Floats:
    arm = np.zeros(len(body.template), np.float32)
    for side, weight, sign in zip(SIDES, arm_weights, (1, -1), strict=True):
        shoulder, wrist = joints[body.bone["upperarm01" + side]], joints[body.bone["wrist" + side]]
        length = np.sqrt(((wrist - shoulder) ** 2).sum())
        along = ((body.template - shoulder) * ((wrist - shoulder) / length)).sum(axis=1) / length
        on_arm = (sign * body.template[:, 0] > 0) & (weight > 0.02)
        arm[on_arm] = (np.maximum(along, 0.0) * np.clip(weight * 3, 0, 1))[on_arm]
    return arm


def _part_coordinates(body: Body, joints: Doubles, azimuth: Doubles, ankle_z: float) -> tuple[Floats, Floats]:
    """Cylindrical coordinates around the trunk, each arm and each leg."""
    template = body.template.astype(np.float64)
    around = np.zeros((5, len(template)), np.float32)
    along = np.zeros((5, len(template)), np.float32)
    around[TRUNK] = azimuth
    along[TRUNK] = template[:, 2] + TRUNK_TEXTURE_SHIFT_M
    for k, side in enumerate(SIDES):
        shoulder, wrist = joints[body.bone["upperarm01" + side]], joints[body.bone["wrist" + side]]
        axis = (wrist - shoulder) / np.sqrt(((wrist - shoulder) ** 2).sum())
        offset = template - shoulder
        distance = (offset * axis).sum(axis=1)
        radial = offset - np.outer(distance, axis)
        forward = np.array([0.0, -1.0, 0.0])
        sideways = np.cross(axis, forward)
        around[LEFT_ARM + k] = np.arctan2((radial * sideways).sum(axis=1), (radial * forward).sum(axis=1))
        along[LEFT_ARM + k] = distance + 0.15
        knee = joints[body.bone["lowerleg01" + side]]
        around[LEFT_LEG + k] = np.arctan2(template[:, 0] - knee[0], -(template[:, 1] - knee[1]))
        along[LEFT_LEG + k] = template[:, 2] - ankle_z + 0.1
    return around, along
