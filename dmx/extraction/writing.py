"""One part of the output: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dmx.data.shards import ShardSplit, Split
from dmx.extraction.plan import PARTS_STAY, TEMPORARY_SUFFIX, Output, Part
from dmx.writing import writing

# Rows of a row group: what a reader of some rows decodes at least.
GROUP_ROWS = 2048


def schema(width: int) -> Any:
    """Columns of a part: row in the split, key, identity and camera (-1 unknown), unit embedding."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("key", pa.string()),
            ("identity", pa.int64()),
            ("camera", pa.int32()),
            ("embedding", pa.list_(pa.float32(), width)),
        ]
    )


def write_part(output: Output, part: Part, split: Split, width: int, batches: Sequence[Any]) -> None:
    """Write a part and, before it, the list of its images that cannot be decoded.

    Args:
        output: the folder.
        part: which one.
        split: where keys, identities and cameras are.
        width: of the features, D.
        batches: tables of `dmx.extraction.stages.Forward`, in any order; rows of other parts are left out.
    """
    table = pa.concat_tables(batches)
    table = table.filter(pc.equal(table["part"], part.index)).sort_by("begin")
    rows = np.concatenate([np.frombuffer(value.as_buffer(), np.int64) for value in table["rows"]])
    features = np.concatenate([np.frombuffer(value.as_buffer(), np.float32) for value in table["features"]])
    skipped = [line for text in table["skipped"].to_pylist() for line in json.loads(text)]
    if len(rows) + len(skipped) != part.rows:
        raise RuntimeError(
            f"{part.name}: wanted {part.rows} images, found {len(rows)} and {len(skipped)} skipped"
        )
    with writing(output.folder, part.name, stays=PARTS_STAY):
        _write(output, part, skipped, _table(split, part, rows, features, width))


def _write(output: Output, part: Part, skipped: list[Any], table: Any) -> None:
    if skipped:
        lines = "".join(json.dumps(line) + "\n" for line in skipped)
        output.location.write_atomically(part.skipped_name, lines.encode())
    _write_parquet(output, part.name, table)


def _table(
    split: Split, part: Part, rows: NDArray[np.int64], features: NDArray[np.float32], width: int
) -> Any:
    own, first = (split.shard(part.index), part.begin) if isinstance(split, ShardSplit) else (split, 0)
    keys, places = own.keys, rows - first
    columns = [
        pa.array(rows),
        pa.array([keys[place] for place in places.tolist()], pa.string()),
        pa.array(own.identities[places]),
        pa.array(own.cameras[places]),
        pa.FixedSizeListArray.from_arrays(pa.array(features), width),
    ]
    return pa.table(columns, schema=schema(width))


def _write_parquet(output: Output, name: str, table: Any) -> None:
    """Write and rename. The temporary name is this attempt's own: another may be at work on the same part."""
    location = output.location
    temporary = location.file(f".{name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with location.filesystem.open_output_stream(temporary) as file:
            # Features are noise to a compressor, and no value comes twice.
            pq.write_table(table, file, row_group_size=GROUP_ROWS, compression="none", use_dictionary=False)
        location.filesystem.move(temporary, location.file(name))
    except BaseException:
        with suppress(OSError):  # what is wrong is told already
            location.filesystem.delete_file(temporary)
        raise
