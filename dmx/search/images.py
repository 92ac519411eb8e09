"""The images that are searched, or searched for: several splits as one, and what they are known by."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmx.data.dataset import Dataset, open_dataset
from dmx.data.shards import ShardSplit, Split
from dmx.errors import DmxError
from dmx.extraction.plan import fingerprint

# Images whose contents are part of what a data set that was not ingested is known by.
SAMPLED = 64


@dataclass(frozen=True)
class Reading:
    """How data sets are read that were not ingested: as `open_dataset` takes it."""

    layout: str = "auto"
    camera: str = "scene"
    camera_pattern: str | None = None

    def open(self, path: str, warn: Callable[[str], None]) -> Dataset:
        """A data set.

        Raises:
            DmxError: nothing there that can be read.
        """
        return open_dataset(
            path, self.layout, camera=self.camera, camera_pattern=self.camera_pattern, warn=warn
        )


@dataclass(frozen=True)
class Origin:
    """Where images come from, to find their pictures again.

    Attributes:
        path: of the data set; absolute where it is local.
        splits: which of it, in order.
        fingerprints: of each of them.
        sample: hash of some images of a set that was not ingested, whose fingerprint tells names and labels
            only; empty where it is not known, or not needed.
        reading: how it was read.
    """

    path: str
    splits: tuple[str, ...]
    fingerprints: tuple[str, ...]
    sample: str
    reading: Reading

    @staticmethod
    def of(path: str, dataset: Dataset, splits: tuple[str, ...], reading: Reading) -> Origin:
        """What some splits of an open data set are known by."""
        return Origin(
            path,
            splits,
            tuple(fingerprint(dataset, name) for name in splits),
            _sample([dataset.split(name) for name in splits]),
            reading,
        )

    @property
    def fingerprint(self) -> str:
        """All of it in one hash; where it lies does not matter."""
        return hashlib.sha256("\n".join([*self.splits, *self.fingerprints, self.sample]).encode()).hexdigest()

    def open(self) -> Split:
        """The images.

        Raises:
            DmxError: they are not there, or are others now.
        """
        dataset = self.reading.open(
            self.path, warn=lambda message: None
        )  # it was told when they were embedded
        split = joined(dataset, self.splits)
        found = Origin.of(self.path, dataset, self.splits, self.reading)
        if found.fingerprints != self.fingerprints or self.sample not in ("", found.sample):
            raise DmxError(
                f"{self.path}: wanted the images that were embedded, found that they have changed since; "
                "embed them again"
            )
        return split

    @staticmethod
    def from_tree(tree: Mapping[str, Any]) -> Origin:
        """What `dataclasses.asdict` made of one and JSON kept; KeyError or TypeError where it is not that."""
        return Origin(
            str(tree["path"]),
            tuple(tree["splits"]),
            tuple(tree["fingerprints"]),
            str(tree["sample"]),
            Reading(**tree["reading"]),
        )


class JoinedSplits:
    """Several splits as one, in order.

    Args:
        name: of the result.
        splits: at least one.
    """

    def __init__(self, name: str, splits: Sequence[Split]) -> None:
        self._name, self._splits = name, tuple(splits)
        self._starts = list(itertools.accumulate((len(split) for split in splits), initial=0))
        self.identities: NDArray[np.int64] = np.concatenate([split.identities for split in splits])
        self.cameras: NDArray[np.int32] = np.concatenate([split.cameras for split in splits])
        self.keys = [key for split in splits for key in split.keys]

    @property
    def name(self) -> str:
        """As given."""
        return self._name

    def __len__(self) -> int:
        return self._starts[-1]

    def image_bytes(self, row: int) -> bytes:
        """Encoded bytes of one image.

        Raises:
            DmxError: no such row, or it cannot be read.
        """
        if not 0 <= row < len(self):
            raise DmxError(f"{self._name}: wanted row {row}, found {len(self)} rows")
        number = bisect.bisect_right(self._starts, row) - 1
        return self._splits[number].image_bytes(row - self._starts[number])


def joined(dataset: Dataset, names: Sequence[str]) -> Split:
    """Splits of a data set as one.

    Raises:
        DmxError: the data set lacks one of them.
    """
    splits = [dataset.split(name) for name in names]
    return splits[0] if len(splits) == 1 else JoinedSplits(" and ".join(names), splits)


def _sample(splits: Sequence[Split]) -> str:
    """A hash of some images, evenly spread; empty where checksums of all are known."""
    raw = [split for split in splits if not isinstance(split, ShardSplit)]
    if not raw:
        return ""
    digest = hashlib.sha256()
    for split in raw:
        rows = np.unique(np.linspace(0, len(split) - 1, SAMPLED).astype(int))
        for row in rows.tolist():
            digest.update(hashlib.sha256(split.image_bytes(row)).digest())
    return digest.hexdigest()
