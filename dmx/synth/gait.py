"""Walking and standing: joint rotations over a step, and the posed body.

The curves are those of human walking as gait laboratories plot them: hip flexion is nearly a cosine; the knee
bends a little under load and about 60 degrees in the swing; the ankle pushes off at about 60 % of the cycle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dmx.synth.body import Body
from dmx.synth.raster import forward_kinematics, skin_vertices, turn_and_place
from dmx.synth.types import Doubles, Floats

if TYPE_CHECKING:
    from dmx.synth.identity import Identity

Gesture = Literal["none", "phone", "hold", "pocket"]
GESTURES: tuple[Gesture, ...] = ("phone", "hold", "pocket")

KNEE_PHASE = (0, 0.08, 0.15, 0.3, 0.4, 0.5, 0.6, 0.72, 0.85, 0.95, 1.0)
KNEE_DEG = (4, 13, 17, 9, 5, 10, 38, 60, 32, 5, 4)
ANKLE_PHASE = (0, 0.07, 0.2, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
ANKLE_DEG = (0, -6, 3, 10, 4, -17, -6, 0, 0)

LEFTWARD = (1.0, 0.0, 0.0)
RIGHTWARD = (-1.0, 0.0, 0.0)
BACKWARD = (0.0, 1.0, 0.0)
UPWARD = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Gait:
    """How a person walks.

    Attributes:
        step, arm_swing: amplitudes, 1 is average; lean_deg forwards; arms_out_deg away from the body.
        fingers: (B, 3, 3) local rotations of the resting hands, identity elsewhere.
    """

    step: float
    arm_swing: float
    lean_deg: float
    arms_out_deg: float
    fingers: Doubles


@dataclass(frozen=True)
class Stance:
    """One moment: phase of the step in [0, 1), amplitude (0: standing), gesture, where the head looks."""

    phase: float
    amplitude: float
    gesture: Gesture
    gesture_left: bool
    head_turn_deg: float
    head_nod_deg: float
    leg_spread_deg: tuple[float, float]


def rotation(axis: Doubles | tuple[float, float, float], degrees: float) -> Doubles:
    """(3, 3) rotation about an axis of any length."""
    x, y, z = (float(v) for v in axis)
    length = math.sqrt(x * x + y * y + z * z)
    x, y, z = x / length, y / length, z / length
    angle = math.radians(degrees)
    c, s = math.cos(angle), math.sin(angle)
    t = 1 - c
    return np.array(
        [
            [c + x * x * t, x * y * t - z * s, x * z * t + y * s],
            [y * x * t + z * s, c + y * y * t, y * z * t - x * s],
            [z * x * t - y * s, z * y * t + x * s, c + z * z * t],
        ]
    )


def compose(first: Doubles, second: Doubles) -> Doubles:
    """first @ second for (3, 3) matrices, in a fixed order of operations."""
    return np.asarray((first[:, :, None] * second[None, :, :]).sum(axis=1))


def draw_gait(rng: np.random.Generator, body: Body, joints: Doubles) -> Gait:
    """A person's way of walking, with the fingers curled as they hang."""
    fingers = np.repeat(np.eye(3)[None], len(body.bone_names), axis=0)
    curl_deg = rng.uniform(18, 40)
    for side in (".L", ".R"):
        for finger in "2345":
            bones = [body.bone[f"finger{finger}-{k}{side}"] for k in "123"]
            knuckles = joints[bones]
            axis = np.cross(knuckles[1] - knuckles[0], knuckles[2] - knuckles[1])
            fingers[bones] = rotation(axis, curl_deg)
    return Gait(
        step=float(rng.uniform(0.75, 1.15)),
        arm_swing=float(rng.uniform(0.5, 1.3)),
        lean_deg=float(rng.normal(2, 2)),
        arms_out_deg=float(rng.normal(0, 3)),
        fingers=fingers,
    )


def draw_stance(rng: np.random.Generator) -> Stance:
    """A moment of walking, sometimes of standing; sometimes with a phone or a hand in a pocket."""
    walking = rng.random() < 0.85
    gesture: Gesture = GESTURES[rng.integers(3)] if rng.random() < 0.12 else "none"
    return Stance(
        phase=float(rng.random()),
        amplitude=float(np.clip(rng.normal(1, 0.2), 0.3, 1.4) if walking else rng.uniform(0, 0.15)),
        gesture=gesture,
        gesture_left=bool(rng.random() < 0.5),
        head_turn_deg=float(rng.normal(0, 10)),
        head_nod_deg=float(rng.normal(4, 7)),
        leg_spread_deg=(float(rng.normal(4, 1)), float(rng.normal(4, 1))),
    )


def joint_rotations(body: Body, joints: Doubles, gait: Gait, stance: Stance) -> Doubles:
    """Local rotations (B, 3, 3) in the rest pose's world axes (x: the person's left, y: back, z: up)."""
    local = gait.fingers.copy()
    reach = stance.amplitude * gait.step
    twist_deg = 4 * reach * math.cos(2 * math.pi * stance.phase)
    for side, sign, phase, spread in (
        (".L", 1, stance.phase, stance.leg_spread_deg[0]),
        (".R", -1, (stance.phase + 0.5) % 1, stance.leg_spread_deg[1]),
    ):
        _leg(local, body, side, phase, reach, sign * spread)
        mine = stance.gesture if (side == ".L") == stance.gesture_left else "none"
        _arm(local, body, joints, gait, side, sign, phase, reach, mine)
    lean = rotation(LEFTWARD, gait.lean_deg)
    local[body.bone["spine03"]] = compose(rotation(UPWARD, -1.2 * twist_deg), lean)
    local[body.bone["root"]] = rotation(UPWARD, twist_deg)
    nod = rotation(LEFTWARD, stance.head_nod_deg - gait.lean_deg)
    local[body.bone["neck01"]] = compose(rotation(UPWARD, stance.head_turn_deg), nod)
    return local


def _leg(local: Doubles, body: Body, side: str, phase: float, reach: float, inward_deg: float) -> None:
    hip_deg = 9 * reach + 21 * reach * math.cos(2 * math.pi * phase)
    knee_deg = max(2.0, float(np.interp(phase, KNEE_PHASE, KNEE_DEG)) * min(reach, 1.1))
    ankle_deg = float(np.interp(phase, ANKLE_PHASE, ANKLE_DEG)) * reach
    local[body.bone["upperleg01" + side]] = compose(
        rotation(RIGHTWARD, hip_deg), rotation(BACKWARD, inward_deg)
    )
    local[body.bone["lowerleg01" + side]] = rotation(LEFTWARD, knee_deg)
    local[body.bone["foot" + side]] = rotation(RIGHTWARD, ankle_deg)


def _direction(joints: Doubles, body: Body, start: str, end: str) -> Doubles:
    vector = joints[body.bone[end]] - joints[body.bone[start]]
    return np.asarray(vector / math.sqrt(float((vector**2).sum())))


def _arm(
    local: Doubles,
    body: Body,
    joints: Doubles,
    gait: Gait,
    side: str,
    sign: int,
    phase: float,
    reach: float,
    gesture: Gesture,
) -> None:
    """From the rest pose (arms out, elbows bent) to a hanging arm that swings against the leg."""
    upper = _direction(joints, body, "upperarm01" + side, "lowerarm01" + side)
    lower = _direction(joints, body, "lowerarm01" + side, "wrist" + side)
    down_deg = math.degrees(math.acos(float(np.clip(-upper[2], -1, 1)))) - (7 + gait.arms_out_deg)
    rest_bend_deg = math.degrees(math.acos(float(np.clip((upper * lower).sum(), -1, 1))))
    swing_deg = 3 - gait.arm_swing * reach * 20 * math.cos(2 * math.pi * phase)
    bend_deg = 10 + 7 * reach + 14 * reach * gait.arm_swing * max(0.0, -math.cos(2 * math.pi * phase))
    if gesture == "phone":
        swing_deg, down_deg, bend_deg = 25, down_deg - 12, 125
    elif gesture == "hold":
        swing_deg, bend_deg = 5, 80
    elif gesture == "pocket":
        swing_deg, down_deg, bend_deg = -12, down_deg - 10, 38
    local[body.bone["upperarm01" + side]] = compose(
        rotation(RIGHTWARD, swing_deg), rotation(BACKWARD, sign * down_deg)
    )
    # The elbow's own axis: the normal of the bent rest arm.
    local[body.bone["lowerarm01" + side]] = rotation(np.cross(upper, lower), bend_deg - rest_bend_deg)


def pose(
    body: Body, person: Identity, stance: Stance, heading: float, place_m: tuple[float, float]
) -> Floats:
    """World vertices (V, 3) in metres of a person standing on the ground.

    Args:
        heading: radians by which the person, who faces -Y, is turned about the vertical.
        place_m: where the hips are, x and y.
    """
    mesh = person.mesh
    local = joint_rotations(body, person.joints, person.gait, stance)
    turn = np.empty_like(local)
    position = np.empty_like(person.joints)
    forward_kinematics(body.parents, local, person.joints, turn, position)
    shift = position - (turn * person.joints[:, None, :]).sum(axis=2)
    vertices = np.empty((len(mesh.keep), 3), np.float32)
    skin_vertices(
        mesh.rest,
        mesh.weight_bones,
        mesh.weights,
        turn.astype(np.float32),
        shift.astype(np.float32),
        vertices,
    )
    start = len(mesh.rest)
    for prop in person.props:
        stop = start + len(prop.vertices)
        if prop.hangs:
            vertices[start:stop] = prop.vertices + (position[prop.bone] + prop.position)
        else:
            offset = prop.vertices + (prop.position - person.joints[prop.bone])
            turned = (turn[prop.bone][None, :, :] * offset[:, None, :]).sum(axis=2)
            vertices[start:stop] = turned + position[prop.bone]
        start = stop
    root = position[0] if body.parents[0] < 0 else position[body.bone["root"]]
    turn_and_place(vertices, mesh.used, heading, place_m[0], place_m[1], root)
    return vertices
