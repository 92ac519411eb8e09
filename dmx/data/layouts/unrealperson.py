"""UnrealPerson: folders `unreal_vX.Y/images` with names `P_cDDD_F.jpg`.

X is a scene, Y a set of people: the same P under another Y is another person, the same D under another X
another camera. Identity is 1,000,000 Y + P, camera 1,000 X + D.
"""

from __future__ import annotations

import re
from pathlib import Path

from dmx.data.layouts.base import (
    FileRef,
    Found,
    Layout,
    Options,
    Reading,
    Unreadable,
    candidate_roots,
    subfolders,
)

FOLDER = re.compile(r"unreal_v(\d+)\.(\d+)$")
NAME = re.compile(r"(\d+)_c(\d+)_")
PEOPLE_PER_SET = 1_000_000
CAMERAS_PER_SCENE = 1_000


def _parts(root: Path) -> list[Path]:
    folders = [root] if FOLDER.match(root.name) else subfolders(root)
    return [path for path in folders if FOLDER.match(path.name) and (path / "images").is_dir()]


def _find(source: Path) -> Path | None:
    return next((root for root in candidate_roots(source) if _parts(root)), None)


def _read(root: Path, options: Options) -> Reading:
    for part in _parts(root):
        version = FOLDER.match(part.name)
        if version is None:
            continue
        scene, people = int(version[1]), int(version[2])
        for path in options.images(part / "images"):
            key = f"{part.name}/images/{path.name}"
            match = NAME.match(path.name)
            if match is None:
                yield Unreadable(key, "file name is not PERSON_cCAMERA_FRAME")
                continue
            identity = people * PEOPLE_PER_SET + int(match[1])
            camera = scene * CAMERAS_PER_SCENE + int(match[2])
            yield Found("train", key, identity, camera, FileRef(str(path)))


LAYOUTS = (Layout("unrealperson", "unreal_vX.Y/images with names such as 0001_c001_12.jpg", _find, _read),)
