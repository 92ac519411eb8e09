"""Small pictures inside a page: data URIs, which need neither files nor a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

from PIL import Image

from dmx.data.images import BrokenImageError, decode
from dmx.data.shards import Split
from dmx.data.transforms import resize
from dmx.errors import DmxError

HEIGHT_PX = 128
# A whole scene as a query, say, gets no wider than two hits.
WIDTH_PX = 160
QUALITY = 85


def thumbnail(encoded: bytes) -> bytes:
    """An image as a JPEG of at most 160 x 128 pixels, its proportions kept; small ones keep their size.

    Made of the pixels alone: what else a file holds (place, time, camera) stays out.

    Raises:
        BrokenImageError: the bytes cannot be decoded.
    """
    pixels = decode(encoded)
    height, width = pixels.shape[:2]
    scale = min(1.0, HEIGHT_PX / height, WIDTH_PX / width)
    small = resize(pixels, max(1, round(scale * height)), max(1, round(scale * width)))
    buffer = io.BytesIO()
    Image.fromarray(small).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


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
            return (
                f"data:image/jpeg;base64,{base64.b64encode(thumbnail(self._split.image_bytes(row))).decode()}"
            )
        except (BrokenImageError, DmxError) as error:
            if not self._told:
                self._told = True
                self._lost(str(error))
            return None
