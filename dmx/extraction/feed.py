"""Decoded batches for the processes of a training run: by Ray Data across hosts, by threads elsewhere.

In a Ray cluster of several hosts, all its CPUs decode, those of hosts that do not train as well, and each
process takes the next batches that are ready. On one host a process takes an equal share and decodes it in
threads: the cores are the same, and processes that decode into Ray's object store would only take memory. A
batch holds the same images either way and with any number of processes: features are the same to the bit.

A feed is made once for a split and used in every epoch: what starts it, workers and their imports, takes
seconds. Its methods are collective.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmx.data.images import BrokenImageError, undecodable
from dmx.data.shards import Split
from dmx.distributed import World, meet, share
from dmx.extraction.patience import patiently
from dmx.extraction.pipeline import BATCHES_PER_ACTOR, BATCHES_PER_CORE, chunked, configure, told
from dmx.extraction.plan import Part
from dmx.extraction.stages import Decode, Source
from dmx.ray_cluster import host_resources
from dmx.waiting import who

Batch = tuple[NDArray[np.int64], NDArray[np.uint8]]


def ray_cpus() -> list[int]:
    """CPUs of each host that has some in this process's Ray cluster; none without one. Does not load Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return []
    found = (int(resources.get("CPU", 0)) for resources in host_resources().values())
    return [cpus for cpus in found if cpus]


class RayFeed:
    """A split's batches from Ray Data, each to one of the processes."""

    def __init__(self, world: World, split: Split, height: int, width: int, batch_size: int) -> None:
        """Put the pipeline up; it starts with the first batches.

        Args:
            world: this process among the others, all of which run in Ray.
            split: where the images are.
            height: of the model's input, pixels.
            width: of the model's input, pixels.
            batch_size: images of a batch.
        """
        self.split, self._world, self._shape = split, world, (-1, height, width, 3)
        # The first process keeps the streams of all: with them what feeds them would end.
        self._streams: Any = None
        if world.leads:
            dataset = self._pipeline(height, width, batch_size)
            # Alone, it needs nobody to deal batches out.
            self._streams = [dataset] if world.size == 1 else dataset.streaming_split(world.size, equal=False)
        self._stream: Any = self._streams[0] if world.leads else None
        if world.size > 1:
            self._stream = self._share_streams()[world.rank]

    def _share_streams(self) -> Any:
        """The streams of all processes, pickled as only Ray can.

        They go by the store of Ray's head, which asks for the cluster's token; the processes' own group does
        not.
        """
        from ray import cloudpickle
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

        key = share(self._world, f"dmx-streams-{uuid.uuid4().hex}")
        if self._world.leads:
            _internal_kv_put(key, cloudpickle.dumps(self._streams))
        meet(self._world, "the start of a feed")
        streams = cloudpickle.loads(_internal_kv_get(key))
        meet(self._world, "the streams of a feed")
        if self._world.leads:
            _internal_kv_del(key)
        return streams

    def _pipeline(self, height: int, width: int, batch_size: int) -> Any:
        """A dataset of decoded batches; nothing runs yet."""
        import ray.data

        # The processes of a run usually claim every core, and wait while images are decoded: then decoding
        # claims nothing and gives way to them.
        free = int(ray.available_resources().get("CPU", 0))
        decoders = free or max(1, int(ray.cluster_resources().get("CPU", 1)))
        configure(
            batch_size * height * width * 3,
            BATCHES_PER_ACTOR * self._world.size + BATCHES_PER_CORE * decoders,
            self._world.timeout_s,
            in_order=False,
        )
        source = Source(uuid.uuid4().hex, partial(ray.get, ray.put(self.split)))
        return ray.data.from_blocks(chunked([Part(0, 0, len(self.split))], batch_size, decoders)).map_batches(
            Decode(source, height, width, batch_size, is_nice=not free),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1 if free else 0,
            compute=ray.data.TaskPoolStrategy(size=decoders),
        )

    def batches(self, label: str) -> Iterator[Batch]:
        """Rows (b,) and pixels (b, H, W, 3) uint8 of batches that no other process gets.

        Args:
            label: what the images are for.

        Raises:
            DmxError: an image cannot be decoded (names it), or nothing comes for the run's `timeout_s`.
        """

        from ray.exceptions import RayError

        def tables() -> Iterator[Any]:
            try:
                yield from self._stream.iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=2
                )
            except RayError as error:
                raise told(error) from error

        in_vain = f"images of split {self.split.name} to be decoded ({label}), in vain, as {who()}"
        for table in patiently(tables, self._world.timeout_s, f"{in_vain}; look at the hosts that decode"):
            for rows, pixels, skipped in zip(
                table["rows"], table["pixels"], table["skipped"].to_pylist(), strict=True
            ):
                for image in json.loads(skipped):
                    where = f"{label}: split {self.split.name}"
                    raise undecodable(where, image["key"], BrokenImageError(image["reason"]))
                # A copy: torch wants memory that it could write to.
                yield (
                    np.frombuffer(rows.as_buffer(), np.int64),
                    np.frombuffer(pixels.as_buffer(), np.uint8).reshape(self._shape).copy(),
                )
