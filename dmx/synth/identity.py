"""One person, ready to be posed and drawn: everything that stays the same in all their images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmx.synth import accessories, garments
from dmx.synth.accessories import Prop
from dmx.synth.body import Body, Phenotype
from dmx.synth.cloth import Painter
from dmx.synth.gait import Gait, draw_gait
from dmx.synth.garment_space import GarmentSpace, measure
from dmx.synth.garments import Layer
from dmx.synth.raster import vertex_normals
from dmx.synth.styles import Style
from dmx.synth.types import Bytes, Doubles, Floats, Ints, Mask, stream
from dmx.synth.wardrobe import Outfit, draw_outfit, draw_phenotype

# Kinds of people: labelled ones, and passers-by who only ever stand in somebody's way.
LABELLED, PASSER_BY = 0, 1


@dataclass(frozen=True)
class PersonMesh:
    """All layers and props of a person as one mesh.

    Attributes:
        rest: (R, 3) rest vertices that are skinned, metres; weight_bones, weights (R, 6).
        keep: (V,) see `rasterize`; the vertices of props follow the R skinned ones.
        used: (V,) whether the vertex can be seen.
        faces: (F, 3); texture: (F, 3, 2); material: (F,).
    """

    rest: Floats
    weight_bones: Ints
    weights: Floats
    keep: Floats
    used: Mask
    faces: Ints
    texture: Floats
    material: NDArray[np.int8]


@dataclass(frozen=True)
class Identity:
    """A person.

    Attributes:
        phenotype, outfit, gait: what was drawn.
        joints: (B, 3) rest joints, metres.
        mesh, props: what is drawn; props are rigid.
        textures: (materials, S, S, 3) roots of linear light.
    """

    phenotype: Phenotype
    outfit: Outfit
    gait: Gait
    joints: Doubles
    mesh: PersonMesh
    props: tuple[Prop, ...]
    textures: Bytes


def build_identity(
    body: Body, style: Style, seed: int, number: int, *, kind: int = LABELLED, texture_size: int = 256
) -> Identity:
    """Make the person of a key.

    Args:
        body: the body model.
        style: decides what people wear.
        seed: seed of the whole data set.
        number: which person.
        kind: LABELLED or PASSER_BY; the same number gives different people.
        texture_size: pixels a side.
    """
    key = (kind, seed, style.number, number)
    shape_rng, outfit_rng = stream("shape", *key), stream("outfit", *key)
    phenotype = draw_phenotype(shape_rng)
    outfit = draw_outfit(outfit_rng, style.wardrobe, phenotype)
    space = measure(body)
    shape = body.rest_shape(phenotype)
    joints = body.joints(shape)
    layers, props = _dress(body, space, outfit, shape, joints, outfit_rng)
    mesh = _assemble(body, shape, layers, props)
    painter = Painter(stream("cloth", *key), texture_size, style.wardrobe, outfit, space.neck_z)
    return Identity(
        phenotype=phenotype,
        outfit=outfit,
        gait=draw_gait(stream("gait", *key), body, joints),
        joints=joints,
        mesh=mesh,
        props=tuple(props),
        textures=painter.paint(phenotype),
    )


def _dress(
    body: Body,
    space: GarmentSpace,
    outfit: Outfit,
    shape: Floats,
    joints: Doubles,
    rng: np.random.Generator,
) -> tuple[list[Layer], list[Prop]]:
    normals = np.empty_like(shape)
    vertex_normals(shape, body.faces, normals)
    hems = garments.cut(space, body, outfit)
    layers = garments.clothes(body, space, outfit, hems, normals)
    head = garments.head_cover(body, space, outfit, normals, rng)
    layers += head + garments.skin(body, space, outfit, hems)
    props = accessories.bag(body, space, outfit, shape, joints)
    if head:
        props += accessories.head_props(body, outfit, shape[head[0].vertices] + head[0].offset, rng)
    return layers, props


def _assemble(body: Body, shape: Floats, layers: list[Layer], props: list[Prop]) -> PersonMesh:
    """Join layers and props into one mesh, without faces and vertices that can never be seen."""
    faces, texture, material = [], [], []
    rest, keep, source = [], [], []
    count = 0
    for layer in layers:
        keep_at = np.full(len(shape), -2.0, np.float32)
        keep_at[layer.vertices] = layer.keep
        corners = keep_at[layer.faces]
        shown = (corners > -2.0).all(axis=1) & (corners >= 0).any(axis=1)
        needed = np.zeros(len(shape), bool)
        needed[layer.faces[shown]] = True
        chosen = needed[layer.vertices]
        vertices = layer.vertices[chosen]
        renumber = np.zeros(len(shape), np.int32)
        renumber[vertices] = np.arange(count, count + len(vertices), dtype=np.int32)
        faces.append(renumber[layer.faces[shown]])
        texture.append(layer.texture[shown])
        material.append(layer.material[shown])
        rest.append(shape[vertices] + layer.offset[chosen])
        keep.append(layer.keep[chosen])
        source.append(vertices)
        count += len(vertices)
    for prop in props:
        faces.append(prop.faces + np.int32(count))
        texture.append(prop.uvs[prop.faces])
        material.append(np.full(len(prop.faces), prop.material, np.int8))
        keep.append(np.ones(len(prop.vertices), np.float32))
        count += len(prop.vertices)
    of_base = np.concatenate(source)
    return PersonMesh(
        rest=np.concatenate(rest),
        weight_bones=body.weight_bones[of_base],
        weights=body.weights[of_base],
        keep=np.concatenate(keep),
        used=_used(np.concatenate(faces), np.concatenate(keep)),
        faces=np.concatenate(faces),
        texture=np.concatenate(texture),
        material=np.concatenate(material),
    )


def _used(faces: Ints, keep: Floats) -> Mask:
    """Which vertices bound the visible person: those inside a garment, not the ones just beyond its hem."""
    used = np.zeros(len(keep), bool)
    used[faces] = True
    return np.asarray(used & (keep >= 0))
