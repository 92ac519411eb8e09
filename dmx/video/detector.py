"""What finds people in frames: one small protocol, so that another detector is one file more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Found:
    """The people of one frame.

    Attributes:
        boxes: (n, 4) float32, x1, y1, x2, y2 in pixels; may reach beyond the frame.
        scores: (n,) float32 from 0 to 1; NaN: nothing tells.
        tracks: (n,) int64, who it is within the video; -1 unknown.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    tracks: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)


class Detector(Protocol):
    """Finds people in frames by their pixels."""

    @property
    def fingerprint(self) -> str:
        """What tells it from others: its results for the same frames are the same if this is."""
        ...

    def detect(self, frames: NDArray[np.uint8]) -> list[Found]:
        """The people in each of (B, H, W, 3) RGB frames, without duplicates."""
        ...


def without_tracks(boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> Found:
    """What a detector finds that looks at each frame alone."""
    return Found(boxes, scores, np.full(len(scores), -1, np.int64))
