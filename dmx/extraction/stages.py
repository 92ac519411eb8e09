"""What runs on the machines of the cluster: decoding, which takes CPUs, and the forward pass.

A row of the tables that pass between the stages is a whole batch, so that no stage can cut it: what is in a
batch depends on the split and the batch size alone, and so do the bits of the features.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dmx.data.shards import Split
from dmx.errors import DmxError
from dmx.extraction.plan import key_of

if TYPE_CHECKING:
    from torch import nn

CHUNKS = pa.schema([("part", pa.int64()), ("begin", pa.int64()), ("end", pa.int64())])
DECODED = pa.schema(
    [
        ("part", pa.int64()),
        ("begin", pa.int64()),  # first row of the batch in the split
        ("rows", pa.large_binary()),  # int64: rows that were decoded
        ("pixels", pa.large_binary()),  # uint8: (rows, height, width, 3)
        ("skipped", pa.string()),  # JSON: row, key and reason of the others
    ]
)
FEATURES = pa.schema(
    [DECODED.field("part"), DECODED.field("begin"), DECODED.field("rows"), ("features", pa.large_binary()),
     DECODED.field("skipped")]
)  # fmt: skip

# Decoding gives way to a forward pass on the same cores.
NICE = 10
_gave_way = threading.Event()

# Splits opened in this process, by source: a worker does many chunks, and opening files takes time.
_opened: dict[str, Split] = {}


@dataclass(frozen=True)
class Source:
    """A split as it travels: opened once in every process.

    Attributes:
        name: of the source, different for every split.
        load: fetches or opens it.
    """

    name: str
    load: Callable[[], Split]

    def split(self) -> Split:
        """The split, opened."""
        if self.name not in _opened:
            _opened[self.name] = self.load()
        return _opened[self.name]


@dataclass(frozen=True)
class Decode:
    """Chunks of rows to batches of pixels.

    Attributes:
        source: where the images are.
        height: of the model's input, pixels.
        width: of the model's input, pixels.
        batch_size: images of a batch; a chunk's last one may have fewer.
        is_nice: let other processes of the machine go first.
    """

    source: Source
    height: int
    width: int
    batch_size: int
    is_nice: bool

    def __call__(self, chunks: Any) -> Iterator[Any]:
        """Read, decode and resize; yields a table of one batch at a time."""
        if self.is_nice:
            _give_way()  # before the imports, which take seconds
        import torch

        from dmx.embedding import decode_rows

        torch.set_num_threads(1)
        split = self.source.split()
        for chunk in chunks.to_pylist():
            for begin in range(chunk["begin"], chunk["end"], self.batch_size):
                wanted = np.arange(begin, min(begin + self.batch_size, chunk["end"]))
                pixels, rows, broken = decode_rows(split, wanted, self.height, self.width)
                skipped = [
                    {"row": row, "key": key_of(split, row), "reason": str(error)} for row, error in broken
                ]
                yield _table(
                    DECODED, chunk["part"], begin, _binary(rows), _binary(pixels), json.dumps(skipped)
                )


def _give_way() -> None:
    """Lower this process's priority, once."""
    if not _gave_way.is_set():
        _gave_way.set()
        os.nice(NICE)


@dataclass(frozen=True)
class Player:
    """How an actor computes.

    Attributes:
        device: `cpu` or `cuda`.
        threads: of one forward pass on the CPU.
        precision: `fp32` or `bf16`.
        compile: whether torch.compile compiles the model first, for batches of `batch_size`.
        flip: also embed each image mirrored and take the mean direction.
        height: of the model's input, pixels.
        width: of the model's input, pixels.
        batch_size: images of a forward pass, at most.
    """

    device: str
    threads: int
    precision: str
    compile: bool
    flip: bool
    height: int
    width: int
    batch_size: int


class Forward:
    """Batches of pixels to batches of features. Holds the model."""

    def __init__(self, load: Callable[[], nn.Module], player: Player, source: Source) -> None:
        """Load the model.

        Args:
            load: fetches it.
            player: how to compute.
            source: where the images are, to name those that go wrong.
        """
        import torch

        torch.set_num_threads(player.threads)
        self._player, self._source = player, source
        self.model = prepared(load(), player)

    def __call__(self, batches: Any) -> Iterator[Any]:
        """Embed; yields a table of one batch at a time."""
        from dmx.embedding import check_features

        shape = (-1, self._player.height, self._player.width, 3)
        for batch in range(batches.num_rows):
            part, begin, rows, pixels, skipped = (batches[name][batch] for name in DECODED.names)
            numbers = np.frombuffer(rows.as_buffer(), np.int64)
            features = np.empty((0, 0), np.float32)
            if len(numbers):
                images = np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape)
                features = self._embed(images)
                check_features(features, numbers, self._key_of, "embed")
            yield _table(FEATURES, part, begin, rows, _binary(features), skipped)

    def _embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(b, D) float32 of (b, H, W, 3) uint8 images."""
        import torch

        from dmx.embedding import unit_features

        count, player = len(images), self._player
        # Another number of images would be compiled anew; and torch wants memory that it could write to.
        batch = np.zeros((player.batch_size if player.compile else count, *images.shape[1:]), np.uint8)
        batch[:count] = images
        with torch.inference_mode():
            return unit_features(self.model, batch, player.device, player.flip)[:count]

    def _key_of(self, row: int) -> str:
        return key_of(self._source.split(), row)


def prepared(model: nn.Module, player: Player) -> nn.Module:
    """The model as it computes fastest: on its device, channels-last, in its precision, compiled if asked.

    Raises:
        DmxError: the device does not compute in bfloat16.
    """
    import torch

    from dmx.train.engines import computes_in_bf16

    model = model.eval().requires_grad_(False)
    if player.precision == "bf16":
        if player.device == "cuda" and not computes_in_bf16("cuda"):
            raise DmxError(
                f"--precision bf16: wanted a GPU that computes in bfloat16, found "
                f"{torch.cuda.get_device_name()} on {os.uname().nodename}; use --precision fp32"
            )
        model = model.to(torch.bfloat16)
    model = model.to(player.device).to(memory_format=torch.channels_last)
    if player.compile:
        embedder: Any = model
        embedder.embed = torch.compile(embedder.embed)
    return model


def _binary(values: np.ndarray[Any, Any]) -> Any:
    """An array as one binary value, without a copy."""
    data = pa.py_buffer(np.ascontiguousarray(values))
    ends = pa.array([0, data.size], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])


def _table(schema: Any, *values: Any) -> Any:
    columns = [
        value if isinstance(value, pa.Array) else pa.array([value], field.type)
        for value, field in zip(values, schema, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=schema)
