"""Small pictures inside a page: data URIs, which need neither files nor a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dmx.data.images import BrokenImageError, decode
from dmx.data.shards import Split
from dmx.data.transforms import resize
from dmx.errors import DmxError

HEIGHT_PX = 128
# A whole scene as a query, say, gets no wider than two hits.
WIDTH_PX = 160
QUALITY = 85

Pixels = NDArray[np.uint8]


def thumbnail(encoded: bytes) -> bytes:
    """An image as a JPEG of at most 160 x 128 pixels, its proportions kept; small ones keep their size.

    Made of the pixels alone: what else a file holds (place, time, camera) stays out.

    Raises:
        BrokenImageError: the bytes cannot be decoded.
    """
    return as_jpeg(shrunk(decode(encoded)))


def shrunk(pixels: Pixels, height_px: int = HEIGHT_PX, width_px: int = WIDTH_PX) -> Pixels:
    """(H, W, 3) pixels made to fit into a box, their proportions kept; small ones keep their size."""
    height, width = pixels.shape[:2]
    scale = min(1.0, height_px / height, width_px / width)
    return resize(pixels, max(1, round(scale * height)), max(1, round(scale * width)))


def as_jpeg(pixels: Pixels, quality: int = QUALITY) -> bytes:
    """(H, W, 3) pixels, encoded."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def data_uri(jpeg: bytes) -> str:
    """A picture for `src`."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


class Pictures:
    """Thumbnails of a split's images.

    Args:
        split: where they are; None where that is unknown.
        lost: called once, with the reason, if one that was there cannot be read any more.
    """

    def __init__(self, split: Split | None, lost: Callable[[str], None]) -> None:
        self._split, self._lost, self._told = split, lost, False

    def uri(self, row: int) -> str | None:
        """A thumbnail for `src`; None where there is no picture."""
        if self._split is None:
            return None
        try:
            return data_uri(thumbnail(self._split.image_bytes(row)))
        except (BrokenImageError, DmxError) as error:
            if not self._told:
                self._told = True
                self._lost(str(error))
            return None
