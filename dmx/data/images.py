"""Decoding: encoded bytes to pixels, and whether that is possible at all.

JPEGs go through simplejpeg, which takes less than half of Pillow's time and gives the same pixels
(benchmarks/decoders.py). Everything else, and every JPEG that it does not take as it is, goes through Pillow,
which also has the last word on what is broken.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dmx.errors import DmxError
from dmx.names import printable

# A person crop has thousands of pixels. What claims more than this is a whole scan or an attack on memory.
MAX_PIXELS = 1 << 26
JPEG_START = b"\xff\xd8\xff"
# As simplejpeg names them. Pillow inverts and converts CMYK in its own way.
JPEG_SPACES = ("YCbCr", "Gray", "RGB")
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


def decode(encoded: bytes) -> NDArray[np.uint8]:
    """Decode an image to RGB.

    Args:
        encoded: bytes of a file.

    Returns:
        (height, width, 3) uint8, not necessarily writable.

    Raises:
        BrokenImageError: the bytes cannot be decoded.
    """
    pixels = _decode_jpeg(encoded)
    if pixels is not None:
        return pixels
    image = _open(encoded)
    try:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except DECODE_ERRORS as error:
        raise BrokenImageError(f"not decodable: {error}") from None


def _decode_jpeg(encoded: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a JPEG in a common colour space without any fault; None for all else."""
    if not encoded.startswith(JPEG_START):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
        if space not in JPEG_SPACES or height * width > MAX_PIXELS:
            return None
        # The exact transform and interpolation: those of Pillow.
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            encoded, "RGB", fastdct=False, fastupsample=False, strict=True
        )
    except ValueError:
        return None
    return pixels


def undecodable(where: str, key: str, error: BrokenImageError) -> DmxError:
    """The error of a whole run that meets an image it cannot decode."""
    return DmxError(
        f"{where}: image {printable(key)}: wanted an image that can be decoded, found one that is {error}; "
        "`dmx ingest` leaves such images out"
    )
