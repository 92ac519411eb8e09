"""Clothes as layers: offset copies of the body's helper geometry, cut off at hems by a `keep` value.

A layer lies over its body part; where its interpolated `keep` is negative the rasteriser leaves it out, which
gives hems that are crisp at any resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmx.synth import body as parts
from dmx.synth.body import Body
from dmx.synth.garment_space import LEFT_ARM, RIGHT_ARM, TRUNK, TRUNK_TEXTURE_SHIFT_M, GarmentSpace, unwrap
from dmx.synth.types import Floats, Ints
from dmx.synth.wardrobe import Outfit

# Material numbers: rows of an identity's texture array.
SKIN, EYE, TOP, SLEEVE, LEGS, SHOE, SKIRT, HAIR, BAG, HEADWEAR = range(10)
MATERIALS = 10

# Metres of cloth over which the arm's share of the skinning weight goes from none to all.
SEAM_SLOPE_M = 0.3
FLAT_HAIR_M = 0.005
NECK_HALF_WIDTH_M = 0.085

# Skin reaches this far under a garment's edge; farther in, it could only show through where joints bend.
SKIN_UNDER_HEM_M = 0.015


@dataclass(frozen=True)
class Layer:
    """One garment: the base mesh's vertices it uses, how far they are moved, where it ends, its look.

    Attributes:
        vertices: (n,) vertex numbers of the base mesh.
        offset: (n, 3) displacement in metres.
        keep: (n,) positive inside the garment, negative beyond its hems.
        faces: (F, 3) faces of the base mesh it may use (those with other vertices are left out).
        texture: (F, 3, 2) texture coordinates; material: (F,) material numbers.
    """

    vertices: NDArray[np.int64]
    offset: Floats
    keep: Floats
    faces: Ints
    texture: Floats
    material: NDArray[np.int8]


def _layer(
    vertices: slice | NDArray[np.int64],
    offset: Floats,
    keep: Floats,
    faces: Ints,
    texture: Floats,
    material: int | NDArray[np.int64],
) -> Layer:
    """A layer from whole-mesh arrays: offset (V, 3) and keep (V,) are cut to its vertices."""
    chosen = np.arange(vertices.start, vertices.stop) if isinstance(vertices, slice) else vertices
    return Layer(
        vertices=chosen,
        offset=offset[chosen].astype(np.float32),
        keep=keep[chosen].astype(np.float32),
        faces=faces,
        texture=texture.astype(np.float32),
        material=np.broadcast_to(np.asarray(material, np.int8), (len(faces),)),
    )


@dataclass(frozen=True)
class Hems:
    """`keep` values (V,) of the garments on the tights: where each ends."""

    top: Floats
    lower: Floats
    shoes: Floats


def cut(space: GarmentSpace, body: Body, outfit: Outfit) -> Hems:
    """Where the top, the lower garment and the shoes of an outfit end."""
    neck = space.joints[body.bone["neck01"]]
    front = np.clip(-(space.template[:, 1] - neck[1]) / 0.1, 0, 1)
    throat = front * np.clip(1 - np.abs(space.template[:, 0]) / 0.08, 0, 1)
    collar = space.neck_z + outfit.collar_m - outfit.neckline_m * throat
    top = np.minimum.reduce(
        [
            space.height - (space.hip_z + outfit.hem_above_hip_m),
            (outfit.sleeve - space.arm) * 0.5,
            # A low collar bares the neck, not the shoulders.
            np.maximum(collar - space.height, np.abs(space.template[:, 0]) - NECK_HALF_WIDTH_M),
        ]
    )
    waist = space.hip_z + outfit.waist_above_hip_m - space.height
    if outfit.lower == "dress" or (outfit.lower == "skirt" and not outfit.tights):
        lower = np.full_like(waist, -1.0)
    elif outfit.lower == "skirt":
        lower = np.minimum(waist, 1.0 - space.leg)
    else:
        lower = np.minimum(waist, (outfit.leg_length - space.leg) * 0.8)
    return Hems(top=top, lower=lower, shoes=(space.leg - outfit.shoe_height) * 0.8)


def clothes(body: Body, space: GarmentSpace, outfit: Outfit, hems: Hems, normals: Floats) -> list[Layer]:
    """Trousers or tights, top, shoes, and what hangs below the hip.

    Args:
        normals: (V, 3) unit normals of the person's rest shape.
    """
    faces = body.faces_of(parts.GROUP_TIGHTS)
    legs_texture = space.texture_coordinates(faces)
    layers = []
    if hems.lower.max() > 0:
        fitted = outfit.lower == "skirt"
        flare = 0.0 if fitted else outfit.flare_m
        ease = 0.003 if fitted else outfit.leg_ease_m
        offset = normals * (ease + flare * np.clip(space.leg / 0.9, 0, 1))[:, None]
        layers.append(_layer(parts.TIGHTS, offset, hems.lower, faces, legs_texture, LEGS))
    layers += _top(body, space, outfit, hems, normals)
    # Boots lie between tights and trousers.
    sole = np.where(space.template[:, 2] < space.ankle_z + 0.06, 0.006, 0.0045)
    layers.append(_layer(parts.TIGHTS, normals * sole[:, None], hems.shoes, faces, legs_texture, SHOE))
    if outfit.lower in ("skirt", "dress"):
        layers.append(_skirt(body, space, outfit, normals))
    if outfit.coat:
        layers.append(_tails(body, space, outfit, normals))
    return layers


def _top(body: Body, space: GarmentSpace, outfit: Outfit, hems: Hems, normals: Floats) -> list[Layer]:
    """The trunk of a top and its two sleeves, which meet it in a seam where the arm's weight is one half."""
    faces = body.faces_of(parts.GROUP_TIGHTS)
    offset = normals * (outfit.top_ease_m + 0.006 * np.clip(space.arm, 0, 1))[:, None]
    trunk = np.minimum(hems.top, SEAM_SLOPE_M * (0.5 - space.arm_share.sum(axis=0)))
    texture = space.texture_coordinates(faces, TRUNK)
    layers = [_layer(parts.TIGHTS, offset, trunk, faces, texture, TOP)]
    for part, share in zip((LEFT_ARM, RIGHT_ARM), space.arm_share, strict=True):
        sleeve = np.minimum(hems.top, SEAM_SLOPE_M * (share - 0.5))
        texture = space.texture_coordinates(faces, part)
        layers.append(_layer(parts.TIGHTS, offset, sleeve, faces, texture, SLEEVE))
    return layers


def _around_trunk(space: GarmentSpace, faces: Ints, height: Floats) -> Floats:
    """Texture coordinates (F, 3, 2) around the trunk, `height` (F, 3) upwards."""
    around = unwrap(space.azimuth[faces]) / (2 * np.pi) + 0.5
    return np.asarray(np.stack([around, height], axis=-1), np.float32)


def _skirt(body: Body, space: GarmentSpace, outfit: Outfit, normals: Floats) -> Layer:
    """A skirt with cloth of its own, or the lower part of a dress."""
    faces = body.faces_of(parts.GROUP_SKIRT)
    height = space.template[faces][..., 2] + TRUNK_TEXTURE_SHIFT_M
    waist = space.hip_z + outfit.waist_above_hip_m + 0.02 - space.template[:, 2]
    keep = np.minimum(outfit.skirt_length - space.leg, waist)
    if outfit.lower == "dress":
        texture = _around_trunk(space, faces, np.abs(height))
        return _layer(parts.SKIRT, normals * outfit.top_ease_m, keep, faces, texture, TOP)
    texture = _around_trunk(space, faces, height + TRUNK_TEXTURE_SHIFT_M)
    return _layer(parts.SKIRT, normals * 0.006, keep, faces, texture, SKIRT)


def _tails(body: Body, space: GarmentSpace, outfit: Outfit, normals: Floats) -> Layer:
    """The part of a coat below the hip, slit in front; the trunk's texture goes on, mirrored at its end."""
    faces = body.faces_of(parts.GROUP_SKIRT)
    waist = space.hip_z + outfit.waist_above_hip_m + 0.02 - space.template[:, 2]
    keep = np.minimum.reduce([outfit.coat_length - space.leg, waist, np.abs(space.azimuth) - 0.05])
    height = np.abs(space.template[faces][..., 2] + TRUNK_TEXTURE_SHIFT_M)
    texture = _around_trunk(space, faces, height)
    return _layer(parts.SKIRT, normals * outfit.top_ease_m, keep, faces, texture, TOP)


def skin(body: Body, space: GarmentSpace, outfit: Outfit, hems: Hems) -> list[Layer]:
    """The body without what lies well under cloth, and the eyes."""
    covered = np.maximum.reduce([hems.top, hems.lower, hems.shoes])
    keep = SKIN_UNDER_HEM_M - covered
    if outfit.lower in ("skirt", "dress"):
        under_skirt = np.minimum(space.leg + 0.2, outfit.skirt_length - 0.12 - space.leg)
        keep = np.minimum(keep, -under_skirt)
    still = np.zeros_like(space.template)
    of_eyes = np.isin(body.face_group, (parts.GROUP_LEFT_EYE, parts.GROUP_RIGHT_EYE))
    of_skin = body.face_group == parts.GROUP_SKIN
    return [
        _layer(parts.SKIN, still, keep, body.faces[of_skin], body.uvs[body.face_uvs[of_skin]], SKIN),
        _layer(
            parts.EYES, still, np.ones_like(keep), body.faces[of_eyes], body.uvs[body.face_uvs[of_eyes]], EYE
        ),
    ]


def head_cover(
    body: Body, space: GarmentSpace, outfit: Outfit, normals: Floats, rng: np.random.Generator
) -> list[Layer]:
    """Hair on the scalp or a hat, and long hair or a headscarf."""
    layers = []
    hat = outfit.headwear in ("cap", "beanie")
    if outfit.headwear != "none" or outfit.hair != "bald":
        layers.append(_scalp(body, space, outfit, normals, rng, hat=hat))
    if hat and outfit.hair != "bald":
        layers.append(_scalp(body, space, outfit, normals, rng, hat=False))
    if outfit.hair_extra == "long" or outfit.headwear == "scarf":
        layers.append(_long_hair(body, space, outfit, normals, rng))
    return layers


def _around_head(space: GarmentSpace) -> Floats:
    return np.arctan2(space.template[:, 0], space.template[:, 1])


def _hair_texture(space: GarmentSpace, faces: Ints) -> Floats:
    around = unwrap(_around_head(space)[faces]) / (2 * np.pi) + 0.5
    return np.asarray(np.stack([around, space.template[faces][..., 2] * 2], axis=-1), np.float32)


def _scalp(
    body: Body, space: GarmentSpace, outfit: Outfit, normals: Floats, rng: np.random.Generator, *, hat: bool
) -> Layer:
    """A hat, or the hair on the scalp, which lies flat under headwear."""
    template = space.template
    # The hair line: how far below the crown hair begins, from the forehead (0 degrees) to the nape (180).
    angle = np.degrees(np.abs(np.arctan2(template[:, 0], -(template[:, 1] - (space.face_y + 0.105)))))
    forehead = rng.normal(0, 0.008)
    depth = [0.045 + forehead, 0.04 + forehead, 0.05 + forehead / 2, 0.1, 0.125, 0.1, 0.15, 0.19, 0.2]
    if outfit.hair_extra == "long":  # skin must not show between the strands
        depth[3:] = [0.25] * 6
    line = space.crown_z - np.interp(angle, [0, 30, 52, 72, 84, 96, 112, 140, 180], depth)
    line += 0.006 * np.sin(template[:, 0] * 90 + rng.uniform(-3, 3)) * (angle < 70)
    if hat:
        line = space.crown_z - 0.085 - (template[:, 1] - space.face_y) * 0.18
    keep = template[:, 2] - line
    ears = (np.abs(template[:, 0]) > 0.079) & (template[:, 2] < space.crown_z - 0.1)
    if outfit.hair_extra != "long":
        keep[ears] = -1.0
    on_skin = np.arange(len(template)) < parts.SKIN.stop
    chosen = np.nonzero(on_skin & (keep > -0.03) & (template[:, 2] > space.neck_z))[0]
    if hat or outfit.headwear == "scarf":
        thickness = rng.uniform(0.014, 0.022)
    else:
        thickness = FLAT_HAIR_M if outfit.headwear != "none" else _hair_thickness(outfit, rng)
    even = outfit.headwear != "none" or outfit.hair == "afro"
    fullness = (
        np.ones(len(template)) if even else np.clip((template[:, 2] - space.crown_z + 0.13) / 0.1, 0.35, 1)
    )
    offset = normals * (thickness * fullness * np.clip(keep / 0.045 + 0.12, 0.1, 1))[:, None]
    faces = body.faces_of(parts.GROUP_SKIN)
    material = HEADWEAR if hat or outfit.headwear == "scarf" else HAIR
    return _layer(chosen, offset, keep, faces, _hair_texture(space, faces), material)


def _hair_thickness(outfit: Outfit, rng: np.random.Generator) -> float:
    low, high = {
        "buzz": (0.004, 0.004),
        "short": (0.01, 0.018),
        "full": (0.02, 0.034),
        "afro": (0.035, 0.06),
    }[outfit.hair]
    return float(rng.uniform(low, high))


def _long_hair(
    body: Body, space: GarmentSpace, outfit: Outfit, normals: Floats, rng: np.random.Generator
) -> Layer:
    template, crown = space.template, space.crown_z
    angle = np.abs(np.arctan2(template[:, 0], -(template[:, 1] - (space.face_y + 0.11))))
    if outfit.headwear == "scarf":
        face = np.maximum(template[:, 2] - (crown - 0.05), (crown - 0.245) - template[:, 2])
        keep = np.minimum(template[:, 2] - (space.neck_z - 0.03), np.maximum((angle - 0.6) * 0.1, face))
    else:
        ends = space.neck_z + rng.uniform(-0.22, 0.08)
        parting = np.maximum((angle - 0.75) * 0.1, template[:, 2] - (crown - 0.062))
        behind = np.maximum(template[:, 1] - space.face_y - 0.06, template[:, 2] - (crown - 0.2))
        keep = np.minimum.reduce([template[:, 2] - ends, parting, behind])
    faces = body.faces_of(parts.GROUP_HAIR)
    material = HEADWEAR if outfit.headwear == "scarf" else HAIR
    return _layer(parts.HAIR, normals * 0.004, keep, faces, _hair_texture(space, faces), material)
