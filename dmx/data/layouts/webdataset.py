"""WebDataset tars: `KEY.jpg` beside `KEY.json` or `KEY.cls`.

Of the JSON, `identity` (or `pid`, `person_id`, `label`) and `camera` (or `camid`, `camera_id`) are read; a
`.cls` file holds the identity alone. Without either the image has no label. A tar whose name begins with
`query`, `gallery` or `test` belongs to that split, any other to training.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmx.data.layouts.archives import Member, tar_members
from dmx.data.layouts.base import Found, Layout, Options, Reading, Unreadable, is_image_name

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IDENTITY_FIELDS = ("identity", "pid", "person_id", "label")
CAMERA_FIELDS = ("camera", "camid", "camera_id")
SPLIT_OF_PREFIX = {"query": "query", "gallery": "gallery", "test": "gallery"}


def _tars(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if root.name.endswith(TAR_SUFFIXES) else []
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.name.endswith(TAR_SUFFIXES) and not p.name.startswith("."))


def _find(source: Path) -> Path | None:
    return source if _tars(source) else None


def _split(tar: Path) -> str:
    return next((split for prefix, split in SPLIT_OF_PREFIX.items() if tar.name.startswith(prefix)), "train")


def _base(item: Member | Unreadable) -> str:
    """Key of a sample: the path up to the first dot of the file's name, which is WebDataset's rule."""
    folder, slash, name = item.key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _integer(value: Any, what: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} {value!r} is not an integer") from None


def _labels(members: list[Member]) -> tuple[int, int]:
    """Identity and camera of a sample, -1 where it does not tell."""
    identity = camera = -1
    for member in members:
        extension = member.key.rpartition("/")[2].partition(".")[2].lower()
        if extension in ("cls", "cls.txt"):
            identity = _integer(member.image.read().decode().strip(), "the .cls file")
        elif extension == "json":
            fields = json.loads(member.image.read())
            if not isinstance(fields, dict):
                raise ValueError("the .json file holds no object")
            named = next((name for name in IDENTITY_FIELDS if name in fields), None)
            identity = identity if named is None else _integer(fields[named], f"field {named}")
            named = next((name for name in CAMERA_FIELDS if name in fields), None)
            camera = camera if named is None else _integer(fields[named], f"field {named}")
    return max(identity, -1), max(camera, -1)


def _sample(members: list[Member], split: str, options: Options) -> Iterator[Found | Unreadable]:
    images = [member for member in members if is_image_name(member.key.rpartition("/")[2])]
    if not images:
        options.ignored += len(members)
        return
    try:
        identity, camera = _labels(members)
    except ValueError as error:  # a malformed JSON or text encoding is one as well
        yield Unreadable(images[0].key, f"labels: {error}")
        return
    for image in images:
        yield Found(split, image.key, identity, camera, image.image)


def _read(root: Path, options: Options) -> Reading:
    for tar in _tars(root):
        for _, group in itertools.groupby(tar_members(tar, tar.name), key=_base):
            items = list(group)
            yield from (item for item in items if isinstance(item, Unreadable))
            members = [item for item in items if isinstance(item, Member)]
            if members:
                yield from _sample(members, _split(tar), options)


LAYOUTS = (
    # Any folder may hold a tar, of what was unpacked beside it for one: published layouts come first.
    Layout(
        "webdataset",
        "tars that hold KEY.jpg with KEY.json or KEY.cls",
        _find,
        _read,
        generic=True,
        reads_files=True,
    ),
)
