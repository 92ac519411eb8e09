"""Boxes that another program has found, in the format of MOTChallenge.

A line a box: `frame, id, left, top, width, height, conf` and whatever else; frames count from 1, id and conf
are -1 where nothing is known.
Source: Milan et al., "MOT16: A benchmark for multi-object tracking", 2016, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmx.errors import DmxError
from dmx.video.detector import Found
from dmx.video.films import Film

FIELDS = ("frame", "id", "left", "top", "width", "height", "conf")
NOTHING = Found(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int64))


class Boxes:
    """The boxes of one video, by frame.

    Attributes:
        path: where they were read.
        last_frame: the highest number of a frame, from 0; -1: there are none.
    """

    def __init__(self, path: Path, by_frame: dict[int, Found]) -> None:
        self.path, self._by_frame = path, by_frame
        self.last_frame = max(by_frame, default=-1)

    def of(self, frame: int) -> Found:
        """The people of a frame, numbered from 0."""
        return self._by_frame.get(frame, NOTHING)


def read_boxes(path: Path, least_score: float | None) -> Boxes:
    """Read a file.

    Args:
        path: of the file.
        least_score: boxes with a lower conf are left out; None: those with a conf of 0, which MOTChallenge
            marks as not to be looked at.

    Raises:
        DmxError: no such file, or a line that is not a box; names it.
    """
    rows: dict[int, list[tuple[float, ...]]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DmxError(f"{path}: wanted a file of boxes, found one that cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        frame, track, left, top, width, height, conf = _numbers(path, number, line)
        score = math.nan if conf < 0 else conf
        if (score == 0 and least_score is None) or score < (least_score or 0.0):
            continue
        rows.setdefault(int(frame) - 1, []).append((left, top, left + width, top + height, score, track))
    return Boxes(path, {frame: _found(some) for frame, some in rows.items()})


def _numbers(path: Path, number: int, line: str) -> list[float]:
    texts = [text.strip() for text in line.split(",")]
    wanted = f"wanted {', '.join(FIELDS)}, as MOTChallenge has them"
    try:
        values = [float(text) for text in texts[: len(FIELDS)]]
    except ValueError:
        raise DmxError(f"{path}, line {number}: {wanted}, found {line.strip()[:80]!r}") from None
    if len(values) < len(FIELDS) - 1 or not all(map(math.isfinite, values)):
        raise DmxError(f"{path}, line {number}: {wanted}, found {line.strip()[:80]!r}")
    if len(values) < len(FIELDS):
        values.append(-1.0)  # Without conf: nothing is known of it.
    frame, track, _, _, width, height, _ = values
    if frame < 1 or frame != int(frame) or track != int(track) or width <= 0 or height <= 0:
        raise DmxError(
            f"{path}, line {number}: wanted a frame from 1, a whole id, a width and a height above 0, found "
            f"{line.strip()[:80]!r}"
        )
    return values


def _found(rows: Sequence[tuple[float, ...]]) -> Found:
    values = np.array(rows, np.float64)
    tracks = values[:, 5].astype(np.int64)
    return Found(
        values[:, :4].astype(np.float32), values[:, 4].astype(np.float32), np.where(tracks < 0, -1, tracks)
    )


def files_of_boxes(sources: Sequence[str], films: Sequence[Film]) -> list[Path]:
    """The file of each video: as many as there are, in the same order, or `NAME.txt` in a folder.

    Raises:
        DmxError: there are more or fewer files than videos, or a video has none in the folder.
    """
    if len(sources) == 1 and Path(sources[0]).expanduser().is_dir():
        folder = Path(sources[0]).expanduser()
        paths = [folder / Path(film.name).with_suffix(".txt") for film in films]
        for film, path in zip(films, paths, strict=True):
            if not path.is_file():
                raise DmxError(
                    f"--boxes {folder}: wanted {path.relative_to(folder)} for {film.name}, found none"
                )
        return paths
    if len(sources) != len(films):
        raise DmxError(
            f"--boxes: wanted a file for each of {len(films)} videos, or a folder of them, found "
            f"{len(sources)}"
        )
    return [Path(source).expanduser() for source in sources]
