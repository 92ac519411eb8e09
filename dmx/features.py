"""Features in Parquet, whoever wrote them: one file, or a folder of parts, local or in an object store.

Rows are numbered through all parts, in the order of the parts' names. Nothing but what is asked for is read:
opening reads the parts' footers, and a range of rows the row groups that hold it, page by page.

Symbols: N rows, D width.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from dmx.data.storage import Location, locate
from dmx.errors import DmxError
from dmx.kernels.progress import counting
from dmx.writing import STORE_ADVICE, store_fault

COLUMN = "embedding"
MANIFEST_NAME = "embeddings.json"
SUFFIX = ".parquet"

# Footers read at a time: in an object store each takes a round trip.
OPENERS = 16
# Bytes of a file that are fetched at a time, and decoded values that are held beside the result.
BUFFER_BYTES = 1 << 20
DECODED_BYTES = 16 << 20


@dataclass(frozen=True)
class Part:
    """One Parquet file: its name in the folder, its footer, and the first row of each of its row groups."""

    name: str
    metadata: Any
    starts: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows in this file."""
        return self.starts[-1]


class Features:
    """Features (N, D) in Parquet, read in parts. Safe to use from several threads.

    Args:
        path: a Parquet file, or a folder of them; a local path or a URI such as `s3://bucket/features`. Files
            whose names begin with a dot or an underscore are not looked at.
        column: of lists of float16, float32 or float64, all as long. None takes `embedding`, or else the
            only column of such lists.

    Raises:
        DmxError: nothing to read there, no such column, or parts that do not fit each other; names the file.
    """

    def __init__(self, path: str | Path, column: str | None = None) -> None:
        self.path = str(path)
        self._location, names = _parts(self.path)
        with ThreadPoolExecutor(OPENERS, thread_name_prefix="features") as pool:
            self._parts = tuple(pool.map(self._open_part, names))
        self._starts = tuple(itertools.accumulate((part.rows for part in self._parts), initial=0))
        self.column = self._find_column(column)
        self.width = self._find_width()

    def __len__(self) -> int:
        """Rows of all parts, N."""
        return self._starts[-1]

    @property
    def columns(self) -> list[str]:
        """Names of all columns of the first part."""
        return list(self._schema(self._parts[0]).names)

    @property
    def fingerprint(self) -> str:
        """A hash of the parts' names and footers, which tell sizes, places and extremes of every column."""
        digest = hashlib.sha256(self.column.encode())
        for part in self._parts:
            digest.update(
                json.dumps([part.name, part.metadata.to_dict()], default=str, sort_keys=True).encode()
            )
        return digest.hexdigest()

    def read_rows(self, begin: int, end: int) -> NDArray[np.float32]:
        """The features of the rows from `begin` to `end - 1`.

        Holds the result and little else, however large the row groups are.

        Returns:
            (end - begin, D) float32.

        Raises:
            DmxError: no such rows; or a value is missing, not finite, or a row has another width; names the
                file, the column and the row.
        """
        result = np.empty((self._checked(begin, end), self.width), np.float32)
        at = 0
        with counting(end - begin, "read features", "rows") as count:
            for part, first, array in self._stream(self.column, begin, end):
                result[at : at + len(array)] = self._rows_of(part, first, array)
                at += len(array)
                count(len(array))
        return result

    def blocks(self, rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All features in order, as pairs of first row and block (at most `rows`, D) float32.

        Reads every row group once, which `read_rows` does not where row groups are larger than what it is
        asked for.

        Raises:
            DmxError: as `read_rows`.
        """
        if rows < 1:
            raise DmxError(f"rows of a block: wanted at least 1, found {rows}")
        begin, filled = 0, 0
        block = np.empty((min(rows, len(self)), self.width), np.float32)
        for part, first, array in self._stream(self.column, 0, len(self)):
            values = self._rows_of(part, first, array)
            while len(values):
                taken = min(len(values), len(block) - filled)
                block[filled : filled + taken] = values[:taken]
                values, filled = values[taken:], filled + taken
                if filled == len(block):
                    yield begin, block
                    begin, filled = begin + filled, 0
                    block = np.empty((min(rows, len(self) - begin), self.width), np.float32)

    def read_column(self, name: str, begin: int = 0, end: int | None = None) -> Any:
        """Another column (such as `key`) of the rows from `begin` to `end - 1`; None goes to the last row.

        Returns:
            A `pyarrow.ChunkedArray`.

        Raises:
            DmxError: no such rows, or a part has no such column; names it.
        """
        end = len(self) if end is None else end
        self._checked(begin, end)
        arrays = [array for _, _, array in self._stream(name, begin, end)]
        return pa.chunked_array(arrays, type=None if arrays else self._type(self._parts[0], name))

    def _stream(self, name: str, begin: int, end: int) -> Iterator[tuple[Part, int, Any]]:
        """Arrays of one column with their part and their first row in it, which together are the rows."""
        for part, start in zip(self._parts, self._starts[:-1], strict=True):
            low, high = max(begin - start, 0), min(end - start, part.rows)
            if low >= high:
                continue
            self._type(part, name)
            groups = range(bisect.bisect_right(part.starts, low) - 1, bisect.bisect_left(part.starts, high))
            at = part.starts[groups[0]]
            for array in self._decode(part, name, list(groups)):
                if at < high and at + len(array) > low:
                    cut = max(low - at, 0)
                    yield part, at + cut, array[cut : high - at]
                at += len(array)
                if at >= high:
                    break

    def _decode(self, part: Part, name: str, groups: list[int]) -> Iterator[Any]:
        # The width is not known when the first row is read to tell it.
        width = getattr(self, "width", DECODED_BYTES) if name == self.column else 64
        rows = max(1, DECODED_BYTES // (8 * max(1, width)))
        try:
            with self._location.filesystem.open_input_file(self._location.file(part.name)) as source:
                file = pq.ParquetFile(
                    source, metadata=part.metadata, buffer_size=BUFFER_BYTES, pre_buffer=False
                )
                for batch in file.iter_batches(rows, row_groups=groups, columns=[name]):
                    yield batch.column(0)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DmxError(
                f"{self._where(part)}: column {name}: wanted a whole Parquet file, found {error}; "
                f"{_advice(error)}"
            ) from error

    def _rows_of(self, part: Part, first: int, array: Any) -> NDArray[np.float32]:
        """(n, D) float32 of a list array that begins at the part's row `first`."""
        lengths = (
            np.full(len(array), array.type.list_size)
            if pa.types.is_fixed_size_list(array.type)
            else array.value_lengths().fill_null(self.width).to_numpy(zero_copy_only=False)
        )
        if array.null_count:
            row = first + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            raise self._bad_row(part, row, "no value at all")
        if (wrong := lengths != self.width).any():
            row = int(np.argmax(wrong))
            raise self._bad_row(part, first + row, f"{lengths[row]} numbers")
        flat = array.flatten()
        given = flat.to_numpy(zero_copy_only=False).reshape(-1, self.width)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is told
            values = given.astype(np.float32, copy=False)
        # A missing number comes as NaN.
        if not (finite := np.isfinite(values).all(1)).all():
            row = int(np.argmin(finite))
            column = int(np.argmin(np.isfinite(values[row])))
            missing = flat.null_count and not flat[row * self.width + column].is_valid
            raise self._bad_row(
                part, first + row, f"{'none' if missing else given[row, column]} at place {column}"
            )
        return values  # type: ignore[no-any-return]

    def _bad_row(self, part: Part, row: int, found: str) -> DmxError:
        return DmxError(
            f"{self._where(part)}: column {self.column}, row {row}: wanted {self.width} finite float32 "
            f"numbers, found {found}; leave the row out, or embed its image again"
        )

    def _open_part(self, name: str) -> Part:
        try:
            with self._location.filesystem.open_input_file(self._location.file(name)) as source:
                metadata = pq.read_metadata(source)
                metadata.schema.to_arrow_schema()
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            if min(rows, default=0) < 0:
                raise ValueError(f"a group of {min(rows)} rows")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DmxError(
                f"{_joined(self.path, name)}: wanted a Parquet file, found {error}; {_advice(error)}"
            ) from error
        return Part(name, metadata, tuple(itertools.accumulate(rows, initial=0)))

    def _find_column(self, wanted: str | None) -> str:
        """The column that was asked for, `embedding`, or the only one that can be meant."""
        first = self._parts[0]
        lists = [field.name for field in self._schema(first) if _is_features(field.type)]
        if wanted is not None:
            chosen = wanted
        elif COLUMN in lists or len(lists) != 1:
            chosen = COLUMN
        else:
            chosen = lists[0]
        for part in self._parts:
            found = self._type(part, chosen)
            if not _is_features(found):
                raise DmxError(
                    f"{self._where(part)}: column {chosen}: wanted lists of float16, float32 or float64, "
                    f"found {found}; name another column"
                )
        return chosen

    def _find_width(self) -> int:
        """Numbers in a row: the type tells, or the first row does."""
        widths: dict[int, Part] = {}
        for part in self._parts:
            kind = self._type(part, self.column)
            if pa.types.is_fixed_size_list(kind):
                widths.setdefault(int(kind.list_size), part)
        if len(widths) > 1:
            (a, first), (b, second) = list(widths.items())[:2]
            raise DmxError(
                f"{self._where(second)}: column {self.column}: wanted lists of {a} numbers, as in "
                f"{first.name}, found {b}; parts of one model belong together"
            )
        if widths:
            return next(iter(widths))
        if not len(self):
            return 0
        part, _, array = next(self._stream(self.column, 0, 1))
        if array.null_count or not (width := int(array.value_lengths()[0].as_py())):
            raise DmxError(
                f"{self._where(part)}: column {self.column}, row 0: wanted numbers, found none; leave the "
                "row out, or embed its image again"
            )
        return width

    def _schema(self, part: Part) -> Any:
        return part.metadata.schema.to_arrow_schema()

    def _type(self, part: Part, name: str) -> Any:
        schema = self._schema(part)
        index = schema.get_field_index(name)
        if index < 0:
            raise DmxError(
                f"{self._where(part)}: wanted a column {name}, found "
                f"{', '.join(f'{field.name} ({field.type})' for field in schema) or 'none'}; name another "
                "column"
            )
        return schema.field(index).type

    def _checked(self, begin: int, end: int) -> int:
        if not 0 <= begin <= end <= len(self):
            raise DmxError(f"{self.path}: wanted the rows {begin} to {end}, found {len(self)} rows")
        return end - begin

    def _where(self, part: Part) -> str:
        return _joined(self.path, part.name)


def _is_features(kind: Any) -> bool:
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return any(test(kind) for test in lists) and pa.types.is_floating(kind.value_type)


def _advice(error: Exception) -> str:
    return STORE_ADVICE if store_fault(error) else "copy or write it again"


def _joined(path: str, name: str) -> str:
    return path if re.split(r"[/\\]", path.rstrip("/"))[-1] == name else f"{path.rstrip('/')}/{name}"


def _parts(path: str) -> tuple[Location, list[str]]:
    """The folder, and the names of the files to read in it."""
    location = locate(path)
    kind = location.kind()
    if kind == pafs.FileType.File:
        folder, _, name = location.path.rpartition("/")
        return Location(location.filesystem, folder, location.is_local), [name]
    names = location.names() if kind == pafs.FileType.Directory else []
    found = [name for name in names if name.endswith(SUFFIX) and not name.startswith((".", "_"))]
    if MANIFEST_NAME in names:
        _require_finished(location, path)
    if not found:
        what = "no such file or folder" if kind == pafs.FileType.NotFound else f"no {SUFFIX} file in it"
        raise DmxError(
            f"{path}: wanted features, a Parquet file or a folder of them, found {what}; "
            "`dmx embed` writes them"
        )
    return location, found


def _require_finished(location: Location, path: str) -> None:
    """Parts of a `dmx embed` that was interrupted are not all there is."""
    try:
        finished = json.loads(location.read(MANIFEST_NAME)).get("finished")
    except (ValueError, AttributeError) as error:
        raise DmxError(f"{path}/{MANIFEST_NAME}: wanted a JSON object, found {error}; embed again") from error
    if not finished:
        raise DmxError(
            f"{path}: wanted features of a whole split, found those of a `dmx embed` that has not ended; run "
            "it again to its end"
        )
