"""RandPerson, and what names its files so: ClonedPerson and the images that `dmx synth` renders.

`000000_s00_c00_f000264.jpg` is person, scene, camera, frame; the set's first edition had scene and camera the
other way round, `000000_c00_s00_f000264.jpg`. Three arrangements of folders are read:

- the subset: all images in one folder;
- the whole set: `images/sceneNN/*.tar.gz` (`delete_*.tar.gz` holds what its authors took out);
- train, query and gallery folders, in the names of Market-1501 or of ClonedPerson.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dmx.data.layouts.archives import tar_images
from dmx.data.layouts.base import (
    Expected,
    FileRef,
    Found,
    ImageRef,
    Layout,
    Options,
    Reading,
    Unreadable,
    first_root,
    mostly_match,
    sample_image_names,
    subfolders,
)

NAME = re.compile(r"(\d+)_(?:s(\d+)_c(\d+)|c(\d+)_s(\d+))_f\d+")
SCENE = re.compile(r"scene\d+$")
# Room for the cameras of a scene when scene and camera become one number: scene 3, camera 12 is 312.
CAMERAS_PER_SCENE = 100

FOLDERS = {
    "train": "train",
    "bounding_box_train": "train",
    "query": "query",
    "gallery": "gallery",
    "bounding_box_test": "gallery",
}
CLONED_FOLDERS = {"train": "train", "test/query": "query", "test/gallery": "gallery"}

SUBSET_COUNTS = (Expected("train", "images", 132145), Expected("train", "identities", 8000))
FULL_COUNTS = (Expected("train", "images", 1801816), Expected("train", "identities", 8000))
# Marks a folder that `dmx synth` rendered: named like RandPerson's, but nothing is published about it.
SYNTH_MARK = "synth.json"


def parse_name(name: str, camera: str = "scene") -> tuple[int, int] | None:
    """Identity and camera of a file name, or None when it is not of this pattern.

    Args:
        name: file name.
        camera: `scene` makes one number of scene and camera (100 x scene + camera); `camera` ignores the
            scene, as published code does, so that cameras of different scenes share a number.
    """
    match = NAME.match(name)
    if match is None:
        return None
    scene, number = int(match[2] or match[5]), int(match[3] or match[4])
    return int(match[1]), number if camera == "camera" else CAMERAS_PER_SCENE * scene + number


def _folders(root: Path) -> dict[str, str]:
    return {
        folder: split
        for folder, split in FOLDERS.items()
        if mostly_match(NAME, sample_image_names(root / folder))
    }


def _scenes(root: Path) -> list[Path]:
    inside = root / "images" if (root / "images").is_dir() else root
    return [path for path in subfolders(inside) if SCENE.match(path.name)]


def _is_cloned(root: Path) -> bool:
    return any(mostly_match(NAME, sample_image_names(root / f"test/{name}")) for name in ("query", "gallery"))


def _is_randperson(root: Path) -> bool:
    if _is_cloned(root):
        return False
    return bool(mostly_match(NAME, sample_image_names(root)) or _folders(root) or _scenes(root))


def _found(split: str, key: str, name: str, image: ImageRef, options: Options) -> Found | Unreadable:
    parsed = parse_name(name, options.camera)
    if parsed is None:
        return Unreadable(key, "file name is not PERSON_sSCENE_cCAMERA_fFRAME")
    return Found(split, key, *parsed, image)


def _read_folders(root: Path, options: Options, folders: dict[str, str]) -> Reading:
    for folder, split in folders.items():
        if (root / folder).is_dir():
            for path in options.images(root / folder):
                yield _found(split, f"{folder}/{path.name}", path.name, FileRef(str(path)), options)


def _read_scenes(root: Path, options: Options) -> Reading:
    for scene in _scenes(root):
        archives = [path for path in _archives(scene) if not path.name.startswith("delete_")]
        for archive in archives:
            for item in tar_images(archive, archive.relative_to(root).as_posix(), options):
                if isinstance(item, Unreadable):
                    yield item
                else:
                    yield _found("train", item.key, item.key.rsplit("/", 1)[-1], item.image, options)
        if not archives:
            for path in options.images(scene, recursive=True):
                key = path.relative_to(root).as_posix()
                yield _found("train", key, path.name, FileRef(str(path)), options)


def _archives(scene: Path) -> Iterator[Path]:
    yield from sorted([*scene.glob("*.tar.gz"), *scene.glob("*.tgz"), *scene.glob("*.tar")])


def _read_randperson(root: Path, options: Options) -> Reading:
    if folders := _folders(root):
        yield from _read_folders(root, options, folders)
    elif mostly_match(NAME, sample_image_names(root)) or not _scenes(root):
        for path in options.images(root):
            yield _found("train", path.name, path.name, FileRef(str(path)), options)
    else:
        yield from _read_scenes(root, options)


def _read_cloned(root: Path, options: Options) -> Reading:
    yield from _read_folders(root, options, CLONED_FOLDERS)


def _counts(root: Path) -> tuple[Expected, ...]:
    if (root / SYNTH_MARK).is_file() or _folders(root):
        return ()
    if mostly_match(NAME, sample_image_names(root)):
        return SUBSET_COUNTS
    return FULL_COUNTS


LAYOUTS = (
    Layout(
        "randperson",
        "names such as 000000_s00_c00_f000264.jpg in one folder, images/sceneNN/*.tar.gz or split folders",
        lambda source: first_root(source, _is_randperson),
        _read_randperson,
        _counts,
    ),
    Layout(
        "clonedperson",
        "such names in train, test/query and test/gallery",
        lambda source: first_root(source, _is_cloned),
        _read_cloned,
    ),
)
