"""The pictures of a report, made as its reader asked: as they are, with heads blurred, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dmx.data.images import BrokenImageError, decode
from dmx.data.shards import Split
from dmx.errors import DmxError
from dmx.report.activation import drawn_over
from dmx.report.faces import without_face
from dmx.search.pictures import Pixels, as_jpeg, data_uri, shrunk

Faces = Literal["show", "blur"]
HEIGHT_PX = 112
SHEET_HEIGHT_PX = 88
QUALITY = 80


@dataclass
class ReportPictures:
    """Small pictures of images.

    Attributes:
        shown: whether there are any pictures.
        faces: `blur` takes the head off, before anything is encoded.
        warn: called once with the reason, if an image cannot be read any more.
    """

    shown: bool
    faces: Faces
    warn: Callable[[str], None]
    _told: bool = False

    @property
    def named(self) -> bool:
        """Whether file names are shown: they may tell who is on an image that shall not be shown as it is."""
        return self.shown and self.faces == "show"

    def uri(self, split: Split, row: int, height_px: int = HEIGHT_PX) -> str | None:
        """A picture for `src`; None where there is none."""
        pixels = self._pixels(split, row, height_px)
        return None if pixels is None else data_uri(as_jpeg(pixels, QUALITY))

    def uris_with_map(self, split: Split, row: int, energy: NDArray[np.float32] | None) -> list[str | None]:
        """A picture, and the same under an activation map where there is one."""
        pixels = self._pixels(split, row, HEIGHT_PX)
        if pixels is None:
            return [None]
        drawn = [pixels] if energy is None else [pixels, drawn_over(pixels, energy)]
        return [data_uri(as_jpeg(picture, QUALITY)) for picture in drawn]

    def _pixels(self, split: Split, row: int, height_px: int) -> Pixels | None:
        if not self.shown:
            return None
        try:
            pixels = decode(split.image_bytes(row))
        except (BrokenImageError, DmxError) as error:
            if not self._told:
                self._told = True
                self.warn(f"pictures are missing: {error}")
            return None
        if self.faces == "blur":
            pixels = without_face(pixels)
        return shrunk(pixels, height_px)
