"""Who is in the frames of a video: by a detector, or by boxes that another program has found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dmx.video.boxes import Boxes
from dmx.video.decode import Frame
from dmx.video.detector import Detector, Found
from dmx.video.films import Film
from dmx.video.journal import Journal


class Finder(Protocol):
    """Tells who is in some frames of a video."""

    def find(self, film: Film, frames: Sequence[Frame]) -> list[Found]:
        """The people in each frame; all frames are of one size."""
        ...


class DetectorFinder:
    """Looks at the pixels, unless the journal knows."""

    def __init__(self, detector: Detector, journal: Journal) -> None:
        self._detector, self._journal = detector, journal

    def find(self, film: Film, frames: Sequence[Frame]) -> list[Found]:
        """The people in each frame; all frames are of one size."""
        numbers = [frame.number for frame in frames]
        found = self._journal.recall(film.name, numbers)
        if found is None:
            found = self._detector.detect(np.stack([frame.pixels for frame in frames]))
            self._journal.note(film.name, numbers, found)
        return found


class BoxesFinder:
    """Looks up boxes.

    Args:
        boxes: of each video, by its name.
    """

    def __init__(self, boxes: dict[str, Boxes]) -> None:
        self._boxes = boxes

    def find(self, film: Film, frames: Sequence[Frame]) -> list[Found]:
        """The people in each frame."""
        return [self._boxes[film.name].of(frame.number) for frame in frames]

    def complaints(self, film: Film, frames: int) -> list[str]:
        """Boxes of frames that the video does not have."""
        boxes = self._boxes[film.name]
        if boxes.last_frame < frames:
            return []
        return [
            f"{boxes.path}: has boxes up to frame {boxes.last_frame + 1} (counted from 1), but {film.path} "
            f"has {frames:,} frames: are they of this video?"
        ]
