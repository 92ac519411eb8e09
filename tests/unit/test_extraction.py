"""Extraction: what is in a batch, what is in a part, and waiting that ends."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from dmx.data.dataset import open_dataset
from dmx.data.shards import DatasetWriter
from dmx.distributed import World
from dmx.embedding import decode_all
from dmx.errors import DmxError
from dmx.extraction.patience import patiently
from dmx.extraction.pipeline import chunked, told
from dmx.extraction.plan import Output, Part, Settings, fingerprint, key_of, parts_of, weights_sha256
from dmx.extraction.stages import CHUNKS, Decode, Forward, Player, Source
from dmx.extraction.writing import write_part
from dmx.features import Features
from dmx.train.extraction import LocalFeed, extract

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SETTINGS = Settings("m", "w", "d", "s", "train", 11, 3, 5, 8, 4, "fp32", False)
PLAYER = Player("cpu", 1, "fp32", False, False, 8, 4, 100)
ROWS = 4


class Model(nn.Module):
    """A linear map, to five numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 8 * 4, 5)

    def embed(self, images: Tensor) -> Tensor:
        found: Tensor = self.linear(images.flatten(1))
        return found


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Eleven images in three shards, the sixth and all of the last shard broken."""
    with DatasetWriter(tmp_path / "set", layout="folders", rows_per_shard=ROWS) as writer:
        for row in range(11):
            pixels = np.random.default_rng(row).integers(0, 256, (8, 4, 3), np.uint8)
            encoded = b"P6 4 8 255\n" + pixels.tobytes()
            writer.add("train", b"no image" if row == 5 or row > 7 else encoded, row, row % 2, f"{row}.ppm")
    return tmp_path / "set"


def processed(dataset: Path, part: Part, batch_size: int) -> list[Any]:
    """What the stages make of a part."""
    source = Source(f"{dataset} {batch_size}", lambda: open_dataset(dataset).split("train"))
    decode = Decode(source, 8, 4, batch_size, is_nice=False)
    forward = Forward(Model, PLAYER, source)
    return [
        table
        for chunk in chunked([part], batch_size, 1)
        for batch in decode(chunk)
        for table in forward(batch)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_parts_are_the_shards(dataset: Path, tmp_path: Path, batch_size: int) -> None:
    """Rows, keys and labels of what was decoded, and a list of the rest, whatever order batches come in."""
    split = open_dataset(dataset).split("train")
    parts = parts_of(split)
    assert [(part.begin, part.end) for part in parts] == [(0, 4), (4, 8), (8, 11)]
    output = Output(str(tmp_path / "out"))
    assert not output.begin(SETTINGS, {}, batch_size)
    assert output.missing(parts) == parts
    others = processed(dataset, parts[0], batch_size)[:1]
    for part in parts:
        tables = [*reversed(processed(dataset, part, batch_size)), *(others if part.index else [])]
        write_part(output, part, split, 5, tables)
    assert output.missing(parts) == []
    assert output.finish(parts) == {"rows": 7, "skipped": 4} == output.counts()
    assert output.begin(SETTINGS, {}, batch_size)

    features, rows = Features(tmp_path / "out"), [0, 1, 2, 3, 4, 6, 7]
    assert features.read_column("row").to_pylist() == rows
    assert features.read_column("identity").to_pylist() == rows
    assert features.read_column("camera").to_pylist() == [row % 2 for row in rows]
    assert features.read_column("key").to_pylist() == [f"{row}.ppm" for row in rows]
    np.testing.assert_allclose(np.linalg.norm(features.read_rows(0, 7), axis=1), 1, atol=1e-6)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in skipped] == ["5.ppm", "8.ppm", "9.ppm", "10.ppm"]
    assert [key_of(split, row) for row in (0, 5, 10)] == ["0.ppm", "5.ppm", "10.ppm"]


def test_a_part_that_is_not_whole_is_made_again(dataset: Path, tmp_path: Path) -> None:
    split = open_dataset(dataset).split("train")
    parts, output = parts_of(split), Output(str(tmp_path / "out"))
    output.begin(SETTINGS, {}, 2)
    for part in parts:
        write_part(output, part, split, 5, processed(dataset, part, 2))
    (tmp_path / "out" / parts[0].name).write_bytes(b"PAR1 cut short")
    (tmp_path / "out" / parts[1].skipped_name).unlink()
    (tmp_path / "out" / ".part-00002.parquet.1.tmp").write_bytes(b"left")
    assert not output.begin(SETTINGS, {}, 2)
    assert not (tmp_path / "out" / ".part-00002.parquet.1.tmp").exists()
    assert output.missing(parts) == parts[:2]
    with pytest.raises(RuntimeError, match="wanted 4 images, found 2 and 0 skipped"):
        write_part(output, parts[0], split, 5, processed(dataset, parts[0], 2)[:1])


def test_a_job_that_was_killed_before_it_said_what_it_is_begins_anew(tmp_path: Path) -> None:
    (tmp_path / ".embeddings.json.tmp").write_text("half of it")
    output = Output(str(tmp_path))
    assert not output.begin(SETTINGS, {}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings.json"]


def test_what_was_made_otherwise_is_told_apart(dataset: Path, tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    output.begin(SETTINGS, {}, 2)
    assert output.recorded_precision() == "fp32"
    assert not output.begin(replace(SETTINGS, model="elsewhere", dataset="moved"), {}, 7)
    with pytest.raises(DmxError, match="flip False, not True"):
        output.begin(replace(SETTINGS, flip=True), {}, 2)
    whole, model = open_dataset(dataset), Model()
    assert fingerprint(whole, "train") == fingerprint(open_dataset(dataset), "train")
    before = weights_sha256(model)
    assert weights_sha256(Model()) == before
    with torch.no_grad():
        model.linear.bias[2] += 1
    assert weights_sha256(model) != before


@pytest.mark.parametrize(("batch_size", "decoders"), [(1, 1), (64, 2), (64, 100), (3000, 4)])
def test_chunks_are_whole_batches(batch_size: int, decoders: int) -> None:
    parts = [Part(0, 0, 16384), Part(1, 16384, 16384), Part(2, 16384, 20000)]
    tables = chunked(parts, batch_size, decoders)
    chunks = pa.concat_tables(tables).to_pylist()
    assert all(table.schema == CHUNKS for table in tables)
    rows = [row for chunk in chunks for row in range(chunk["begin"], chunk["end"])]
    assert rows == list(range(20000))
    ends = {part.end for part in parts}
    assert all(c["end"] in ends or (c["end"] - c["begin"]) % batch_size == 0 for c in chunks)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_any_number_of_processes_make_the_same_batches(dataset: Path, size: int) -> None:
    split = open_dataset(dataset).split("train").shard(0)  # type: ignore[attr-defined]  # which has no broken one
    found = {}
    for rank in range(size):
        feed = LocalFeed(World(rank, size, 0, 1, torch.device("cpu")), split, 8, 4, 3)
        found |= {tuple(rows): pixels for rows, pixels in feed.batches("test")}
    assert set(found) == {(0, 1, 2), (3,)}
    np.testing.assert_array_equal(found[3,], decode_all(split, np.array([3]), 8, 4, "test"))


# Prints what RayFeed gives of the data set that is named, and what it says of a broken image.
DECODED_BY_RAY = """
import hashlib, sys
from dmx.data.dataset import open_dataset
from dmx.distributed import world
from dmx.errors import DmxError
from dmx.extraction.feed import RayFeed
from dmx.ray_cluster import ray_cluster
split = open_dataset(sys.argv[1]).split("train")
with ray_cluster(2), world(60.0) as place:
    for part in (split.shard(0), split):
        try:
            for rows, pixels in RayFeed(place, part, 8, 4, 3).batches("test"):
                print(*rows, hashlib.sha256(pixels.tobytes()).hexdigest())
        except DmxError as error:
            print(error)
"""


def test_ray_decodes_what_threads_decode(dataset: Path) -> None:
    """To the bit, in any order; a broken image is named."""
    command = [sys.executable, "-c", DECODED_BY_RAY, str(dataset)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    *found, last = said.splitlines()
    split = open_dataset(dataset).split("train").shard(0)  # type: ignore[attr-defined]  # which has no broken one
    wanted = [
        " ".join([*map(str, rows), hashlib.sha256(pixels.tobytes()).hexdigest()])
        for rows, pixels in LocalFeed(ALONE, split, 8, 4, 3).batches("test")
    ]
    assert set(wanted) <= set(found)
    assert "split train: image 5.ppm: wanted an image that can be decoded" in last


def test_a_broken_image_ends_extraction_and_is_named(dataset: Path) -> None:
    feed = LocalFeed(ALONE, open_dataset(dataset).split("train"), 8, 4, 2)
    with pytest.raises(DmxError, match=r"embed: split train: image 5\.ppm: wanted an image that can be"):
        extract(feed, Model(), 5, ALONE, "embed")


def test_waiting_ends() -> None:
    assert list(patiently(lambda: range(5), 10, "numbers")) == list(range(5))
    asleep = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        asleep.wait(60)

    stream = patiently(slow, 0.2, "numbers, in vain")
    assert next(stream) == 1
    start = time.monotonic()
    with pytest.raises(DmxError, match=r"waited 0 s for numbers, in vain"):
        next(stream)
    assert time.monotonic() - start < 10
    asleep.set()

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        list(patiently(broken, 10, "numbers"))


def test_parts_are_read_by_row_groups(dataset: Path, tmp_path: Path) -> None:
    split = open_dataset(dataset).split("train")
    output, part = Output(str(tmp_path / "out")), parts_of(split)[0]
    output.begin(SETTINGS, {}, 2)
    write_part(output, part, split, 5, processed(dataset, part, 2))
    schema = pq.read_schema(tmp_path / "out" / part.name)
    assert schema.field("embedding").type == pa.list_(pa.float32(), 5)


def test_errors_of_other_machines_come_as_they_were_said() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    raised = RayTaskError("Forward", "Traceback: ...", DmxError("image 3.jpg: no features"))
    assert str(told(raised.as_instanceof_cause())) == "image 3.jpg: no features"
    assert str(told(raised)) == "image 3.jpg: no features"
    assert "run the same command again" in str(told(ActorDiedError()))
