"""Data sets on disk: Arrow IPC shards that are written once and read in place.

A data set is a folder with `manifest.json` and files `<split>-00000.arrow`, each with the columns

    image     binary  encoded bytes, exactly as found
    identity  int64   -1 unknown
    camera    int32   -1 unknown, numbered as published
    key       string  where the image came from, relative to the source

Crops that were cut out of videos have more columns behind these, which `ShardSplit.column` reads:

    source    string    the video, as in the key
    frame     int64     number of the frame from 0, in the order in which they are shown
    time_s    float64   seconds from the first frame; NaN where the video does not tell
    box       int32[4]  x1, y1, x2, y2 in pixels of the frame as it is shown; x2 and y2 are outside
    score     float32   how sure the detector is, from 0 to 1; NaN where nothing tells
    track     int64     of the person within the video; -1 unknown

A reader passes over columns that it does not know. A manifest says schema version 2 where there are any.

Local shards are memory-mapped, so that opening costs nothing and any row is read in place; shards in an
object store are read by record batch.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dmx.data.manifest import Shard
from dmx.data.storage import locate
from dmx.data.writer import SCHEMA, DatasetWriter
from dmx.errors import DmxError
from dmx.writing import STORE_ADVICE, store_fault

__all__ = ["SCHEMA", "DatasetWriter", "ShardSplit", "Split"]

# Record batches of an object store that are kept in memory; local ones are views of the memory map.
REMOTE_BATCHES = 4


@runtime_checkable
class Split(Protocol):
    """One split of a data set, wherever its images lie."""

    @property
    def name(self) -> str: ...

    @property
    def identities(self) -> NDArray[np.int64]: ...

    @property
    def cameras(self) -> NDArray[np.int32]: ...

    @property
    def keys(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def image_bytes(self, row: int) -> bytes: ...


class ShardSplit:
    """A split read from shards. Safe to use from several threads; pickles as its address and opens again."""

    def __init__(self, folder: str | Path, name: str, shards: tuple[Shard, ...]) -> None:
        self.folder, self._name, self._shards = str(folder), name, shards
        self._starts = list(itertools.accumulate((shard.rows for shard in shards), initial=0))
        self._reset()

    def _reset(self) -> None:
        self._is_local = locate(self.folder).is_local
        self._lock = threading.Lock()
        self._readers: dict[int, tuple[Any, list[int]]] = {}
        self._batches: dict[tuple[int, int], Any] = {}
        self._labels: dict[str, NDArray[Any]] = {}
        self._keys: list[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "name": self._name, "shards": self._shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["name"], state["shards"])  # type: ignore[misc]  # re-opens

    @property
    def name(self) -> str:
        """`train`, `query` or `gallery`."""
        return self._name

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files, in order."""
        return self._shards

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of each shard, and the number of rows after the last."""
        return tuple(self._starts)

    def shard(self, index: int) -> ShardSplit:
        """The rows of one shard, for what needs not read all of them."""
        return ShardSplit(self.folder, self._name, (self._shards[index],))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def identities(self) -> NDArray[np.int64]:
        """(N,) int64, -1 where unknown."""
        return self._label_column("identity", np.dtype(np.int64))

    @property
    def cameras(self) -> NDArray[np.int32]:
        """(N,) int32, -1 where unknown."""
        return self._label_column("camera", np.dtype(np.int32))

    @property
    def keys(self) -> list[str]:
        """Source of every image, relative to the data set that was ingested."""
        if self._keys is None:
            self._keys = [key for chunk in self._column("key") for key in chunk.to_pylist()]
        return self._keys

    def column(self, name: str) -> Any:
        """A column that only some data sets have, as a `pyarrow.ChunkedArray` of N values.

        Raises:
            DmxError: this one does not have it.
        """
        if name not in self.more_columns:
            raise DmxError(
                f"{self.folder}: split {self._name}: wanted the column {name!r}, found beside those of every "
                f"data set {list(self.more_columns) or 'none'}; `dmx ingest --video` writes some"
            )
        return pa.chunked_array(self._column(name))

    @property
    def more_columns(self) -> tuple[str, ...]:
        """The names of the columns that not every data set has."""
        names = self._open_columns(0).schema.names
        return tuple(name for name in names if name not in SCHEMA.names)

    def image_bytes(self, row: int) -> bytes:
        """Encoded bytes of one image, exactly as they were found.

        Raises:
            DmxError: no such row.
        """
        if not 0 <= row < len(self):
            raise DmxError(f"{self.folder}: split {self._name}: wanted row {row}, found {len(self)} rows")
        shard = bisect.bisect_right(self._starts, row) - 1
        with self._lock:
            reader, starts = self._open(shard)
            within = row - self._starts[shard]
            index = bisect.bisect_right(starts, within) - 1
            if (shard, index) not in self._batches:
                if not self._is_local and len(self._batches) >= REMOTE_BATCHES:
                    self._batches.pop(next(iter(self._batches)))
                self._batches[shard, index] = self._read_batch(reader, shard, index)
            batch = self._batches[shard, index]
        value: bytes = batch.column(0)[within - starts[index]].as_py()
        return value

    def _label_column(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        if name not in self._labels:
            chunks = [chunk.to_numpy(zero_copy_only=False) for chunk in self._column(name)]
            values = np.concatenate([np.empty(0, dtype), *chunks]).astype(dtype, copy=False)
            values.flags.writeable = False
            self._labels[name] = values
        return self._labels[name]

    def _column(self, name: str) -> list[Any]:
        """One column of all shards; of remote shards only this column is fetched."""
        chunks = []
        for shard in range(len(self._shards)):
            reader = self._open_file(shard, name)
            batches = [self._read_batch(reader, shard, index) for index in range(reader.num_record_batches)]
            self._require_rows(shard, sum(batch.num_rows for batch in batches))
            chunks += [batch.column(0) for batch in batches]
        return chunks

    def _require_rows(self, shard: int, found: int) -> None:
        if found != self._shards[shard].rows:
            raise self._broken(shard, f"{found} rows where the manifest has {self._shards[shard].rows}")

    def _open(self, shard: int) -> tuple[Any, list[int]]:
        """The shard's reader and the first row of each of its record batches; call with the lock held."""
        if shard not in self._readers:
            # Batches are cut by bytes as well as rows: their lengths are read off a narrow column.
            narrow = self._open_file(shard, "identity")
            rows = (self._read_batch(narrow, shard, i).num_rows for i in range(narrow.num_record_batches))
            *starts, end = itertools.accumulate(rows, initial=0)
            self._require_rows(shard, end)
            self._readers[shard] = self._open_file(shard), starts
        return self._readers[shard]

    def _open_file(self, shard: int, column: str | None = None) -> Any:
        """A reader of one shard; of one column only, if named, else of those that every data set has."""
        found = self._open_columns(shard).schema
        names = SCHEMA.names if column is None else [column]
        places = [found.get_field_index(name) for name in names]
        kinds = {field.name: field.type for field in found}
        known = {field.name: field.type for field in SCHEMA}
        if places != sorted(places) or any(
            kinds.get(name) != known.get(name, kinds.get(name)) for name in names
        ):
            raise self._broken(shard, f"columns {found.names} where {names} should be")
        return self._open_columns(shard, places)

    def _open_columns(self, shard: int, places: list[int] | None = None) -> Any:
        """A reader of one shard, whatever columns it has, or of those at some places."""
        location = locate(self.folder)
        file = self._shards[shard].file
        try:
            if location.is_local:
                source = pa.memory_map(location.file(file))
            else:
                source = location.filesystem.open_input_file(location.file(file))
            reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=places))
            _ = reader.schema.names  # names that are no text are noticed here
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._broken(shard, error) from error
        return reader

    def _read_batch(self, reader: Any, shard: int, index: int) -> Any:
        try:
            batch = reader.get_batch(index)
            # Offsets that a disk or anyone else has changed would have Arrow read outside of the file.
            batch.validate(full=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._broken(shard, error) from error
        if empty := [name for name in batch.schema.names if batch.column(name).null_count]:
            raise self._broken(shard, f"rows without {' and '.join(empty)}")
        return batch

    def _broken(self, shard: int, found: object) -> DmxError:
        failed = isinstance(found, OSError) and store_fault(found)
        advice = STORE_ADVICE if failed else "copy the data set again or ingest it again"
        return DmxError(
            f"{self.folder}/{self._shards[shard].file}: split {self._name}: wanted an Arrow IPC file, "
            f"found {found}; {advice}"
        )
