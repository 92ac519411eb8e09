"""What a camera does to light: exposure, tone, resolution, blur, noise, compression."""

from __future__ import annotations

import functools
import io
import math

import numpy as np
from numba import njit
from PIL import Image, ImageFilter

from dmx.synth.camera import Response
from dmx.synth.types import Bytes, Floats

TONE_STEPS = 4096
# Linear light beyond this is white.
TONE_MAX_ROOT = 2.0
NOISE_LENGTH = 1 << 20
FINAL_JPEG_QUALITY = 92
MIN_NATIVE_HEIGHT_PX = 44
MIN_NATIVE_WIDTH_PX = 20


@functools.lru_cache(maxsize=1)
def _noise_bank() -> Floats:
    return np.random.default_rng(0).standard_normal(NOISE_LENGTH, np.float32)


def _tone_table(response: Response) -> Bytes:
    """Bytes of the pixel for every step of the root of linear light."""
    light = np.linspace(0, TONE_MAX_ROOT, TONE_STEPS) ** 2
    compressed = (light / (1 + 0.18 * light)) ** (response.gamma / 2.2)
    value = (compressed - 0.5) * response.contrast + 0.5 + response.brightness
    return np.asarray(np.clip(value, 0, 1) * 255, np.uint8)


@njit(cache=True)
def _apply_tone(image: Floats, gain: Floats, saturation: float, table: Bytes, out: Bytes) -> None:
    scale = (len(table) - 1) / TONE_MAX_ROOT
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            red, green, blue = image[i, j, 0] * gain[0], image[i, j, 1] * gain[1], image[i, j, 2] * gain[2]
            grey = (red + green + blue) / 3
            for c in range(3):
                value = grey + (image[i, j, c] * gain[c] - grey) * saturation
                step = int(math.sqrt(max(value, 0.0)) * scale)
                out[i, j, c] = table[min(step, len(table) - 1)]


@njit(cache=True)
def _add_noise(image: Bytes, noise: Floats, start: int, amplitude: float, out: Bytes) -> None:
    """Add noise whose strength grows with the root of the signal, as a sensor's does."""
    position = start
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            for c in range(3):
                position += 1
                if position >= len(noise):
                    position = 0
                value = image[i, j, c] + noise[position] * amplitude * (
                    0.5 + math.sqrt(image[i, j, c] / 255.0)
                )
                out[i, j, c] = min(max(value, 0.0), 255.0)


@njit(cache=True)
def _smear(image: Floats, length: float, out: Floats) -> None:
    """Mean of `length` pixels (not necessarily whole) along every row."""
    reach = length / 2
    whole = int(reach)
    rest = reach - whole
    last = image.shape[1] - 1
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            for c in range(3):
                total = image[i, j, c] * 1.0
                for step in range(1, whole + 1):
                    total += image[i, max(j - step, 0), c] + image[i, min(j + step, last), c]
                edge = whole + 1
                total += rest * (image[i, max(j - edge, 0), c] + image[i, min(j + edge, last), c])
                out[i, j, c] = total / (1 + 2 * reach)


def develop(
    image: Floats, response: Response, exposure: float, native_height: float, rng: np.random.Generator
) -> bytes:
    """Turn linear light into the JPEG that a data set would hold.

    Args:
        image: (H, W, 3) linear light.
        response: the camera's.
        exposure: factor on the light.
        native_height: height in pixels that the camera itself records the crop at; a crop recorded smaller
            than H is enlarged, as a data set's images are.
        rng: of this image.

    Returns:
        JPEG bytes, H x W pixels.
    """
    height, width = image.shape[:2]
    rows = int(np.clip(native_height, MIN_NATIVE_HEIGHT_PX, height))
    columns = min(width, max(MIN_NATIVE_WIDTH_PX, round(rows * width / height)))
    motion_px = response.motion_px * rng.uniform(0, 1) * height / rows
    if motion_px > 0.3:
        smeared = np.empty_like(image)
        _smear(image, motion_px, smeared)
        image = smeared
    gain = (response.white_balance * (exposure * math.exp(rng.normal(0, 0.1)))).astype(np.float32)
    pixels = np.empty((height, width, 3), np.uint8)
    _apply_tone(image, gain, response.saturation, _tone_table(response), pixels)
    picture = Image.fromarray(pixels)
    if rows < height:
        smoothing = Image.Resampling.BOX if rows * 2 < height else Image.Resampling.BILINEAR
        picture = picture.resize((columns, rows), smoothing)
    blur_px = response.blur_px * rng.uniform(0.5, 1.4)
    if blur_px > 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(blur_px))
    recorded = np.asarray(picture)
    noisy = np.empty_like(recorded)
    amplitude = 255 * response.noise * rng.uniform(0.6, 1.4)
    _add_noise(recorded, _noise_bank(), int(rng.integers(NOISE_LENGTH)), amplitude, noisy)
    data = _jpeg(Image.fromarray(noisy), int(rng.uniform(*response.jpeg_quality)))
    if rows == height:
        return data
    enlarged = Image.open(io.BytesIO(data)).resize((width, height), Image.Resampling.BICUBIC)
    return _jpeg(enlarged, FINAL_JPEG_QUALITY)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
