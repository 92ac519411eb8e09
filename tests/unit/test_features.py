"""Features in Parquet: any part of them, from files of any cut, and whatever is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmx.errors import DmxError
from dmx.features import Features

D = 5


def values(rows: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(rows, D)).astype(np.float32)


def fixed(x: np.ndarray[Any, Any], kind: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.astype(kind.to_pandas_dtype()).ravel(), kind), D)


def ragged(x: np.ndarray[Any, Any], kind: Any) -> Any:
    return pa.array([row.astype(kind.to_pandas_dtype()) for row in x], pa.list_(kind))


def write(file: Path, columns: dict[str, Any], group: int = 3) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=group)


def folder_of(tmp_path: Path, cuts: tuple[int, ...], make: Any = fixed, kind: Any = None) -> Any:
    """A folder with a part for each of `cuts`, and what is in all of them."""
    x, at = values(sum(cuts)), 0
    for part, rows in enumerate(cuts):
        here = slice(at, at + rows)
        keys = [f"{row}.jpg" for row in range(at, at + rows)]
        columns = {"key": pa.array(keys, pa.string()), "embedding": make(x[here], kind or pa.float32())}
        write(tmp_path / f"part-{part:05d}.parquet", columns)
        at += rows
    return x


@pytest.mark.parametrize("make", [fixed, ragged])
@pytest.mark.parametrize("cuts", [(11,), (1, 0, 7, 3), (3, 3)])
def test_every_range_of_rows(tmp_path: Path, cuts: tuple[int, ...], make: Any) -> None:
    x = folder_of(tmp_path, cuts, make)
    features = Features(tmp_path)
    assert (len(features), features.width, features.column) == (len(x), D, "embedding")
    for begin in range(len(x) + 1):
        for end in range(begin, len(x) + 1):
            found = features.read_rows(begin, end)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, x[begin:end])
            keys = features.read_column("key", begin, end).to_pylist()
            assert keys == [f"{row}.jpg" for row in range(begin, end)]


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_blocks_are_all_rows_in_order(tmp_path: Path, rows: int) -> None:
    x = folder_of(tmp_path, (4, 7))
    found = list(Features(tmp_path).blocks(rows))
    assert [begin for begin, _ in found] == list(range(0, 11, rows))
    np.testing.assert_array_equal(np.concatenate([block for _, block in found]), x)


@pytest.mark.parametrize("make", [fixed, ragged])
@pytest.mark.parametrize("kind", [pa.float16(), pa.float64()])
def test_other_precisions_come_as_float32(tmp_path: Path, make: Any, kind: Any) -> None:
    x = folder_of(tmp_path, (6,), make, kind)
    expected = x.astype(kind.to_pandas_dtype()).astype(np.float32)
    np.testing.assert_array_equal(Features(tmp_path).read_rows(0, 6), expected)


def test_one_file_and_columns_of_other_names(tmp_path: Path) -> None:
    x = values(4)
    write(tmp_path / "a.parquet", {"vector": fixed(x, pa.float32()), "n": pa.array(range(4))})
    features = Features(tmp_path / "a.parquet")
    assert features.column == "vector"
    assert features.columns == ["vector", "n"]
    np.testing.assert_array_equal(features.read_rows(1, 3), x[1:3])
    both = {"left": fixed(x, pa.float32()), "right": fixed(x + 1, pa.float32())}
    write(tmp_path / "b.parquet", both)
    np.testing.assert_array_equal(Features(tmp_path / "b.parquet", "right").read_rows(0, 4), x + 1)
    with pytest.raises(DmxError, match=r"b\.parquet: wanted a column embedding, found left \(.*right \("):
        Features(tmp_path / "b.parquet")
    uri = f"file://{tmp_path}/a.parquet"
    np.testing.assert_array_equal(Features(uri).read_rows(0, 4), x)


def test_only_the_row_groups_that_are_needed_are_read(tmp_path: Path) -> None:
    """What is broken elsewhere does not matter."""
    file = tmp_path / "part-00000.parquet"
    x = values(3000)
    pq.write_table(
        pa.table({"embedding": fixed(x, pa.float32())}),
        file, row_group_size=1000, compression="none", use_dictionary=False,
    )  # fmt: skip
    content = bytearray(file.read_bytes())
    column = pq.read_metadata(file).row_group(0).column(0)
    begin = column.data_page_offset
    content[begin : begin + 40] = bytes(40)
    file.write_bytes(content)
    features = Features(tmp_path)
    np.testing.assert_array_equal(features.read_rows(1000, 3000), x[1000:])
    with pytest.raises(DmxError, match=r"part-00000\.parquet: column embedding: wanted a whole Parquet file"):
        features.read_rows(0, 1)


def test_files_that_begin_with_a_dot_or_an_underscore_are_others(tmp_path: Path) -> None:
    folder_of(tmp_path, (2,))
    for name in (".part-00001.parquet.tmp", ".hidden.parquet", "_metadata.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"no parquet")
    assert len(Features(tmp_path)) == 2


@pytest.mark.parametrize("make", [fixed, ragged])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, make: Any, bad: float) -> None:
    x = values(7)
    x[5, 2] = bad
    write(tmp_path / "x.parquet", {"embedding": make(x, pa.float32())})
    features = Features(tmp_path)
    np.testing.assert_array_equal(features.read_rows(0, 5), x[:5])
    with pytest.raises(DmxError, match=rf"x\.parquet: column embedding, row 5: .*found {bad} at place 2"):
        features.read_rows(4, 7)


def test_rows_without_values_and_of_other_widths_are_named(tmp_path: Path) -> None:
    rows = [[1.0] * D, [1.0] * D, None, [1.0] * 3, [1.0, None, 1.0, 1.0, 1.0]]
    write(tmp_path / "x.parquet", {"embedding": pa.array(rows, pa.list_(pa.float32()))})
    features = Features(tmp_path)
    for begin, told in (
        (2, "row 2: .*no value at all"),
        (3, "row 3: .*3 numbers"),
        (4, "row 4: .*none at place 1"),
    ):
        with pytest.raises(DmxError, match=rf"x\.parquet: column embedding, {told}"):
            features.read_rows(begin, begin + 1)
    write(tmp_path / "y.parquet", {"embedding": pa.array([None], pa.list_(pa.float32()))})
    with pytest.raises(DmxError, match=r"y\.parquet: column embedding, row 0: wanted numbers, found none"):
        Features(tmp_path / "y.parquet")


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path, (2,))
    wider = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(7, np.float32)), 7)
    write(tmp_path / "part-00001.parquet", {"embedding": wider})
    with pytest.raises(DmxError, match=r"part-00001\.parquet: .*lists of 5 numbers.*found 7"):
        Features(tmp_path)
    write(tmp_path / "part-00001.parquet", {"other": pa.array([1])})
    with pytest.raises(DmxError, match=r"part-00001\.parquet: wanted a column embedding, found other"):
        Features(tmp_path)
    write(tmp_path / "part-00001.parquet", {"embedding": pa.array([1])})
    with pytest.raises(DmxError, match=r"part-00001\.parquet: column embedding: .*found int64"):
        Features(tmp_path)
    (tmp_path / "part-00001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DmxError, match=r"part-00001\.parquet: wanted a Parquet file"):
        Features(tmp_path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DmxError, match=r"nothing: .*no such file or folder; `dmx embed`"):
        Features(tmp_path / "nothing")
    with pytest.raises(DmxError, match=r"no \.parquet file in it"):
        Features(tmp_path)
    folder_of(tmp_path, (4,))
    features = Features(tmp_path)
    for begin, end in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(DmxError, match=rf"wanted the rows {begin} to {end}, found 4 rows"):
            features.read_rows(begin, end)
    with pytest.raises(DmxError, match="wanted a column age, found key"):
        features.read_column("age")
    with pytest.raises(DmxError, match="rows of a block"):
        next(features.blocks(0))


def test_an_unfinished_embedding_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, (4,))
    (tmp_path / "embeddings.json").write_text(json.dumps({"finished": False}))
    with pytest.raises(DmxError, match="has not ended; run it again"):
        Features(tmp_path)
    (tmp_path / "embeddings.json").write_text(json.dumps({"finished": True}))
    assert len(Features(tmp_path)) == 4
