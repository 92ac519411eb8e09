"""Opening a data set, ingested or as its authors laid it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmx.data.ingest import left_out_warning, make_options, read_source, warn_dataset
from dmx.data.layouts import Found, Unreadable, recognise
from dmx.data.layouts.base import BytesRef
from dmx.data.manifest import MANIFEST_NAME, SPLITS, SplitCounts, read_manifest
from dmx.data.published import count_warnings
from dmx.data.shards import ShardSplit, Split
from dmx.data.storage import locate
from dmx.errors import DmxError
from dmx.names import printable


class RawSplit:
    """A split read where its authors' files lie; holds where each image is, and reads it when asked."""

    def __init__(self, source: str, name: str, found: list[Found]) -> None:
        self._source, self._name, self._found = source, name, found
        self.identities: NDArray[np.int64] = np.array([item.identity for item in found], np.int64)
        self.cameras: NDArray[np.int32] = np.array([item.camera for item in found], np.int32)
        self.keys = [item.key for item in found]

    @property
    def name(self) -> str:
        """`train`, `query` or `gallery`."""
        return self._name

    @property
    def found(self) -> list[Found]:
        """Its images, as the layout's reader found them."""
        return self._found

    def __len__(self) -> int:
        return len(self._found)

    def image_bytes(self, row: int) -> bytes:
        """Encoded bytes of one image.

        Raises:
            DmxError: no such row, or its file cannot be read any more.
        """
        if not 0 <= row < len(self):
            raise DmxError(f"{self._source}: split {self._name}: wanted row {row}, found {len(self)} rows")
        try:
            return self._found[row].image.read()
        except OSError as error:
            raise DmxError(
                f"{self._source}: split {self._name}: image {printable(self.keys[row])} cannot be read: "
                f"{error.strerror or error}; `dmx ingest` leaves such images out"
            ) from error


@dataclass(frozen=True)
class Dataset:
    """The splits of a data set.

    Attributes:
        path: where it is.
        layout: how its authors laid it out.
        splits: split name to split; any of `train`, `query`, `gallery`.
    """

    path: str
    layout: str
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        """One split.

        Raises:
            DmxError: the data set has no such split.
        """
        if name not in self.splits:
            raise DmxError(
                f"{self.path} ({self.layout}): wanted the split {name!r}, found {list(self.splits)}"
            )
        return self.splits[name]


def open_dataset(
    path: str | Path,
    layout: str = "auto",
    *,
    camera: str = "scene",
    camera_pattern: str | None = None,
    warn: Callable[[str], None] = warn_dataset,
) -> Dataset:
    """Open an ingested data set, or read a known layout in place without copying anything.

    Args:
        path: folder; a URI when it was ingested there.
        layout: as for `ingest`, when the folder was not ingested.
        camera: as for `ingest`.
        camera_pattern: as for `ingest`.
        warn: called with each sentence about what differs from the published data set.

    Raises:
        DmxError: nothing there that can be read.
    """
    if locate(path).size(MANIFEST_NAME) is not None:
        manifest, _ = read_manifest(path)
        shard_splits = {
            name: ShardSplit(path, name, manifest.splits[name].shards)
            for name in SPLITS
            if name in manifest.splits
        }
        return Dataset(str(path), manifest.layout, shard_splits)
    if "://" in str(path):
        raise DmxError(f"{path}: wanted an ingested data set, found no {MANIFEST_NAME}; ingest it first")
    return _open_raw(path, layout, camera, camera_pattern, warn)


def _open_raw(
    path: str | Path, layout: str, camera: str, camera_pattern: str | None, warn: Callable[[str], None]
) -> Dataset:
    chosen, root = recognise(path, layout)
    by_split: dict[str, list[Found]] = {name: [] for name in SPLITS}
    skipped: list[Unreadable] = []
    for item in read_source(chosen, root, make_options(camera, camera_pattern)):
        if not isinstance(item, Found):
            skipped.append(item)
            continue
        if isinstance(item.image, BytesRef):
            raise DmxError(
                f"{root}: layout {chosen.name} is in compressed archives here, which cannot be read in "
                f"place; run `dmx ingest {path} OUT` and use OUT"
            )
        by_split[item.split].append(item)
    splits = {name: RawSplit(str(root), name, found) for name, found in by_split.items() if found}
    if not splits:
        raise DmxError(f"{root}: wanted images in layout {chosen.name} ({chosen.wanted}), found none")
    counts = {name: _counts(split) for name, split in splits.items()}
    for message in count_warnings(chosen.name, chosen.published(root), counts, len(skipped)):
        warn(message)
    if skipped:
        warn(left_out_warning(root, len(skipped), skipped[0], "`dmx ingest` lists all"))
    if chosen.note:
        warn(chosen.note)
    return Dataset(str(path), chosen.name, dict(splits))


def _counts(split: RawSplit) -> SplitCounts:
    known = split.identities[split.identities >= 0]
    cameras = split.cameras[split.cameras >= 0]
    return SplitCounts(len(split), known.size, np.unique(known).size, np.unique(cameras).size)
