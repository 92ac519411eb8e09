"""Compiled geometry kernels: blending, skinning, normals, projection, visibility.

None uses fast-math or threads, so that results do not depend on how the compiler may reorder sums.
"""

from __future__ import annotations

import math

from numba import njit
from numpy.typing import NDArray

from dmx.synth.types import Doubles, Floats, Ints, Mask


@njit(cache=True)
def blend_targets(targets: NDArray, coefficients: Floats, vertices: Floats) -> None:  # type: ignore[type-arg]
    """Add the weighted targets (K, N) to the flat vertices (N,), in place."""
    for k in range(len(coefficients)):
        weight = coefficients[k]
        if weight != 0.0:
            for i in range(len(vertices)):
                vertices[i] += weight * targets[k, i]


@njit(cache=True)
def forward_kinematics(
    parents: Ints, local: Doubles, joints: Doubles, rotation: Doubles, position: Doubles
) -> None:
    """World rotation (B, 3, 3) and position (B, 3) of every bone from local rotations about rest joints."""
    for bone in range(len(parents)):
        parent = parents[bone]
        if parent < 0:
            rotation[bone] = local[bone]
            position[bone] = joints[bone]
            continue
        for a in range(3):
            offset = 0.0
            for k in range(3):
                offset += rotation[parent, a, k] * (joints[bone, k] - joints[parent, k])
                rotation[bone, a, k] = (
                    rotation[parent, a, 0] * local[bone, 0, k]
                    + rotation[parent, a, 1] * local[bone, 1, k]
                    + rotation[parent, a, 2] * local[bone, 2, k]
                )
            position[bone, a] = position[parent, a] + offset


@njit(cache=True)
def skin_vertices(
    rest: Floats, bones: Ints, weights: Floats, rotation: Floats, shift: Floats, out: Floats
) -> None:
    """Linear blend skinning of the first len(rest) vertices of `out`; bone b maps x to R_b x + shift_b."""
    for i in range(rest.shape[0]):
        x, y, z = rest[i, 0], rest[i, 1], rest[i, 2]
        for a in range(3):
            out[i, a] = 0.0
        for k in range(weights.shape[1]):
            weight = weights[i, k]
            if weight == 0.0:
                break  # weights are sorted, largest first
            b = bones[i, k]
            for a in range(3):
                out[i, a] += weight * (
                    rotation[b, a, 0] * x + rotation[b, a, 1] * y + rotation[b, a, 2] * z + shift[b, a]
                )


@njit(cache=True)
def vertex_normals(vertices: Floats, faces: Ints, normals: Floats) -> None:
    """Area-weighted unit normals (V, 3), in place."""
    normals[:] = 0.0
    for f in range(faces.shape[0]):
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        ax = vertices[j, 0] - vertices[i, 0]
        ay = vertices[j, 1] - vertices[i, 1]
        az = vertices[j, 2] - vertices[i, 2]
        bx = vertices[k, 0] - vertices[i, 0]
        by = vertices[k, 1] - vertices[i, 1]
        bz = vertices[k, 2] - vertices[i, 2]
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        for corner in (i, j, k):
            normals[corner, 0] += nx
            normals[corner, 1] += ny
            normals[corner, 2] += nz
    for i in range(normals.shape[0]):
        length = math.sqrt(normals[i, 0] ** 2 + normals[i, 1] ** 2 + normals[i, 2] ** 2) + 1e-12
        for a in range(3):
            normals[i, a] /= length


@njit(cache=True)
def turn_and_place(vertices: Floats, used: Mask, heading: float, x: float, y: float, root: Doubles) -> None:
    """Put a posed person on the ground at (x, y) metres, turned by `heading` radians; in place."""
    floor = 1e9
    for i in range(vertices.shape[0]):
        if used[i] and vertices[i, 2] < floor:
            floor = vertices[i, 2]
    cosine, sine = math.cos(heading), math.sin(heading)
    for i in range(vertices.shape[0]):
        dx, dy = vertices[i, 0] - root[0], vertices[i, 1] - root[1]
        vertices[i, 0] = cosine * dx - sine * dy + x
        vertices[i, 1] = sine * dx + cosine * dy + y
        vertices[i, 2] -= floor


@njit(cache=True)
def project(vertices: Floats, rotation: Doubles, height: float, out: Floats) -> None:
    """Image plane x, y (focal length 1, y down) and inverse depth of vertices; camera at (0, 0, height)."""
    for i in range(vertices.shape[0]):
        x, y, z = vertices[i, 0], vertices[i, 1], vertices[i, 2] - height
        right = rotation[0, 0] * x + rotation[0, 1] * y + rotation[0, 2] * z
        up = rotation[1, 0] * x + rotation[1, 1] * y + rotation[1, 2] * z
        depth = rotation[2, 0] * x + rotation[2, 1] * y + rotation[2, 2] * z
        out[i, 0] = right / depth
        out[i, 1] = -up / depth
        out[i, 2] = 1.0 / depth


@njit(cache=True)
def to_basis(vertices: Floats, basis: Doubles, out: Floats) -> None:
    """Coordinates (V, 3) along the three rows of `basis`."""
    for i in range(vertices.shape[0]):
        for a in range(3):
            out[i, a] = (
                basis[a, 0] * vertices[i, 0] + basis[a, 1] * vertices[i, 1] + basis[a, 2] * vertices[i, 2]
            )


@njit(cache=True)
def bounds(points: Floats, used: Mask) -> tuple[float, float, float, float]:
    """Least and largest x and y of the used points: x0, y0, x1, y1."""
    x0, y0, x1, y1 = 1e9, 1e9, -1e9, -1e9
    for i in range(points.shape[0]):
        if used[i]:
            x0, x1 = min(x0, points[i, 0]), max(x1, points[i, 0])
            y0, y1 = min(y0, points[i, 1]), max(y1, points[i, 1])
    return x0, y0, x1, y1


@njit(cache=True)
def rasterize(
    points: Floats,
    window: tuple[float, float, float, float],
    faces: Ints,
    keep: Floats,
    nearest: Floats,
    face_at: Ints,
    weight_at: Floats,
) -> None:
    """Find the nearest face at every pixel centre.

    Args:
        points: (V, 3) x, y and nearness (larger is nearer), nearness linear over the plane.
        window: x, y of the window's corner and pixels per unit in x and y.
        faces: (F, 3).
        keep: (V,) a pixel whose interpolated value is negative is left out: that cuts hems.
        nearest: (H, W) nearness found so far, updated.
        face_at: (H, W) face number, updated.
        weight_at: (H, W, 2) barycentric weights of the face's second and third corner, updated.
    """
    rows, columns = nearest.shape
    left, top, scale_x, scale_y = window
    for f in range(faces.shape[0]):
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        keep_i, keep_j, keep_k = keep[i], keep[j], keep[k]
        if keep_i < 0 and keep_j < 0 and keep_k < 0:
            continue
        x0, y0 = (points[i, 0] - left) * scale_x - 0.5, (points[i, 1] - top) * scale_y - 0.5
        x1, y1 = (points[j, 0] - left) * scale_x - 0.5, (points[j, 1] - top) * scale_y - 0.5
        x2, y2 = (points[k, 0] - left) * scale_x - 0.5, (points[k, 1] - top) * scale_y - 0.5
        first_x = max(0, math.ceil(min(x0, x1, x2)))
        last_x = min(columns - 1, math.floor(max(x0, x1, x2)))
        first_y = max(0, math.ceil(min(y0, y1, y2)))
        last_y = min(rows - 1, math.floor(max(y0, y1, y2)))
        if first_x > last_x or first_y > last_y:
            continue
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-9:
            continue
        inverse = 1.0 / area
        near_i, near_j, near_k = points[i, 2], points[j, 2], points[k, 2]
        hem = keep_i < 0 or keep_j < 0 or keep_k < 0
        for y in range(first_y, last_y + 1):
            for x in range(first_x, last_x + 1):
                w1 = ((x - x0) * (y2 - y0) - (x2 - x0) * (y - y0)) * inverse
                w2 = ((x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)) * inverse
                w0 = 1.0 - w1 - w2
                if w0 < 0 or w1 < 0 or w2 < 0:
                    continue
                near = w0 * near_i + w1 * near_j + w2 * near_k
                if near <= nearest[y, x]:
                    continue
                if hem and w0 * keep_i + w1 * keep_j + w2 * keep_k < 0:
                    continue
                nearest[y, x] = near
                face_at[y, x] = f
                weight_at[y, x, 0] = w1
                weight_at[y, x, 1] = w2


@njit(cache=True)
def depth_map(
    points: Floats, window: tuple[float, float, float], faces: Ints, keep: Floats, nearest: Floats
) -> None:
    """Like `rasterize`, for the nearness alone: what the light sees.

    `window` is x and y of the corner and pixels per unit.
    """
    rows, columns = nearest.shape
    left, top, scale = window
    for f in range(faces.shape[0]):
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        if keep[i] < 0 and keep[j] < 0 and keep[k] < 0:
            continue
        x0, y0 = (points[i, 0] - left) * scale - 0.5, (points[i, 1] - top) * scale - 0.5
        x1, y1 = (points[j, 0] - left) * scale - 0.5, (points[j, 1] - top) * scale - 0.5
        x2, y2 = (points[k, 0] - left) * scale - 0.5, (points[k, 1] - top) * scale - 0.5
        first_x = max(0, math.ceil(min(x0, x1, x2)))
        last_x = min(columns - 1, math.floor(max(x0, x1, x2)))
        first_y = max(0, math.ceil(min(y0, y1, y2)))
        last_y = min(rows - 1, math.floor(max(y0, y1, y2)))
        if first_x > last_x or first_y > last_y:
            continue
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-9:
            continue
        inverse = 1.0 / area
        near_i, near_j, near_k = points[i, 2], points[j, 2], points[k, 2]
        for y in range(first_y, last_y + 1):
            for x in range(first_x, last_x + 1):
                w1 = ((x - x0) * (y2 - y0) - (x2 - x0) * (y - y0)) * inverse
                w2 = ((x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)) * inverse
                w0 = 1.0 - w1 - w2
                if w0 >= 0 and w1 >= 0 and w2 >= 0:
                    nearest[y, x] = max(nearest[y, x], w0 * near_i + w1 * near_j + w2 * near_k)
