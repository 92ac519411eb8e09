"""What a detector has found so far, so that a run which was killed does not look at those frames again.

    OUT/.detections.jsonl.tmp    a line that tells what it depends on, then a line a batch

It is deleted once the data set is whole, and kept when no crop came out of it. Numbers come back to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dmx.video.detector import Found
from dmx.writing import write_whole

NAME = ".detections.jsonl.tmp"


class Journal:
    """Use it as a context manager.

    Args:
        folder: to keep it in; None: nothing is kept.
        settings: what detections depend on, as JSON has it; those of other settings are thrown away.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self._path = None if folder is None else folder / NAME
        self._settings = json.loads(json.dumps(settings))
        self._lines: dict[tuple[str, int], str] = {}
        self._file: Any = None

    def __enter__(self) -> Self:
        if self._path is not None:
            self._read(self._path)
            lines = [json.dumps({"settings": self._settings}), *self._lines.values()]
            write_whole(self._path, "".join(f"{line}\n" for line in lines))
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> None:
        """Take over what another run has left, if it was this very job's; the last line may be cut off."""
        if not path.exists():
            return
        first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if _parsed(first).get("settings") != self._settings:
            return
        for line in lines:
            found = _parsed(line)
            if found:
                self._lines[found["film"], found["frames"][0]] = line

    def recall(self, film: str, frames: Sequence[int]) -> list[Found] | None:
        """What was found in a batch of frames, by their numbers; None: nobody looked."""
        line = self._lines.get((film, frames[0]))
        if line is None or (noted := _parsed(line))["frames"] != list(frames):
            return None
        return [
            Found(
                np.array(boxes, np.float32).reshape(-1, 4),
                np.array(scores, np.float32),
                np.array(tracks, np.int64),
            )
            for boxes, scores, tracks in noted["found"]
        ]

    def note(self, film: str, frames: Sequence[int], found: Sequence[Found]) -> None:
        """Keep what was found in a batch of frames."""
        if self._file is not None:
            people = [[one.boxes.tolist(), one.scores.tolist(), one.tracks.tolist()] for one in found]
            self._write({"film": film, "frames": list(frames), "found": people})

    def delete(self) -> None:
        """It is not needed any more."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
