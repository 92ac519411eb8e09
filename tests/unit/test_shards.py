"""Shards: what goes in comes out, whole or not at all; broken images are left out and nothing else is."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import fs as pafs

from dmx.commands import ingest as command
from dmx.data import dataset as dataset_module
from dmx.data import manifest as manifest_module
from dmx.data import shards as shards_module
from dmx.data import writer as writer_module
from dmx.data.dataset import open_dataset
from dmx.data.images import broken_reason
from dmx.data.ingest import ingest
from dmx.data.manifest import read_manifest
from dmx.data.prefetch import map_ahead
from dmx.data.shards import DatasetWriter, ShardSplit, Split
from dmx.data.storage import Location
from dmx.errors import DmxError


def encode(kind: str = "JPEG", seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 24, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, rows: int = 10, rows_per_shard: int = 4, overwrite: bool = False) -> list[bytes]:
    images = [bytes([row % 256]) * (row + 1) for row in range(rows)]
    with DatasetWriter(folder, layout="test", rows_per_shard=rows_per_shard, overwrite=overwrite) as writer:
        for row, image in enumerate(images):
            writer.add("train", image, row // 2, row % 3, f"k/{row}")
        writer.skip("bad.jpg", "because")
    return images


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("rows_per_shard", [1, 3, 4, 10, 100])
@pytest.mark.parametrize("batch_rows", [1, 3, 1024])
def test_what_goes_in_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_shard: int, batch_rows: int
) -> None:
    monkeypatch.setattr(writer_module, "BATCH_ROWS", batch_rows)
    images = write(tmp_path / "set", 10, rows_per_shard)
    split = open_dataset(tmp_path / "set").split("train")
    assert isinstance(split, Split)
    assert len(split) == 10
    assert split.name == "train"
    assert split.identities.tolist() == [row // 2 for row in range(10)]
    assert split.identities.dtype == np.int64
    assert split.cameras.tolist() == [row % 3 for row in range(10)]
    assert split.cameras.dtype == np.int32
    assert split.keys == [f"k/{row}" for row in range(10)]
    order = np.random.default_rng(0).permutation(10)
    assert [split.image_bytes(int(row)) for row in order] == [images[row] for row in order]
    manifest, _ = read_manifest(tmp_path / "set", verify=True)
    assert [shard.rows for shard in manifest.splits["train"].shards][:-1] == [rows_per_shard] * (
        (10 - 1) // rows_per_shard
    )
    assert manifest.skipped == 1
    skipped = (tmp_path / "set" / manifest.skipped_file).read_text().splitlines()
    assert json.loads(skipped[0]) == {"key": "bad.jpg", "reason": "because"}


def test_shards_are_plain_arrow_with_the_documented_columns(tmp_path: Path) -> None:
    write(tmp_path / "set")
    with pa.memory_map(str(tmp_path / "set/train-00000.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.schema.names == ["image", "identity", "camera", "key"]
    assert [str(kind) for kind in table.schema.types] == ["binary", "int64", "int32", "string"]
    assert table.num_rows == 4


def test_split_pickles_small_and_reads_from_many_threads(tmp_path: Path) -> None:
    images = write(tmp_path / "set", 200, 16)
    split = open_dataset(tmp_path / "set").split("train")
    assert split.image_bytes(3) == images[3]
    frozen = pickle.dumps(split)
    assert len(frozen) < 4000
    again = pickle.loads(frozen)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.image_bytes, list(range(200)) * 3)) == images * 3


def test_errors_name_folder_split_and_field(tmp_path: Path) -> None:
    write(tmp_path / "set")
    with pytest.raises(DmxError, match=r"set \(test\): wanted the split 'query', found \['train'\]"):
        open_dataset(tmp_path / "set").split("query")
    with pytest.raises(DmxError, match=r"found no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(DmxError, match="wanted row 10, found 10 rows"):
        open_dataset(tmp_path / "set").split("train").image_bytes(10)
    with pytest.raises(DmxError, match="wanted the split 'gallery'"):
        open_dataset(tmp_path / "set").split("gallery")
    with (
        pytest.raises(DmxError, match="wanted a split among"),
        DatasetWriter(tmp_path / "b", layout="x") as writer,
    ):
        writer.add("test", b"x", 0, 0, "k")
    with pytest.raises(DmxError, match="at least one image"), DatasetWriter(tmp_path / "c", layout="x"):
        pass
    with pytest.raises(DmxError, match="rows per shard"):
        DatasetWriter(tmp_path / "d", layout="x", rows_per_shard=0)
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "field", ["schema_version", "layout", "splits", "skipped", "warnings", "dmx_version"]
)
def test_a_manifest_without_a_field_says_which(tmp_path: Path, field: str) -> None:
    write(tmp_path / "set")
    path = tmp_path / "set/manifest.json"
    value = json.loads(path.read_text())
    del value[field]
    path.write_text(json.dumps(value))
    with pytest.raises(DmxError, match=field):
        read_manifest(tmp_path / "set")


def test_damage_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "set")
    shard = tmp_path / "set/train-00001.arrow"
    content = shard.read_bytes()
    changed = bytearray(content)
    changed[-200] ^= 1
    shard.write_bytes(changed)
    open_dataset(tmp_path / "set")
    with pytest.raises(DmxError, match=r"train-00001\.arrow: wanted SHA-256"):
        read_manifest(tmp_path / "set", verify=True)
    shard.write_bytes(content[:-1])
    with pytest.raises(
        DmxError, match=rf"wanted {len(content)} bytes \(manifest\), found {len(content) - 1}"
    ):
        open_dataset(tmp_path / "set")
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(DmxError, match="wanted an Arrow IPC file"):
        open_dataset(tmp_path / "set").split("train").image_bytes(5)
    shard.unlink()
    with pytest.raises(DmxError, match="no such file"):
        open_dataset(tmp_path / "set")
    (tmp_path / "set/manifest.json").write_text("{")
    with pytest.raises(DmxError, match="wanted JSON"):
        open_dataset(tmp_path / "set")
    (tmp_path / "set/manifest.json").write_text("[]")
    with pytest.raises(DmxError, match="wanted a JSON object"):
        open_dataset(tmp_path / "set")


def test_a_shard_with_other_columns_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = pa.schema(
        [("image", pa.binary()), ("identity", pa.int64()), ("camera", pa.int64()), ("key", pa.string())]
    )
    monkeypatch.setattr(writer_module, "SCHEMA", other)
    write(tmp_path / "set")
    with pytest.raises(DmxError, match="columns"):
        open_dataset(tmp_path / "set").split("train").image_bytes(0)


def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "set", 10)
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}

    def stop_midway() -> None:
        with DatasetWriter(tmp_path / "set", layout="x", rows_per_shard=2, overwrite=True) as writer:
            for row in range(5):
                writer.add("train", b"new", row, row, str(row))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_midway()
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before


def test_overwrite_replaces_everything_and_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "set", 20, 2)
    with pytest.raises(DmxError, match="--overwrite"):
        write(tmp_path / "set")
    (tmp_path / "set/.train-00007.arrow.tmp").write_bytes(b"left by an interrupted run")
    images = write(tmp_path / "set", 3, 2, overwrite=True)
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert names == ["manifest.json", "skipped.jsonl", "train-00000.arrow", "train-00001.arrow"]
    split = open_dataset(tmp_path / "set").split("train")
    assert [split.image_bytes(row) for row in range(3)] == images
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    with pytest.raises(DmxError, match=r"thesis\.tex"):
        write(tmp_path / "other", overwrite=True)


def test_uris_and_object_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set")
    assert len(open_dataset(f"file://{tmp_path}/set").split("train")) == 10
    with pytest.raises(DmxError, match="nope://bucket/set: wanted"):
        open_dataset("nope://bucket/set").split("train")

    fsspec = pytest.importorskip("fsspec")
    memory = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory")))
    for module in (dataset_module, writer_module, manifest_module, shards_module):
        monkeypatch.setattr(module, "locate", lambda folder: Location(memory, "bucket/set", False))
    monkeypatch.setattr(writer_module, "BATCH_ROWS", 2)
    images = write(Path("unused"), 30, 8)
    split = open_dataset("unused").split("train")
    order = np.random.default_rng(0).permutation(30)
    assert [split.image_bytes(int(row)) for row in order] == [images[row] for row in order]
    assert isinstance(split, ShardSplit)
    assert len(split._batches) <= shards_module.REMOTE_BATCHES
    assert split.identities.tolist() == [row // 2 for row in range(30)]
    read_manifest("unused", verify=True)
    write(Path("unused"), 5, 8, overwrite=True)
    assert len(open_dataset("unused").split("train")) == 5


GOOD = {
    "jpeg": encode(),
    "progressive": encode(progressive=True),
    "grey": encode(mode="L"),
    "cmyk": encode(mode="CMYK"),
    "png": encode("PNG"),
    "palette": encode("PNG", mode="P"),
    "alpha": encode("PNG", mode="RGBA"),
    "webp": encode("WEBP"),
    "bmp": encode("BMP"),
}
BAD = {
    "empty": (b"", "zero bytes"),
    "text": (b"hello" * 50, "no known format"),
    "cut jpeg": (GOOD["jpeg"][: len(GOOD["jpeg"]) // 2], "truncated"),
    "cut progressive": (GOOD["progressive"][:600], "truncated"),
    "cut at the end": (GOOD["jpeg"][:-40], "truncated"),
    "header alone": (GOOD["jpeg"][:20], "no known format|not decodable|truncated"),
    "cut png": (GOOD["png"][: len(GOOD["png"]) // 2], "truncated|not decodable"),
    "bomb": (png_claiming(60000, 60000), "decompression bomb"),
    "large": (png_claiming(9000, 9000), "decompression bomb: 9000 x 9000"),
    "no pixels": (png_claiming(0, 4), "no|not"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images_of_every_kind(name: str) -> None:
    assert broken_reason(GOOD[name]) is None


@pytest.mark.parametrize("name", BAD)
def test_broken_images_have_a_reason(name: str) -> None:
    content, reason = BAD[name]
    found = broken_reason(content)
    assert found is not None
    assert any(part in found for part in reason.split("|"))


def test_ingest_leaves_out_broken_images_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "crops"
    source.mkdir()
    for name, content in GOOD.items():
        (source / f"good {name}.png").write_bytes(content)
    for name, (content, _) in BAD.items():
        (source / f"bad {name}.jpg").write_bytes(content)
    (source / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    manifest = ingest(source, tmp_path / "out", workers=2)
    split = open_dataset(tmp_path / "out").split("train")
    assert split.keys == sorted(f"good {name}.png" for name in GOOD)
    for row, key in enumerate(split.keys):
        assert split.image_bytes(row) == (source / key).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [
        *sorted(f"bad {name}.jpg" for name in BAD),
        "dangling.jpg",
    ]
    assert manifest.skipped == len(BAD) + 1
    assert all(line["reason"] for line in lines)


def test_nothing_but_broken_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops/a.jpg").write_bytes(b"")
    with pytest.raises(DmxError, match=r"(?s)none that can be read.*a\.jpg: empty"):
        ingest(tmp_path / "crops", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DmxError, match="only OUT may be a URI"):
        ingest("s3://bucket/set", tmp_path / "out")


def test_shards_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    source = tmp_path / "crops"
    source.mkdir()
    for seed in range(40):
        (source / f"{seed:03d}.jpg").write_bytes(encode(seed=seed))
    one = ingest(source, tmp_path / "one", workers=1, rows_per_shard=7)
    four = ingest(source, tmp_path / "four", workers=4, rows_per_shard=7)
    assert one == four


def test_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1/a.jpg", "1/b.jpg", "2/c.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encode())
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([str(tmp_path / "in"), str(tmp_path / "out"), "--rows-per-shard", "2"])
    assert command.run(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["split", "images", "labelled", "identities", "cameras", "shards"]
    assert lines[1].split() == ["train", "3", "3", "2", "0", "2"]
    assert lines[2] == "layout folder; 0 broken or misplaced left out"


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_are_at_least_one(workers: int, tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops/a.jpg").write_bytes(encode())
    with pytest.raises(DmxError, match=f"workers: wanted at least 1, found {workers}"):
        ingest(tmp_path / "crops", tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()


def test_map_ahead_keeps_order_reads_no_further_and_raises_in_place() -> None:
    taken: list[int] = []

    def items() -> Any:
        for item in range(100):
            taken.append(item)
            yield item

    with ThreadPoolExecutor(4) as pool:
        results = map_ahead(pool, lambda x: 10 // (x - 5), items(), 3)
        assert [next(results) for _ in range(5)] == [10 // (x - 5) for x in range(5)]
        assert len(taken) <= 5 + 4
        with pytest.raises(ZeroDivisionError):
            next(results)
