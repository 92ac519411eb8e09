"""What is searched for: image files, and data sets."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmx.data.dataset import RawSplit
from dmx.data.images import broken_reason
from dmx.data.layouts import Found
from dmx.data.layouts.base import FileRef
from dmx.data.manifest import SPLITS
from dmx.data.shards import Split
from dmx.errors import DmxError
from dmx.evaluation.embedded import UNKNOWN
from dmx.search.gallery import absolute, holds_features
from dmx.search.images import JoinedSplits, Origin, Reading, joined

QUERY = "query"


@dataclass(frozen=True)
class Queries:
    """Images to search for.

    Attributes:
        split: N of them.
        of_gallery: (N,) bool, whether they are of the gallery's data set, whose image of the same key then is
            the query itself.
        same_people: (N,) bool, whether their identities are numbers of the same people as the gallery's.
    """

    split: Split
    of_gallery: NDArray[np.bool_]
    same_people: NDArray[np.bool_]


def open_queries(
    paths: Sequence[str],
    reading: Reading,
    gallery: Origin | None,
    same_people: bool,
    warn: Callable[[str], None],
) -> Queries:
    """Image files, and the query split of data sets, or all of those that have none, in the order given.

    Args:
        paths: of files and data sets.
        reading: of data sets that were not ingested.
        gallery: where its images come from; None where that is unknown.
        same_people: whether all identities are numbers of the same people as the gallery's; if not, those of
            its own data set are.
        warn: called with each sentence about what differs from the published data set.

    Raises:
        DmxError: nothing there that can be read, or a file that is no image; names it.
    """
    splits, own = [], []
    for path in paths:
        is_file = "://" not in path and Path(path).is_file() and not zipfile.is_zipfile(path)
        splits.append(_image_file(path) if is_file else _data_set(path, reading, warn))
        own.append(not is_file and gallery is not None and absolute(path) == gallery.path)
    of_gallery = np.repeat(np.array(own), [len(split) for split in splits])
    split = splits[0] if len(splits) == 1 else JoinedSplits(QUERY, splits)
    return Queries(split, of_gallery, of_gallery | same_people)


def _image_file(path: str) -> Split:
    try:
        reason = broken_reason(Path(path).read_bytes())
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    if reason is not None:
        raise DmxError(
            f"{path}: wanted an image to search for, found a file that is {reason}; give another one"
        )
    return RawSplit(path, QUERY, [Found(QUERY, path, UNKNOWN, UNKNOWN, FileRef(path))])


def _data_set(path: str, reading: Reading, warn: Callable[[str], None]) -> Split:
    if holds_features(path):
        raise DmxError(f"{path}: wanted images to search for, found features; give the data set they are of")
    dataset = reading.open(path, warn)
    return joined(dataset, [QUERY] if QUERY in dataset.splits else [n for n in SPLITS if n in dataset.splits])
