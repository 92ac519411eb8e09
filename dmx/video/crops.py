"""From a box to what is cut out of a frame: wider if asked, inside of the frame, of a person's shape."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Rules:
    """Which boxes become crops.

    Attributes:
        margin: added on each side, as a share of the box's width and height.
        least_height_px: of a crop.
        least_aspect, most_aspect: of a crop, height by width.
    """

    margin: float = 0.0
    least_height_px: int = 64
    least_aspect: float = 1.0
    most_aspect: float = 6.0


@dataclass
class Refused:
    """How many boxes were left out, and why."""

    small: int = 0
    odd: int = 0


def cut(box: Iterable[float], height: int, width: int, rules: Rules, refused: Refused) -> list[int] | None:
    """The whole pixels x1, y1, x2, y2 that a box becomes, x2 and y2 outside; None: left out, and counted.

    Args:
        box: x1, y1, x2, y2 in pixels, anywhere.
        height, width: of the frame, pixels.
        rules: which boxes become crops.
        refused: counts those that do not.
    """
    x1, y1, x2, y2 = (float(value) for value in box)
    more_x, more_y = rules.margin * (x2 - x1), rules.margin * (y2 - y1)
    left, top = max(0, math.floor(x1 - more_x)), max(0, math.floor(y1 - more_y))
    right, bottom = min(width, math.ceil(x2 + more_x)), min(height, math.ceil(y2 + more_y))
    if bottom - top < rules.least_height_px or right <= left:
        refused.small += 1
        return None
    if not rules.least_aspect <= (bottom - top) / (right - left) <= rules.most_aspect:
        refused.odd += 1
        return None
    return [left, top, right, bottom]


def encode(frame: NDArray[np.uint8], box: list[int]) -> bytes:
    """A part of a frame (H, W, 3) as a JPEG of quality 95 with colours at full size."""
    left, top, right, bottom = box
    pixels = np.ascontiguousarray(frame[top:bottom, left:right])
    encoded: bytes = simplejpeg.encode_jpeg(pixels, JPEG_QUALITY, "RGB", "444", fastdct=False)
    return encoded
