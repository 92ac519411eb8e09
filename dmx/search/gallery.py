"""What is searched: images, which the model embeds, or features in Parquet, both a part at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dmx.data.layouts import Unreadable
from dmx.data.manifest import MANIFEST_NAME as DATASET_MANIFEST
from dmx.data.manifest import SPLITS
from dmx.data.shards import Split
from dmx.data.storage import locate, read_json
from dmx.errors import DmxError
from dmx.evaluation.embedded import UNKNOWN
from dmx.features import MANIFEST_NAME as FEATURES_MANIFEST
from dmx.features import SUFFIX, Features
from dmx.progress import progress_bar
from dmx.search.encoder import Encoder
from dmx.search.images import Origin, Reading, joined

# Features of a part that come from Parquet: 16 MB at D = 512.
PART_ROWS = 8192
ALL = "all"


@dataclass(frozen=True)
class Part:
    """Some rows of a gallery.

    Attributes:
        rows: (n,) int64, numbers of the images in their split, or else of the features.
        keys: n of them.
        identities: (n,) int64, cameras: (n,) int32; -1 unknown.
        features: (n, D) float32 of unit length.
    """

    rows: NDArray[np.int64]
    keys: list[str]
    identities: NDArray[np.int64]
    cameras: NDArray[np.int32]
    features: NDArray[np.float32]


class Gallery(Protocol):
    """What is searched.

    Attributes:
        path: as it was given, absolute where it is local.
        origin: of its images, if they are known.
        left_out: images that cannot be decoded; complete when `parts` is exhausted.
    """

    path: str
    origin: Origin | None
    left_out: list[Unreadable]

    @property
    def fingerprint(self) -> str:
        """What tells it from other galleries."""
        ...

    def require(self, encoder: Encoder) -> None:
        """Check that its embeddings are of the same model, before anything is embedded."""
        ...

    def parts(self, encoder: Encoder) -> Iterator[Part]:
        """All of it, a part at a time."""
        ...


class ImageGallery:
    """Images of a data set."""

    def __init__(self, split: Split, origin: Origin) -> None:
        self.path = origin.path
        self.origin: Origin | None = origin
        self.left_out: list[Unreadable] = []
        self.fingerprint = origin.fingerprint
        self._split = split

    def require(self, encoder: Encoder) -> None:
        """Nothing to check: the model embeds these images itself."""

    def parts(self, encoder: Encoder) -> Iterator[Part]:
        """Embeds batch by batch; what cannot be decoded is left out.

        Raises:
            DmxError: features are not finite or zero; names the image.
        """
        keys = self._split.keys
        self.left_out = []
        for batch in encoder.embed_parts(self._split, "gallery"):
            self.left_out += [Unreadable(keys[row], str(error)) for row, error in batch.broken]
            yield Part(
                batch.rows,
                [keys[row] for row in batch.rows.tolist()],
                self._split.identities[batch.rows],
                self._split.cameras[batch.rows],
                batch.features,
            )


class FeatureGallery:
    """Features in Parquet, by `dmx embed` or whoever else."""

    def __init__(self, path: str, reading: Reading) -> None:
        self.path = path
        self.left_out: list[Unreadable] = []
        self._features = Features(path)
        self.fingerprint = self._features.fingerprint
        self._settings = _settings_of(path)
        self.origin = _origin_of(self._settings, reading)

    def require(self, encoder: Encoder) -> None:
        """Compare what `dmx embed` has recorded, or at least the width.

        Raises:
            DmxError: another model, or other settings.
        """
        if self._settings is not None:
            encoder.record.require(self._settings, self.path, "embed the gallery again with this one")
        if self._features.width != encoder.record.width:
            raise DmxError(
                f"{self.path}: wanted features of width {encoder.record.width}, as the model "
                f"{encoder.record.model} makes them, found width {self._features.width}; give the model "
                "that made them"
            )

    @property
    def tells_its_model(self) -> bool:
        """Whether anything says which model made these features."""
        return self._settings is not None

    def parts(self, encoder: Encoder) -> Iterator[Part]:
        """Reads block by block, and makes rows unit ones.

        Raises:
            DmxError: a row is not finite or zero, or a label is no whole number; names it.
        """
        count = len(self._features)
        # Another's column of that name may be anything.
        rows = self._numbers("row", np.int64) if self._settings else np.arange(count)
        identities, cameras = self._numbers("identity", np.int64), self._numbers("camera", np.int32)
        keys = self._features.read_column("key") if "key" in self._features.columns else None
        with progress_bar(count, "gallery", "rows") as bar:
            for begin, block in self._features.blocks(PART_ROWS):
                part = slice(begin, begin + len(block))
                yield Part(
                    rows[part], _named(keys, part), identities[part], cameras[part], self._units(block, begin)
                )
                bar.update(len(block))

    def _units(self, block: NDArray[np.float32], begin: int) -> NDArray[np.float32]:
        lengths = np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)
        if not lengths.all():
            raise DmxError(
                f"{self.path}: column {self._features.column}, row {begin + int(np.argmin(lengths))}: wanted "
                "a feature with a direction, found zeros; leave the row out, or embed its image again"
            )
        units: NDArray[np.float32] = (block / lengths).astype(np.float32)
        return units

    def _numbers(self, name: str, dtype: type[np.integer[Any]]) -> NDArray[Any]:
        """(N,) a column of labels, -1 where it, or a value of it, is missing."""
        if name not in self._features.columns:
            return np.full(len(self._features), UNKNOWN, dtype)
        values = self._features.read_column(name)
        if not pa.types.is_integer(values.type):
            raise DmxError(
                f"{self.path}: column {name}: wanted whole numbers, found {values.type}; number them, or "
                "give the column another name"
            )
        return values.fill_null(UNKNOWN).to_numpy().astype(dtype)  # type: ignore[no-any-return]


def open_gallery(
    path: str, split: str, reading: Reading, warn: Callable[[str], None]
) -> ImageGallery | FeatureGallery:
    """Images or features, whichever lies at `path`.

    Args:
        path: of a data set, or of features in Parquet; local or a URI.
        split: of the data set, or `all`.
        reading: of a data set that was not ingested.
        warn: called with each sentence about what differs from the published data set.

    Raises:
        DmxError: nothing there that can be read, no such split, or a split of features.
    """
    if holds_features(path):
        if split != ALL:
            raise DmxError(
                f"--split {split}: wanted a data set to choose from, found features, {path}; leave --split "
                "out"
            )
        features = FeatureGallery(absolute(path), reading)
        if not features.tells_its_model:
            warn(f"{path}: nothing tells which model made these features: --model has to be that one")
        return features
    dataset = reading.open(path, warn)
    names = tuple(name for name in SPLITS if name in dataset.splits) if split == ALL else (split,)
    images = joined(dataset, names)
    return ImageGallery(images, Origin.of(absolute(path), dataset, names, reading))


def holds_features(path: str) -> bool:
    """Whether a path is of Parquet, rather than of a data set."""
    location = locate(path)
    if path.endswith(SUFFIX) or location.size(FEATURES_MANIFEST) is not None:
        return True
    if location.size(DATASET_MANIFEST) is not None:
        return False
    if not location.is_local:
        return any(name.endswith(SUFFIX) for name in location.names())
    # A folder of crops may have a million entries: none of them is looked at but for its name.
    return os.path.isdir(location.path) and any(name.endswith(SUFFIX) for name in os.listdir(location.path))


def absolute(path: str) -> str:
    """A path that means the same in any folder."""
    return path.rstrip("/") if "://" in path else str(Path(path).expanduser().resolve())


def _named(keys: Any, part: slice) -> list[str]:
    """The keys of some rows (a `pyarrow.ChunkedArray`, or None); rows without one are numbered."""
    if keys is None:
        return [f"row {number}" for number in range(part.start, part.stop)]
    found = keys.slice(part.start, part.stop - part.start).to_pylist()
    return [f"row {part.start + place}" if key is None else str(key) for place, key in enumerate(found)]


def _settings_of(path: str) -> dict[str, Any] | None:
    """What `dmx embed` has recorded beside its features; None for those of others."""
    location = locate(path)
    if location.size(FEATURES_MANIFEST) is None:
        return None
    settings = read_json(location, FEATURES_MANIFEST, path).get("settings")
    if not isinstance(settings, dict):
        raise DmxError(
            f"{path}/{FEATURES_MANIFEST}: wanted an object settings, found {settings!r}; embed again"
        )
    return settings


def _origin_of(settings: dict[str, Any] | None, reading: Reading) -> Origin | None:
    """The images that features were made of."""
    if settings is None:
        return None
    path, split, known_by = (str(settings.get(name)) for name in ("dataset", "split", "data_sha256"))
    return Origin(absolute(path), (split,), (known_by,), "", reading)
