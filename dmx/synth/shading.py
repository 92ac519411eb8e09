"""Compiled light kernels: shadow lookups, surface shading, shadows on the ground, compositing."""

from __future__ import annotations

import math

from numba import njit
from numpy.typing import NDArray

from dmx.synth.types import Bytes, Doubles, Floats, Ints

# Distance in metres within which a surface does not shadow itself.
SHADOW_BIAS_M = 0.03
SHADOW_REACH_M = 5.0


@njit(cache=True)
def _lit_share(
    shadow: Floats,
    basis: Doubles,
    window: tuple[float, float, float],
    x: float,
    y: float,
    z: float,
    bias: float,
) -> float:
    """Share of the key light that reaches a world point: the mean of four neighbours of the shadow map."""
    left, top, scale = window
    column = (basis[0, 0] * x + basis[0, 1] * y + basis[0, 2] * z - left) * scale - 0.5
    row = (basis[1, 0] * x + basis[1, 1] * y + basis[1, 2] * z - top) * scale - 0.5
    if column < 0 or row < 0 or column >= shadow.shape[1] - 1 or row >= shadow.shape[0] - 1:
        return 1.0
    near = basis[2, 0] * x + basis[2, 1] * y + basis[2, 2] * z + bias
    i, j = int(row), int(column)
    fy, fx = row - i, column - j
    lit = 0.0
    if shadow[i, j] < near:
        lit += (1 - fy) * (1 - fx)
    if shadow[i, j + 1] < near:
        lit += (1 - fy) * fx
    if shadow[i + 1, j] < near:
        lit += fy * (1 - fx)
    if shadow[i + 1, j + 1] < near:
        lit += fy * fx
    return lit


@njit(cache=True)
def shade(
    face_at: Ints,
    weight_at: Floats,
    faces: Ints,
    texture_at: Floats,
    material: NDArray,  # type: ignore[type-arg]
    vertices: Floats,
    normals: Floats,
    textures: Bytes,
    gloss: Floats,
    eye_z: float,
    light: Doubles,
    shadow: Floats,
    basis: Doubles,
    window: tuple[float, float, float],
    samples: int,
    out: Floats,
) -> None:
    """Add the light of every visible sample to its pixel.

    Args:
        face_at, weight_at: visibility as `rasterize` leaves it, (H s, W s) and (H s, W s, 2), s = samples.
        faces, texture_at, material: (F, 3), (F, 3, 2), (F,).
        vertices, normals: (V, 3) world.
        textures: (materials, S, S, 3) roots of linear light; gloss (materials,).
        eye_z: height of the camera, which stands at (0, 0, eye_z).
        light: (4, 3) direction to the key light, key, sky and ground strength.
        samples: a side of a pixel.
        shadow, basis, window: shadow map, the light's axes (3, 3), and corner x, y and pixels per metre.
        out: (H, W, 4) linear light and number of covered samples, added to.
    """
    size = textures.shape[1]
    for y in range(face_at.shape[0]):
        for x in range(face_at.shape[1]):
            f = face_at[y, x]
            if f < 0:
                continue
            w1, w2 = weight_at[y, x, 0], weight_at[y, x, 1]
            w0 = 1.0 - w1 - w2
            i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
            px = w0 * vertices[i, 0] + w1 * vertices[j, 0] + w2 * vertices[k, 0]
            py = w0 * vertices[i, 1] + w1 * vertices[j, 1] + w2 * vertices[k, 1]
            pz = w0 * vertices[i, 2] + w1 * vertices[j, 2] + w2 * vertices[k, 2]
            nx = w0 * normals[i, 0] + w1 * normals[j, 0] + w2 * normals[k, 0]
            ny = w0 * normals[i, 1] + w1 * normals[j, 1] + w2 * normals[k, 1]
            nz = w0 * normals[i, 2] + w1 * normals[j, 2] + w2 * normals[k, 2]
            inverse = 1.0 / (math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9)
            vx, vy, vz = -px, -py, eye_z - pz
            away = 1.0 / math.sqrt(vx * vx + vy * vy + vz * vz)
            vx, vy, vz = vx * away, vy * away, vz * away
            if nx * vx + ny * vy + nz * vz < 0:
                inverse = -inverse  # cloth is seen from both sides
            nx, ny, nz = nx * inverse, ny * inverse, nz * inverse
            lit = nx * light[0, 0] + ny * light[0, 1] + nz * light[0, 2]
            highlight = 0.0
            m = material[f]
            if lit > 0:
                lit *= _lit_share(shadow, basis, window, px, py, pz, SHADOW_BIAS_M)
                hx, hy, hz = light[0, 0] + vx, light[0, 1] + vy, light[0, 2] + vz
                half = (nx * hx + ny * hy + nz * hz) / (math.sqrt(hx * hx + hy * hy + hz * hz) + 1e-9)
                if lit > 0 and half > 0:
                    squared = half * half
                    eighth = squared * squared * squared * squared
                    highlight = gloss[m] * eighth * eighth * eighth
            else:
                lit = 0.0
            sky_share = 0.5 + 0.5 * nz
            open_share = 0.55 + 0.45 * min(1.0, max(0.0, pz / 1.1 + 0.25))  # the ground is close to the feet
            u = w0 * texture_at[f, 0, 0] + w1 * texture_at[f, 1, 0] + w2 * texture_at[f, 2, 0]
            v = w0 * texture_at[f, 0, 1] + w1 * texture_at[f, 1, 1] + w2 * texture_at[f, 2, 1]
            column = min(int((u - math.floor(u)) * size), size - 1)
            row = min(int((v - math.floor(v)) * size), size - 1)
            for c in range(3):
                ambient = open_share * (light[2, c] * sky_share + light[3, c] * (1 - sky_share))
                albedo = (textures[m, row, column, c] / 255.0) ** 2
                radiance = albedo * (light[1, c] * lit + ambient) + highlight * light[1, c]
                out[y // samples, x // samples, c] += radiance
            out[y // samples, x // samples, 3] += 1.0


@njit(cache=True)
def shade_ground(
    image: Floats,
    window: tuple[float, float, float, float],
    rotation: Doubles,
    eye_z: float,
    feet: tuple[float, float],
    shadow: Floats,
    basis: Doubles,
    shadow_window: tuple[float, float, float],
    strength: float,
) -> None:
    """Darken the ground (H, W, 3) where the person keeps the key light off, and close to the feet; in place.

    Args:
        window: image plane x and y of the corner, and plane units per pixel in x and y.
        feet: where the person stands, metres.
        strength: share of the ground's light that is key light.
    """
    left, top, step_x, step_y = window
    for i in range(image.shape[0]):
        up = -(top + (i + 0.5) * step_y)
        for j in range(image.shape[1]):
            right = left + (j + 0.5) * step_x
            down = rotation[0, 2] * right + rotation[1, 2] * up + rotation[2, 2]
            if down > -1e-4:
                continue
            reach = -eye_z / down
            x = reach * (rotation[0, 0] * right + rotation[1, 0] * up + rotation[2, 0])
            y = reach * (rotation[0, 1] * right + rotation[1, 1] * up + rotation[2, 1])
            distance = (x - feet[0]) ** 2 + (y - feet[1]) ** 2
            if distance > SHADOW_REACH_M**2:
                continue
            lit = _lit_share(shadow, basis, shadow_window, x, y, 0.0, 0.0)
            factor = 1 - strength * (1 - lit)
            if distance < 0.8:
                factor *= 1 - 0.45 * math.exp(-distance / 0.07)
            for c in range(3):
                image[i, j, c] *= factor


@njit(cache=True)
def lay_over(image: Floats, layer: Floats, samples: float) -> None:
    """Put a shaded layer (H, W, 4: summed light and sample count) over the image (H, W, 3), in place."""
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            count = layer[i, j, 3]
            if count > 0:
                bare = 1.0 - count / samples
                for c in range(3):
                    image[i, j, c] = image[i, j, c] * bare + layer[i, j, c] / samples
