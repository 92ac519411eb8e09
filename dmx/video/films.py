"""Which videos there are, and which camera each is of."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmx.errors import DmxError

# What cameras, recorders and phones write; a file that is named itself may be called anything.
SUFFIXES = (
    ".3gp", ".asf", ".avi", ".dav", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip
FIRST_CAMERA = 1


@dataclass(frozen=True)
class Film:
    """A video and where it is from.

    Attributes:
        path: of the file.
        name: short, unique among those that are read together: what keys and the column `source` have.
        camera: number of the camera.
        asked_for: named by the user, rather than found in a folder.
    """

    path: Path
    name: str
    camera: int
    asked_for: bool


def find_films(
    sources: Sequence[str], cameras: Sequence[int] | None = None, camera_pattern: str | None = None
) -> list[Film]:
    """The videos that some paths stand for, in order, each with the number of its camera.

    Args:
        sources: files, folders (all videos below them, by name) and glob patterns.
        cameras: a number for each source; None: `camera_pattern` tells, or else every file is a camera of its
            own, counted from 1.
        camera_pattern: regular expression whose one group is the number in the name of a video.

    Raises:
        DmxError: nothing there, a video twice, or numbers that do not fit.
    """
    if cameras is not None and camera_pattern is not None:
        raise DmxError("give either --cameras or --camera-pattern, not both: each tells the cameras' numbers")
    if cameras is not None and len(cameras) != len(sources):
        raise DmxError(
            f"--cameras: wanted a number for each --video, {len(sources)} in all, found {len(cameras)}"
        )
    found = [(path, place, asked) for place, source in enumerate(sources) for path, asked in _files(source)]
    paths = [path for path, _, _ in found]
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise DmxError(f"--video: wanted every video once, found {paths[number]} twice")
    names = _names(resolved)
    films = []
    for number, (path, place, asked) in enumerate(found):
        if cameras is not None:
            camera = cameras[place]
        elif camera_pattern is not None:
            camera = _told_by(camera_pattern, names[number])
        else:
            camera = FIRST_CAMERA + number
        films.append(Film(path, names[number], camera, asked))
    return films


def _files(source: str) -> list[tuple[Path, bool]]:
    """The files of one source, and whether each was asked for by its own name."""
    path = Path(source).expanduser()
    if "://" in source:
        raise DmxError(f"--video {source}: wanted a file here, found an address; download or record it first")
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if _is_video_name(p.relative_to(path)) and p.is_file())
        if not inside:
            raise DmxError(
                f"--video {source}: wanted a folder of videos ({', '.join(SUFFIXES)}), found none in it; "
                "name the files themselves if they are called otherwise"
            )
        return [(p, False) for p in inside]
    if path.exists():
        return [(path, True)]
    matches = sorted(Path(match) for match in glob.glob(os.path.expanduser(source), recursive=True))
    matches = [match for match in matches if match.is_file()]
    if not matches:
        raise DmxError(
            f"--video {source}: wanted a video, a folder of them or a pattern, found nothing there"
        )
    return [(match, False) for match in matches]


def _is_video_name(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _names(paths: Sequence[Path]) -> list[str]:
    """Each path below the folder that all of them share."""
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [path.relative_to(shared).as_posix() for path in paths]


def _told_by(pattern: str, name: str) -> int:
    match = re.search(pattern, name)
    if match is None or match[1] is None or not match[1].isdecimal():
        found = "no match" if match is None else repr(match[1])
        raise DmxError(
            f"--camera-pattern {pattern!r}: wanted a group of digits in the name of the video {name}, found "
            f"{found}"
        )
    return int(match[1])
