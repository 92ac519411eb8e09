"""What every reader of a published layout is made of.

A layout finds its own root in the folder that the user gave, and yields one `Found` for every image and one
`Unreadable` for everything that should have been one but cannot be.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from dmx.data.layouts.listing import leads_back, sorted_entries

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# File names looked at to recognise a layout; sets are homogeneous, so a few are enough.
SAMPLE_NAMES = 200
# An encoded crop has kilobytes. What an archive would make into more than this is an attack on memory.
MAX_ENCODED_BYTES = 1 << 28


class ImageRef(Protocol):
    """Where one image's encoded bytes are; small and picklable."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class FileRef:
    """An image in a file of its own."""

    path: str

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()


@dataclass(frozen=True, slots=True)
class SliceRef:
    """An image inside a larger uncompressed file, such as a tar."""

    path: str
    offset: int
    length: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclass(frozen=True, slots=True)
class BytesRef:
    """An image that can only be read in passing, as in a compressed tar."""

    content: bytes

    def read(self) -> bytes:
        return self.content


class Found(NamedTuple):
    """One image of a source."""

    split: str
    key: str
    identity: int
    camera: int
    image: ImageRef


class Unreadable(NamedTuple):
    """Something of a source that should be an image and cannot be read; `key` says where it is."""

    key: str
    reason: str


Reading = Iterator[Found | Unreadable]


@dataclass
class Options:
    """What a user may tell a reader.

    Attributes:
        camera: `scene` numbers RandPerson's cameras by scene and camera together; `camera` by the camera
            alone, as the published code does.
        camera_pattern: regular expression with one group of digits, for folders whose file names tell a
            camera.
        ignored: counts the files passed over because they are not images; filled while reading.
        unread: images, and folders of images, that the layout has no place for, each with the reason; filled
            while reading.
    """

    camera: str = "scene"
    camera_pattern: str | None = None
    ignored: int = 0
    unread: list[tuple[Path, str]] = field(default_factory=list)

    def images(self, folder: Path, *, recursive: bool = False) -> Iterator[Path]:
        """The image files of a folder by name.

        Hidden files (`._*`) and those that are not images are counted as ignored. Unless `recursive`,
        subfolders that hold images go to `unread`.
        """
        for name, is_folder in sorted_entries(folder):
            if is_folder:
                if name.startswith("."):
                    continue
                if leads_back(folder / name):
                    self.unread.append((folder / name, "a link to a folder that it lies in"))
                elif recursive:
                    yield from self.images(folder / name, recursive=True)
                else:
                    self.leave_folder(folder / name, "a subfolder where the layout has images only")
            elif is_image_name(name):
                yield folder / name
            else:
                self.ignored += 1

    def leave_images(self, folder: Path, reason: str) -> None:
        """Record that a folder's own images are not read; its other files are counted as ignored."""
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.is_dir())
        images = [name for name in names if is_image_name(name)]
        self.unread += [(folder / name, reason) for name in images]
        self.ignored += len(names) - len(images)

    def leave_folder(self, folder: Path, reason: str) -> None:
        """Record that a folder is not read, if it holds images."""
        if holds_images(folder):
            self.unread.append((folder, f"{reason}: its images are not read"))


@dataclass(frozen=True)
class Expected:
    """A published count: `field` is `images`, `labelled`, `identities` or `cameras` of a split."""

    split: str
    field: str
    count: int
    tolerance: float = 0.0


@dataclass(frozen=True)
class Layout:
    """One published way of laying out a data set.

    Attributes:
        name: as `--layout` takes it.
        wanted: what the reader looks for, for the error message when nothing is recognised.
        find: the layout's root, given a folder or file, or None when it is not there.
        read: yields the images below such a root.
        published: the published counts that apply to such a root.
        note: a warning that every reading of this layout carries.
        generic: recognised only when no published layout is.
        reads_files: the root may be a file, an archive for one.
    """

    name: str
    wanted: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, Options], Reading]
    published: Callable[[Path], tuple[Expected, ...]] = lambda root: ()
    note: str = ""
    generic: bool = False
    reads_files: bool = False


def is_image_name(name: str) -> bool:
    """Whether a file of this name should be an image; what archivers leave behind (`._x.jpg`) is not."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def sample_image_names(folder: Path, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Some image names directly in `folder`; empty when it is not a folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = (
            entry.name
            for entry in entries
            if (is_image_name(entry.name) or (suffixes and entry.name.endswith(suffixes))) and entry.is_file()
        )
        return list(itertools.islice(names, SAMPLE_NAMES))


def mostly_match(pattern: re.Pattern[str], names: list[str]) -> bool:
    """Whether at least nine in ten of the names (and at least one) match."""
    return bool(names) and sum(pattern.match(name) is not None for name in names) >= 0.9 * len(names)


def subfolders(folder: Path) -> list[Path]:
    """The visible folders directly in a folder, sorted."""
    if not folder.is_dir():
        return []
    # Not Path.iterdir: a flat set has a million files beside them, and each would cost a call for its kind.
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if not e.name.startswith(".") and e.is_dir())


def holds_images(folder: Path) -> bool:
    """Whether there is an image in a folder or anywhere below it."""
    inner = (path for path in subfolders(folder) if not leads_back(path))
    return bool(sample_image_names(folder)) or any(map(holds_images, inner))


def candidate_roots(source: Path, depth: int = 3) -> Iterator[Path]:
    """The folder itself, then what it wraps: archives are often unpacked into a folder of their own."""
    yield source
    for _ in range(depth):
        inner = subfolders(source)
        if len(inner) != 1 or sample_image_names(source):
            return
        source = inner[0]
        yield source


def first_root(source: Path, is_root: Callable[[Path], bool]) -> Path | None:
    """The first candidate that is a layout's root."""
    return next((root for root in candidate_roots(source) if is_root(root)), None)
