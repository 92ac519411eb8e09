"""Decoding: encoded bytes to pixels, and whether that is possible at all."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dmx.errors import DmxError

# A person crop has thousands of pixels. What claims more than this is a whole scan or an attack on memory.
MAX_PIXELS = 1 << 26
# What Pillow's decoders raise on files that are not what they claim.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    OverflowError,
    IndexError,
    KeyError,
    TypeError,
    MemoryError,
)


class BrokenImageError(ValueError):
    """Bytes that cannot be decoded; the message is the reason."""


def _open(encoded: bytes) -> Image.Image:
    if not encoded:
        raise BrokenImageError("empty: zero bytes")
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:
        raise BrokenImageError(f"not an image: no known format in {len(encoded)} bytes") from None
    except Image.DecompressionBombError as error:
        raise BrokenImageError(f"decompression bomb: {error}") from None
    except DECODE_ERRORS as error:
        raise BrokenImageError(f"not decodable: {error}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BrokenImageError(
            f"decompression bomb: {width} x {height} pixels, at most {MAX_PIXELS} are decoded"
        )
    if width < 1 or height < 1:
        raise BrokenImageError(f"no pixels: {width} x {height}")
    return image


def broken_reason(encoded: bytes) -> str | None:
    """Why an image cannot be decoded, or None when it can. Reads all of it: a cut file is noticed."""
    try:
        image = _open(encoded)
        # A JPEG is decoded at an eighth of its size: all of its data is read, few of its pixels are made.
        image.draft(None, (1, 1))
        image.load()
    except BrokenImageError as error:
        return str(error)
    except DECODE_ERRORS as error:
        return f"not decodable: {error}"
    return None


def decode_resized(encoded: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Decode an image to RGB and resize it, bicubic with anti-aliasing.

    Args:
        encoded: bytes of a file.
        height: of the result, pixels.
        width: of the result, pixels.

    Returns:
        (height, width, 3) uint8, not necessarily writable.

    Raises:
        BrokenImageError: the bytes cannot be decoded.
    """
    image = _open(encoded)
    try:
        if image.mode != "RGB":
            image = image.convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image)
    except DECODE_ERRORS as error:
        raise BrokenImageError(f"not decodable: {error}") from None


def undecodable(where: str, key: str, error: BrokenImageError) -> DmxError:
    """The error of a whole run that meets an image it cannot decode."""
    return DmxError(
        f"{where}: image {key}: wanted an image that can be decoded, found one that is {error}; "
        "`dmx ingest` leaves such images out"
    )
