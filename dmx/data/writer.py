"""Writing a data set so that it is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import pyarrow as pa

from dmx import __version__
from dmx.data.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    SKIPPED_NAME,
    SPLITS,
    WITH_MORE_COLUMNS,
    Manifest,
    Shard,
    SplitCounts,
)
from dmx.data.storage import Location, locate
from dmx.errors import DmxError

SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("identity", pa.int64()),
        ("camera", pa.int32()),
        ("key", pa.string()),
    ]
)
# What only some data sets have: where in a video a crop was cut out. They stand behind those of SCHEMA.
VIDEO_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("frame", pa.int64()),
        ("time_s", pa.float64()),
        ("box", pa.list_(pa.int32(), 4)),
        ("score", pa.float32()),
        ("track", pa.int64()),
    ]
)
ROWS_PER_SHARD = 16384
# A record batch is all that the writer ever holds, and what a remote reader fetches at once.
BATCH_ROWS = 1024
BATCH_BYTES = 32 << 20


class _HashingFile:
    """A write-only file object that counts and hashes what passes through."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._digest = stream, hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._stream.write(view)
        self._digest.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._stream.flush()

    @property
    def closed(self) -> bool:
        return bool(self._stream.closed)

    def close(self) -> None:
        self._stream.close()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class _SplitWriter:
    """Writes one split's shards under temporary names; holds one record batch in memory."""

    def __init__(self, location: Location, name: str, rows_per_shard: int, schema: Any) -> None:
        self._location, self._name, self._rows_per_shard = location, name, rows_per_shard
        self._schema = schema
        self._identities: set[int] = set()
        self._cameras: set[int] = set()
        self._images = self._labelled = 0
        self._columns: dict[str, list[Any]] = {column: [] for column in schema.names}
        self._batch_bytes = self._shard_rows = 0
        self._file: _HashingFile | None = None
        self._writer: Any = None
        self.shards: list[Shard] = []

    def add(self, image: bytes, identity: int, camera: int, key: str, more: Mapping[str, Any]) -> None:
        """Append an image as encoded bytes; -1 is unknown. Full shards are written out."""
        row = {"image": image, "identity": identity, "camera": camera, "key": key, **more}
        for name, column in self._columns.items():
            column.append(row[name])
        self._images += 1
        if identity >= 0:
            self._labelled += 1
            self._identities.add(identity)
        if camera >= 0:
            self._cameras.add(camera)
        self._batch_bytes += len(image)
        rows = len(self._columns["key"])
        if self._shard_rows + rows >= self._rows_per_shard:
            self._flush()
            self._finish_shard()
        elif rows >= BATCH_ROWS or self._batch_bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        rows = len(self._columns["key"])
        if rows == 0:
            return
        if self._writer is None:
            path = self._location.file(temporary_name(self._file_name()))
            self._file = _HashingFile(self._location.filesystem.open_output_stream(path))
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), self._schema)
        arrays = [pa.array(self._columns[field.name], field.type) for field in self._schema]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        for column in self._columns.values():
            column.clear()
        self._shard_rows += rows
        self._batch_bytes = 0

    def _file_name(self) -> str:
        return f"{self._name}-{len(self.shards):05d}.arrow"

    def _finish_shard(self) -> None:
        if self._writer is None or self._file is None:
            return
        self._writer.close()
        self._file.close()
        self.shards.append(
            Shard(self._file_name(), self._shard_rows, self._file.bytes, self._file.hexdigest())
        )
        self._writer = self._file = None
        self._shard_rows = 0

    def finish(self) -> SplitCounts:
        self._flush()
        self._finish_shard()
        return SplitCounts(
            self._images, self._labelled, len(self._identities), len(self._cameras), tuple(self.shards)
        )

    def abandon(self) -> list[str]:
        """Close what is open; returns the temporary files written so far."""
        names = [temporary_name(shard.file) for shard in self.shards]
        if self._file is not None:
            names.append(temporary_name(self._file_name()))
            with suppress(OSError):
                self._file.close()
        return names


def temporary_name(name: str) -> str:
    """What a file of a data set is called until the whole set is written."""
    return f".{name}.tmp"


class DatasetWriter:
    """Writes a data set; what is under its folder changes only when everything was written.

    Use it as a context manager. Files get temporary names first; on leaving the block they are renamed and
    the manifest is written last. On an exception everything temporary is deleted and the folder is as before.

    Args:
        folder: local path or URI.
        layout: where the images came from, for the manifest.
        rows_per_shard: images in a shard; the last one of a split has fewer.
        overwrite: replace a data set that is already there.
        more_columns: columns (`pyarrow.Schema`) of every row behind those of `SCHEMA`; None: no others.

    Raises:
        DmxError: a data set is already there and `overwrite` is off, or the folder holds other files.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        layout: str,
        rows_per_shard: int = ROWS_PER_SHARD,
        overwrite: bool = False,
        more_columns: Any = None,
    ) -> None:
        if rows_per_shard < 1:
            raise DmxError(f"rows per shard: wanted at least 1, found {rows_per_shard}")
        self.folder, self._layout, self._rows_per_shard = str(folder), layout, rows_per_shard
        self._schema = SCHEMA if more_columns is None else pa.schema([*SCHEMA, *more_columns])
        self._location = locate(folder)
        self._is_new = not self._location.names()
        self._replaces = self._check_folder(overwrite)
        self._splits: dict[str, _SplitWriter] = {}
        self._skipped: list[tuple[str, str]] = []
        self.ignored = 0
        self.warnings: list[str] = []
        self.manifest: Manifest | None = None

    def _check_folder(self, overwrite: bool) -> list[str]:
        """The files of the data set to be replaced."""
        names = self._location.names()
        ours = [n for n in names if n.endswith((".arrow", ".tmp")) or n in (MANIFEST_NAME, SKIPPED_NAME)]
        if MANIFEST_NAME in names and not overwrite:
            raise DmxError(
                f"{self.folder}: wanted an empty or new folder, found a data set ({MANIFEST_NAME}); "
                "choose another folder, or replace the data set with --overwrite"
            )
        if others := sorted(set(names) - set(ours)):
            raise DmxError(
                f"{self.folder}: wanted an empty or new folder, found {', '.join(others[:3])}"
                f"{' ...' if len(others) > 3 else ''}; choose another folder"
            )
        return ours

    def __enter__(self) -> Self:
        self._location.filesystem.create_dir(self._location.path, recursive=True)
        return self

    def add(
        self,
        split: str,
        image_bytes: bytes,
        identity: int,
        camera: int,
        key: str,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Append one image; identity and camera are -1 where unknown, `more` holds its `more_columns`."""
        if split not in SPLITS:
            raise DmxError(f"{key}: wanted a split among {', '.join(SPLITS)}, found {split!r}")
        if split not in self._splits:
            self._splits[split] = _SplitWriter(self._location, split, self._rows_per_shard, self._schema)
        self._splits[split].add(image_bytes, identity, camera, key, more)

    def skip(self, key: str, reason: str) -> None:
        """Record that an image of the source is left out, and why."""
        self._skipped.append((key, reason))

    @property
    def skipped_count(self) -> int:
        """How many images were left out so far."""
        return len(self._skipped)

    def counts(self) -> dict[str, SplitCounts]:
        """What has been added so far, by split; finishes the open shards, so call it once all is added."""
        return {name: self._splits[name].finish() for name in SPLITS if name in self._splits}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon()
            return
        try:
            self._commit()
        except BaseException:
            self._abandon()
            raise

    def _commit(self) -> None:
        manifest = Manifest(
            layout=self._layout,
            dmx_version=__version__,
            splits=self.counts(),
            skipped=len(self._skipped),
            ignored=self.ignored,
            warnings=tuple(self.warnings),
            schema_version=SCHEMA_VERSION if self._schema is SCHEMA else WITH_MORE_COLUMNS,
        )
        if not manifest.splits:
            raise DmxError(
                f"{self.folder}: wanted at least one image, found none ({len(self._skipped)} skipped)"
            )
        # From here on the old data set, if there was one, is gone: no manifest means no data set. What an
        # interrupted run left behind goes too.
        self._location.delete(MANIFEST_NAME)
        written = {
            temporary_name(shard.file) for counts in manifest.splits.values() for shard in counts.shards
        }
        for name in set(self._replaces) - written:
            self._location.delete(name)
        filesystem, file = self._location.filesystem, self._location.file
        for counts in manifest.splits.values():
            for shard in counts.shards:
                filesystem.move(file(temporary_name(shard.file)), file(shard.file))
        lines = (json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in self._skipped)
        self._location.write_atomically(SKIPPED_NAME, "".join(lines).encode())
        self._location.write_atomically(MANIFEST_NAME, manifest.to_json().encode())
        self.manifest = manifest

    def _abandon(self) -> None:
        """Delete what was written, unless that fails, too: what went wrong first is told."""
        with suppress(OSError, DmxError):
            for writer in self._splits.values():
                for name in writer.abandon():
                    self._location.delete(name)
            if self._is_new and not self._location.names():
                self._location.filesystem.delete_dir(self._location.path)
