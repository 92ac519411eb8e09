"""Market-1501 and the sets laid out like it: DukeMTMC-reID, CUHK03-NP, PersonX, VeRi-776.

Folders for training, query and gallery; file names begin with identity and camera: `0002_c1s1_000451_03.jpg`.

Junk images (identity -1, boxes that overlap a person badly) stay in the gallery, where evaluation drops
them, and are left out of training. Identity 0 (distractors, in galleries only) is an identity like others.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from dmx.data.layouts.base import (
    Expected,
    FileRef,
    Found,
    Layout,
    Options,
    Reading,
    Unreadable,
    first_root,
    mostly_match,
    sample_image_names,
    subfolders,
)

NAME = re.compile(r"(-?\d+)_c(\d+)")
MARKET_NAME = re.compile(r"-?\d+_c\ds\d_\d+_\d+")
DUKE_NAME = re.compile(r"\d+_c\d_f\d+")
CUHK03_NAME = re.compile(r"\d+_c\d_\d+\.png$")
VERI_NAME = re.compile(r"\d+_c\d{3}")
PERSONX_CAMERAS = frozenset({3, 4, 8, 10, 11, 12})

BOX_FOLDERS = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
VERI_FOLDERS = {"image_train": "train", "image_query": "query", "image_test": "gallery"}

MARKET_COUNTS = (
    Expected("train", "images", 12936),
    Expected("train", "identities", 751),
    Expected("train", "cameras", 6),
    Expected("query", "images", 3368),
    Expected("query", "identities", 750),
    # The folder also holds junk images; published counts leave them out.
    Expected("gallery", "labelled", 15913),
)
DUKE_COUNTS = (
    Expected("train", "images", 16522),
    Expected("train", "identities", 702),
    Expected("query", "images", 2228),
    Expected("query", "identities", 702),
    Expected("gallery", "images", 17661),
    Expected("gallery", "identities", 1110),
)
CUHK03_IDENTITIES = (
    Expected("train", "identities", 767),
    Expected("query", "identities", 700),
    Expected("gallery", "identities", 700),
)
CUHK03_COUNTS = {
    "detected": (
        Expected("train", "images", 7365),
        Expected("query", "images", 1400),
        Expected("gallery", "images", 5332),
        *CUHK03_IDENTITIES,
    ),
    "labeled": (
        Expected("train", "images", 7368),
        Expected("query", "images", 1400),
        Expected("gallery", "images", 5328),
        *CUHK03_IDENTITIES,
    ),
}
PERSONX_COUNTS = (
    Expected("train", "images", 9840),
    Expected("query", "images", 5136),
    Expected("gallery", "images", 30816),
)
VERI_COUNTS = (
    Expected("query", "images", 1678),
    Expected("query", "identities", 200),
    Expected("gallery", "images", 11579),
    Expected("gallery", "identities", 200),
)


def has_split_folders(root: Path, folders: dict[str, str]) -> bool:
    """Whether the training folder, or both test folders, are there."""
    train, query, gallery = folders
    return (root / train).is_dir() or ((root / query).is_dir() and (root / gallery).is_dir())


def split_sample(root: Path, folders: dict[str, str]) -> list[str]:
    """Some image names of the split folders."""
    return [name for folder in folders for name in sample_image_names(root / folder)]


def _find_named(pattern: re.Pattern[str], source: Path, folders: dict[str, str] = BOX_FOLDERS) -> Path | None:
    def is_root(root: Path) -> bool:
        return has_split_folders(root, folders) and mostly_match(pattern, split_sample(root, folders))

    return first_root(source, is_root)


def _is_personx(root: Path) -> bool:
    names = split_sample(root, BOX_FOLDERS)
    if any(mostly_match(pattern, names) for pattern in (MARKET_NAME, DUKE_NAME, CUHK03_NAME)):
        return False
    cameras = {int(match[2]) for name in names if (match := NAME.match(name))}
    named_so = "personx" in root.name.lower() or "personx" in root.parent.name.lower()
    return bool(cameras) and (cameras <= PERSONX_CAMERAS or named_so)


def _find_personx(source: Path) -> Path | None:
    def is_root(root: Path) -> bool:
        if has_split_folders(root, BOX_FOLDERS):
            return _is_personx(root)
        # The whole set comes as one such folder for each camera, named by a number.
        inner = [path for path in subfolders(root) if path.name.isdecimal()]
        return bool(inner) and all(
            has_split_folders(path, BOX_FOLDERS) and _is_personx(path) for path in inner
        )

    return first_root(source, is_root)


def read_split_folders(root: Path, options: Options, folders: dict[str, str], prefix: str = "") -> Reading:
    """Read folders whose file names begin with identity and camera."""
    for folder, split in folders.items():
        if not (root / folder).is_dir():
            continue
        for path in options.images(root / folder):
            key = f"{prefix}{folder}/{path.name}"
            match = NAME.match(path.name)
            if match is None:
                yield Unreadable(key, "file name is not IDENTITY_cCAMERA...")
            elif split == "train" and int(match[1]) < 0:
                yield Unreadable(key, "junk image (identity -1) in the training folder")
            else:
                yield Found(split, key, max(int(match[1]), -1), int(match[2]), FileRef(str(path)))


def _read_boxes(root: Path, options: Options) -> Reading:
    if has_split_folders(root, BOX_FOLDERS):
        yield from read_split_folders(root, options, BOX_FOLDERS)
        return
    for inner in subfolders(root):
        if has_split_folders(inner, BOX_FOLDERS):
            yield from read_split_folders(inner, options, BOX_FOLDERS, prefix=f"{inner.name}/")


def _read_veri(root: Path, options: Options) -> Reading:
    yield from read_split_folders(root, options, VERI_FOLDERS)


def _cuhk03_counts(root: Path) -> tuple[Expected, ...]:
    return CUHK03_COUNTS.get(root.name, CUHK03_IDENTITIES)


LAYOUTS = (
    Layout(
        "market1501",
        "bounding_box_train, query, bounding_box_test with names such as 0002_c1s1_000451_03.jpg",
        partial(_find_named, MARKET_NAME),
        _read_boxes,
        lambda root: MARKET_COUNTS,
    ),
    Layout(
        "dukemtmc-reid",
        "the same folders with names such as 0001_c2_f0046182.jpg",
        partial(_find_named, DUKE_NAME),
        _read_boxes,
        lambda root: DUKE_COUNTS,
        note="DukeMTMC-reID was withdrawn by its authors in 2019: it should not be used or reported any more",
    ),
    Layout(
        "cuhk03-np",
        "the same folders, below `detected` or `labeled`, with names such as 0001_c1_1.png",
        partial(_find_named, CUHK03_NAME),
        _read_boxes,
        _cuhk03_counts,
    ),
    Layout(
        "personx",
        "the same folders with cameras among 3, 4, 8, 10, 11, 12, or one such folder a camera",
        _find_personx,
        _read_boxes,
        lambda root: PERSONX_COUNTS,
    ),
    Layout(
        "veri776",
        "image_train, image_query, image_test with names such as 0001_c001_00016450_0.jpg",
        partial(_find_named, VERI_NAME, folders=VERI_FOLDERS),
        _read_veri,
        lambda root: VERI_COUNTS,
    ),
)
