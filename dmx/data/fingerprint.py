"""What tells a data set from another, and from what it was before: its counts and one hash."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from dmx.data.dataset import Dataset, RawSplit
from dmx.data.layouts import Found
from dmx.data.manifest import MANIFEST_NAME
from dmx.data.storage import locate

UNKNOWN_BYTES = -1


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Path, layout, rows by split, and `sha256`, of what `of` says.

    An ingested set is known by its manifest, which has the SHA-256 of every shard. One that is read in place
    is known by its listing: split, key, identity, camera and bytes of every image, sorted. An image that was
    changed without a change of its size goes unnoticed there; to ingest the set closes that gap.
    """
    raw = [split for split in dataset.splits.values() if isinstance(split, RawSplit)]
    return {
        "path": dataset.path,
        "layout": dataset.layout,
        "rows": {name: len(split) for name, split in dataset.splits.items()},
        "of": "listing" if raw else "manifest",
        "sha256": _of_listing(raw) if raw else locate(dataset.path).sha256(MANIFEST_NAME),
    }


def _of_listing(splits: list[RawSplit]) -> str:
    digest = hashlib.sha256()
    for line in sorted(_line(item) for split in splits for item in split.found):
        digest.update(line)
    return digest.hexdigest()


def _line(item: Found) -> bytes:
    fields = (item.split, item.key, item.identity, item.camera, _bytes(item.image))
    return ("\t".join(map(str, fields)) + "\n").encode("utf-8", "surrogateescape")


def _bytes(image: Any) -> int:
    """Bytes of an image within its archive, or else of the file that holds it."""
    if hasattr(image, "length"):
        return int(image.length)
    try:
        return os.stat(image.path).st_size
    except OSError:
        return UNKNOWN_BYTES  # training says what is wrong with it
