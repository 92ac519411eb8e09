"""What is fuzzed: readers of files that come from outside, each with files that it should be able to read.

A reader may say what is wrong with a DmxError, or list it; anything else that it raises, takes or does is a
fault. `benchmarks/fuzz.py` feeds them for as long as you like, tests/unit/test_fuzz_targets.py for a moment.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import torch
from PIL import Image
from safetensors.numpy import save

from dmx.config import from_tree, recipe
from dmx.data.dataset import open_dataset
from dmx.data.images import BrokenImageError, broken_reason, decode
from dmx.data.ingest import read_source
from dmx.data.layouts import LAYOUTS, Found, Options
from dmx.data.layouts.luperson import load_keys
from dmx.errors import DmxError
from dmx.features import Features
from dmx.model.weights import read_weights
from dmx.search.stored import StoredIndex

MOST_WORDS = 5000


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: of the target.
        seeds: files that it reads without complaint.
        read: feed it a file's content; whatever leaves it is a fault.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], None]


class Targets:
    """All targets, in a folder for their files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        tiny.write_set(folder / "set", 1, {"train": 2})
        self._shard = next((folder / "set").glob("*.arrow"))
        self._shard_bytes = self._shard.read_bytes()
        self._manifest = (folder / "set" / "manifest.json").read_bytes()
        (folder / "index").mkdir()

    def all(self) -> dict[str, Target]:
        """Target by name."""
        made = [
            Target("images", _images(), self.image),
            Target("shards", [self._shard_bytes], self.shard),
            Target("manifests", [self._manifest], self.manifest),
            Target("features", _features(), self.features),
            Target("recipes", _recipes(), self.recipe),
            Target("zips", [_zip()], self.zip),
            Target("tars", [_tar("w"), _tar("w:gz")], self.tar),
            Target("keys", [pickle.dumps(["a_1", "b_2"], p) for p in (0, 2, 5)], self.keys),
            Target("weights", _weights(), self.weights),
            Target("indices", [_index()], self.index),
        ]
        return {target.name: target for target in made}

    def _file(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(content)
        return path

    def image(self, content: bytes) -> None:
        """What is said to be whole is decoded."""
        reason = broken_reason(content)
        try:
            pixels = decode(content)
        except BrokenImageError:
            return
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert reason is None or isinstance(reason, str)

    def shard(self, content: bytes) -> None:
        """Of the size that the manifest tells, which is looked at first."""
        size = len(self._shard_bytes)
        self._shard.write_bytes(content[:size].ljust(size, b"\0"))
        (self._folder / "set" / "manifest.json").write_bytes(self._manifest)
        with _refusals():
            self._read_set()

    def manifest(self, content: bytes) -> None:
        self._shard.write_bytes(self._shard_bytes)
        (self._folder / "set" / "manifest.json").write_bytes(content)
        with _refusals():
            self._read_set()

    def _read_set(self) -> None:
        dataset = open_dataset(self._folder / "set")
        for split in dataset.splits.values():
            if len(split) > 1000:  # claimed by a manifest; it is noticed when the shard is opened
                _ = split.keys
            for row in range(min(len(split), 20)):
                split.image_bytes(row)

    def features(self, content: bytes) -> None:
        with _refusals():
            for _, block in Features(self._file("features.parquet", content)).blocks(64):
                assert np.isfinite(block).all()

    def recipe(self, content: bytes) -> None:
        with _refusals():
            from_tree(recipe(str(self._file("recipe.yaml", content))))

    def zip(self, content: bytes) -> None:
        self._read_layout("crops", self._file("crops.zip", content))

    def tar(self, content: bytes) -> None:
        self._read_layout("webdataset", self._file("train.tar.gz", content))

    def _read_layout(self, layout: str, path: Path) -> None:
        with _refusals():
            for item in read_source(LAYOUTS[layout], path, Options()):
                item.key.encode()
                if isinstance(item, Found):
                    with suppress(OSError):
                        item.image.read()

    def keys(self, content: bytes) -> None:
        with _refusals():
            assert all(isinstance(key, str) for key in load_keys(self._file("keys.pkl", content)))

    def weights(self, content: bytes) -> None:
        suffix = ".safetensors" if b"torch" not in content[:400] and content[:2] != b"PK" else ".pth"
        with _refusals():
            read_weights(self._file(f"weights{suffix}", content))

    def index(self, content: bytes) -> None:
        self._file("index/index.json", content)
        with _refusals():
            StoredIndex(self._folder / "index")


@contextmanager
def _refusals() -> Iterator[None]:
    """Lets a DmxError pass for an answer, if it is one that a person would read."""
    told = ""
    try:
        yield
    except DmxError as error:
        told = str(error)
    assert len(told) < MOST_WORDS


def _images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 8, 3), dtype=np.uint8)
    found = []
    for form in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form, progressive=True)
        found.append(buffer.getvalue())
    return found


def _features() -> list[bytes]:
    values = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 4)
    found = []
    for column in (fixed, pa.array(values.tolist())):
        for compression in ("none", "zstd"):
            buffer = io.BytesIO()
            pq.write_table(pa.table({"row": range(12), "embedding": column}), buffer, row_group_size=5,
                           compression=compression)  # fmt: skip
            found.append(buffer.getvalue())
    return found


def _recipes() -> list[bytes]:
    import importlib.resources

    folder = importlib.resources.files("dmx.recipes")
    return [item.read_bytes() for item in folder.iterdir() if item.name.endswith(".yaml")]


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", _images()[0])
        archive.writestr("b.png", _images()[2], zipfile.ZIP_STORED)
    return buffer.getvalue()


def _tar(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]  # a mode by name
        for name, content in (("a.jpg", _images()[0]), ("a.json", b'{"identity": 3}'), ("b.jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _weights() -> list[bytes]:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"f.weight": torch.ones(2, 3)}, "epoch": 3}, buffer)
    return [save({"f.weight": np.ones((2, 3), np.float32)}), buffer.getvalue()]


def _index() -> bytes:
    model = {
        "model": "m",
        "weights_sha256": "0",
        "width": 4,
        "image_height": 8,
        "image_width": 4,
        "flip": False,
    }
    sizes = {"rows": 0, "bytes": {}, "lists": None, "origin": None}
    return json.dumps({"format": 1, "model": model, "gallery": "g", "fingerprint": "f", **sizes}).encode()


def make(folder: Path | None = None) -> dict[str, Target]:
    """The targets, in a folder of their own."""
    return Targets(folder or Path(tempfile.mkdtemp(prefix="dmx-fuzz-"))).all()
