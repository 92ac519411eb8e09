"""Features of a split within training: made by all processes with the model that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from dmx.cluster.sharded import Group
from dmx.data.prefetch import map_ahead
from dmx.data.shards import Split
from dmx.distributed import World, collect, own_cores, share
from dmx.embedding import AHEAD, check_features, decode_all, evaluating, unit_features
from dmx.extraction.feed import Batch, RayFeed, ray_cpus
from dmx.progress import progress_bar
from dmx.waiting import waiting


class Feed(Protocol):
    """Where the decoded batches of a split come from."""

    split: Split

    def batches(self, label: str) -> Iterator[Batch]: ...


class LocalFeed:
    """A split's batches, an equal share for each process, which decodes it in threads of its own."""

    def __init__(
        self, world: World, split: Split, height: int, width: int, batch_size: int, cpus: int | None = None
    ) -> None:
        """Share the batches out; arguments as of `make_feed`, and:

        Args:
            cpus: cores that the processes of this host may take together, if fewer than there are.
        """
        own = own_cores(world)
        self.threads = own if cpus is None else max(1, min(own, cpus // world.local_size))
        self.split, self._size = split, (height, width)
        starts = range(0, len(split), batch_size)
        bounds = [len(starts) * rank // world.size for rank in (world.rank, world.rank + 1)]
        self._rows = [
            np.arange(start, min(start + batch_size, len(split))) for start in starts[slice(*bounds)]
        ]

    def batches(self, label: str) -> Iterator[Batch]:
        """Rows (b,) and pixels (b, H, W, 3) uint8 of this process's batches.

        Raises:
            DmxError: an image cannot be decoded; names it.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="extract")
        try:
            pixels = map_ahead(
                pool, lambda rows: decode_all(self.split, rows, *self._size, label), self._rows, AHEAD
            )
            yield from zip(self._rows, pixels, strict=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def make_feed(world: World, split: Split, height: int, width: int, batch_size: int) -> Feed:
    """A feed of a split: of Ray Data where the run is part of a Ray cluster of several hosts. Collective.

    Args:
        world: this process among the others.
        split: where the images are.
        height: of the model's input, pixels.
        width: of the model's input, pixels.
        batch_size: images of a batch.
    """
    cpus = share(world, ray_cpus())
    if len(cpus) > 1:
        return RayFeed(world, split, height, width, batch_size)
    return LocalFeed(world, split, height, width, batch_size, *cpus)


def extract(feed: Feed, model: nn.Module, width: int, world: World, label: str) -> NDArray[np.float32]:
    """Unit features of a split, brought together. Collective.

    Args:
        feed: of the split.
        model: on this process's device, with a method `embed`.
        width: of the features, D.
        world: this process among the others.
        label: of the progress report.

    Returns:
        (N, D) float32 on the first process, (0, D) on the others.

    Raises:
        DmxError: an image cannot be decoded, or its features are not finite; names it.
    """
    rows, features = _embedded_here(feed, model, width, world, label)
    return _in_order(world, rows, features, len(feed.split))


def extract_shards(feed: Feed, model: nn.Module, width: int, world: World, label: str) -> NDArray[np.float32]:
    """Unit features of a split, each process's share of the rows. Collective; arguments as of `extract`.

    Returns:
        (own rows, D) float32, the rows that `shards_of` gives this process.
    """
    rows, features = _embedded_here(feed, model, width, world, label)
    group = shards_of(world, len(feed.split))
    order = np.argsort(rows)
    owner = np.searchsorted(group.bounds, rows[order], side="right") - 1
    counts = torch.from_numpy(np.bincount(owner, minlength=world.size))
    parts = [torch.from_numpy(part[order]) for part in (rows, features)]
    numbers, values = group.deal(parts, counts, f"{label}: features that other processes made")
    places = numbers - group.first
    if not torch.equal(places.sort().values, torch.arange(group.own)):
        raise RuntimeError(
            f"{label}: wanted features of {group.own} images, found {len(set(places.tolist()))}"
        )
    result = torch.empty((group.own, width))
    result[places] = values
    return result.numpy()


def shards_of(world: World, rows: int) -> Group:
    """The processes as workers that hold an equal share of the rows each, in order of rank."""
    bounds = (rows * rank // world.size for rank in range(world.size + 1))
    return Group(None, world.rank, world.size, tuple(bounds))


def _embedded_here(
    feed: Feed, model: nn.Module, width: int, world: World, label: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Row numbers (n,) of the images that this process embedded, and their features (n, D)."""
    split, rows, features = feed.split, [np.empty(0, np.int64)], [np.empty((0, width), np.float32)]
    # How many fall to this process among others shows only in the end.
    total = len(split) if world.size == 1 else None
    with evaluating(model), torch.inference_mode(), progress_bar(total, label, "images") as bar:
        for numbers, pixels in feed.batches(label):
            found = unit_features(model, pixels, world.device)
            check_features(found, numbers, split.keys.__getitem__, f"{label}: split {split.name}")
            rows.append(numbers)
            features.append(found)
            bar.update(len(numbers))
    return np.concatenate(rows), np.concatenate(features)


def _in_order(
    world: World, rows: NDArray[np.int64], features: NDArray[np.float32], images: int
) -> NDArray[np.float32]:
    """Everybody's features where their images stand in the split, on the first process."""
    embedded = torch.zeros(world.size, dtype=torch.int64)
    embedded[world.rank] = len(rows)
    if world.size > 1:
        with waiting("how many images each process embedded"):
            dist.all_reduce(embedded, group=world.control)
    counts = embedded.tolist()
    all_rows = collect(world, torch.from_numpy(rows), counts).numpy()
    all_features = collect(world, torch.from_numpy(features), counts).numpy()
    if not world.leads:
        return all_features
    if len(all_rows) != images or not np.array_equal(np.sort(all_rows), np.arange(images)):
        raise RuntimeError(f"wanted features of {images} images, found {len(np.unique(all_rows))} of them")
    result = np.empty_like(all_features)
    result[all_rows] = all_features
    return result
