"""Sets without a published layout: a folder for each identity, or crops without any labels."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path

from dmx.data.layouts.archives import zip_image_ref
from dmx.data.layouts.base import (
    FileRef,
    Found,
    Layout,
    Options,
    Reading,
    Unreadable,
    candidate_roots,
    holds_images,
    is_image_name,
    mostly_match,
    sample_image_names,
    subfolders,
)
from dmx.data.layouts.market import BOX_FOLDERS, DUKE_NAME, MARKET_NAME, VERI_FOLDERS
from dmx.data.layouts.randperson import NAME as RANDPERSON_NAME
from dmx.errors import DmxError

SPLIT_FOLDERS = ("train", "query", "gallery")
# Folder names that belong to published layouts: taking them for identities would lose the labels in file
# names.
PUBLISHED_FOLDERS = frozenset({*BOX_FOLDERS, *VERI_FOLDERS} - set(SPLIT_FOLDERS))


def _camera(name: str, options: Options) -> int:
    if options.camera_pattern is None:
        return -1
    match = re.search(options.camera_pattern, name)
    if match is None:
        return -1
    if match[1] is None or not match[1].isdecimal():
        raise DmxError(
            f"camera pattern {options.camera_pattern!r}: wanted its group to be digits, found {match[1]!r} "
            f"in the file name {name}"
        )
    return int(match[1])


def _identity_folders(folder: Path) -> list[Path]:
    if sample_image_names(folder):
        return []
    return [path for path in subfolders(folder) if sample_image_names(path)]


def _find_folder(source: Path) -> Path | None:
    for root in candidate_roots(source):
        inner = subfolders(root)
        if any(path.name in PUBLISHED_FOLDERS for path in inner):
            return None
        splits = [path for path in inner if path.name in SPLIT_FOLDERS]
        if splits and all(_identity_folders(path) for path in splits):
            # Of `train` beside `val` and `test`, only a part would be read: then the layout has to be told.
            others = [path for path in inner if path.name not in SPLIT_FOLDERS]
            return None if any(map(holds_images, others)) else root
        # One folder alone is as likely a wrapping as an identity: then the layout has to be told.
        if not splits and len(_identity_folders(root)) > 1:
            return root
    return None


def identity_numbers(names: list[str]) -> dict[str, int]:
    """Number identity folders: by name when all names are numbers, else by rank in sorted order."""
    if all(name.isdecimal() for name in names) and len({int(name) for name in names}) == len(names):
        return {name: int(name) for name in names}
    return {name: rank for rank, name in enumerate(sorted(names))}


def _identities_by_split(root: Path, options: Options) -> dict[str, list[Path]]:
    """The identity folders of every split; what lies beside them goes to `options.unread`."""
    inner = subfolders(root)
    splits = {path.name: path for path in inner if path.name in SPLIT_FOLDERS and subfolders(path)}
    for folder in (root, *splits.values()):
        options.leave_images(folder, "an image beside the folders that name identities")
    for path in inner if splits else ():
        if path.name not in splits:
            options.leave_folder(path, "not train, query or gallery with identity folders")
    return {name: subfolders(path) for name, path in splits.items()} or {"train": inner}


def _read_folder(root: Path, options: Options) -> Reading:
    by_split = _identities_by_split(root, options)
    # Query and gallery must agree on who is who, so the numbers are given over all splits together.
    numbers = identity_numbers(sorted({path.name for paths in by_split.values() for path in paths}))
    for split, identities in by_split.items():
        for folder in identities:
            for path in options.images(folder, recursive=True):
                key = path.relative_to(root).as_posix()
                camera = _camera(path.name, options)
                yield Found(split, key, numbers[folder.name], camera, FileRef(str(path)))


def _zip_images(source: Path) -> list[zipfile.ZipInfo]:
    images = [
        info
        for info in _zip_members(source)
        if is_image_name(info.filename.rsplit("/", 1)[-1]) and not info.filename.startswith("__MACOSX/")
    ]
    return sorted(images, key=lambda info: info.filename)


def _zip_members(source: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(source) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise DmxError(
            f"{source}: wanted a zip archive, found one that is broken: {error}; copy it again"
        ) from error


def _find_crops(source: Path) -> Path | None:
    if source.suffix.lower() == ".zip" and zipfile.is_zipfile(source):
        paths = [info.filename.rpartition("/") for info in _zip_images(source)]
        names, folders = [path[2] for path in paths], {path[0] for path in paths}
        return source if len(folders) == 1 and not _has_labels(names) else None
    for root in candidate_roots(source):
        names = sample_image_names(root)
        if names:
            inner = [path for path in subfolders(root) if sample_image_names(path)]
            return None if inner or _has_labels(names) else root
    return None


def _has_labels(names: list[str]) -> bool:
    """Whether file names tell identities, which reading them as crops would lose without a word."""
    return any(mostly_match(pattern, names) for pattern in (MARKET_NAME, DUKE_NAME, RANDPERSON_NAME))


def _read_crops(root: Path, options: Options) -> Reading:
    if root.is_file():
        yield from _read_zip(root, options)
        return
    for path in options.images(root, recursive=True):
        key = path.relative_to(root).as_posix()
        yield Found("train", key, -1, _camera(path.name, options), FileRef(str(path)))


def _read_zip(source: Path, options: Options) -> Reading:
    if not zipfile.is_zipfile(source):
        raise DmxError(f"{source}: wanted a folder or a zip archive of crops, found another kind of file")
    files = sum(not info.filename.endswith("/") for info in _zip_members(source))
    members = _zip_images(source)
    options.ignored += files - len(members)
    for info in members:
        image = zip_image_ref(source, info)
        if isinstance(image, Unreadable):
            yield image
        else:
            camera = _camera(info.filename.rsplit("/", 1)[-1], options)
            yield Found("train", info.filename, -1, camera, image)


LAYOUTS = (
    Layout(
        "folder",
        "a folder for each identity, or such folders in train, query and gallery with no others beside",
        _find_folder,
        _read_folder,
        generic=True,
    ),
    Layout(
        "crops",
        "images in one folder (or one zip archive) and no labels at all",
        _find_crops,
        _read_crops,
        generic=True,
        reads_files=True,
    ),
)
