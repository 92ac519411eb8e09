"""MSMT17, versions 1 and 2.

Lists name every image: `list_train.txt` holds lines `0000/0000_000_01_0303morning_0015_0.jpg 0` (path below
the image folder, identity). The camera is the third field of the file name. Identities of the test lists
start at 0 again: person 0 of `train` and person 0 of `query` are two people, as everywhere a split's
identities mean nothing outside the test or the training part.
"""

from __future__ import annotations

from pathlib import Path

from dmx.data.layouts.base import Expected, FileRef, Found, Layout, Options, Reading, Unreadable, first_root

# Image folders of the two versions: for training and for test.
VERSIONS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))
# List file, split, and which of the two image folders its paths lie in.
LISTS = (
    ("list_train.txt", "train", 0),
    ("list_val.txt", "train", 0),
    ("list_query.txt", "query", 1),
    ("list_gallery.txt", "gallery", 1),
)
COUNTS = (
    Expected("train", "images", 32621),
    Expected("train", "identities", 1041),
    Expected("train", "cameras", 15),
    Expected("query", "images", 11659),
    Expected("gallery", "images", 82161),
)


def _folders(root: Path) -> tuple[str, str] | None:
    return next((names for names in VERSIONS if any((root / name).is_dir() for name in names)), None)


def _is_root(root: Path) -> bool:
    return _folders(root) is not None and any((root / name).is_file() for name, _, _ in LISTS)


def _read(root: Path, options: Options) -> Reading:
    folders = _folders(root) or VERSIONS[0]
    for list_name, split, part in LISTS:
        if (root / list_name).is_file():
            yield from _read_list(root, list_name, split, folders[part], options)


def _read_list(root: Path, list_name: str, split: str, folder: str, options: Options) -> Reading:
    with open(root / list_name, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            relative, _, identity = line.strip().rpartition(" ")
            relative = relative.strip()
            name = relative.rpartition("/")[2]
            if name.startswith("._"):
                options.ignored += 1
                continue
            fields = name.split("_")
            if not identity.isdecimal() or len(fields) < 3 or not fields[2].isdecimal():
                yield Unreadable(
                    f"{list_name}:{number}", f"line is not FOLDER/X_X_CAMERA_... IDENTITY: {line.strip()!r}"
                )
                continue
            key = f"{folder}/{relative}"
            if relative.startswith("/") or ".." in relative.split("/"):
                yield Unreadable(f"{list_name}:{number}", f"path leads out of {folder}: {relative!r}")
                continue
            yield Found(split, key, int(identity), int(fields[2]), FileRef(str(root / key)))


LAYOUTS = (
    Layout(
        "msmt17",
        "train and test (V2: mask_train_v2, mask_test_v2) with list_{train,val,query,gallery}.txt",
        lambda source: first_root(source, _is_root),
        _read,
        lambda root: COUNTS,
    ),
)
