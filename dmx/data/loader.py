"""Training batches, decoded and augmented in threads ahead of the step that needs them.

Each image's randomness comes from (seed, epoch, step, place in the batch): a batch is the same made alone,
ahead, by any number of threads or on any rank, and a resumed run makes the batches it would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from dmx.data.images import BrokenImageError, undecodable
from dmx.data.prefetch import map_ahead
from dmx.data.sampler import BatchIndices, IdentityBatchSampler
from dmx.data.shards import Split
from dmx.errors import DmxError

# Key of the random stream; must differ from the sampler's, its value means nothing.
_AUGMENT = 3
Augment = Callable[[bytes, np.random.Generator], Tensor]


class TrainBatch(TypedDict):
    """One rank's part of a batch.

    images (B, 3, H, W) float32, normalised; label, domain, row, position (B,) int64 as in `BatchIndices`.
    """

    images: Tensor
    label: Tensor
    domain: Tensor
    row: Tensor
    position: Tensor


def load_images(
    splits: Sequence[Split],
    indices: BatchIndices,
    transform: Augment,
    key: tuple[int, int, int],
) -> Tensor:
    """Read, decode and augment the images of a batch.

    Args:
        splits: a split for every domain.
        indices: which rows.
        transform: bytes and generator to a (3, H, W) float32 tensor.
        key: seed, epoch and step.

    Returns:
        (B, 3, H, W) float32.

    Raises:
        DmxError: an image cannot be read or decoded; names it.
    """
    images = []
    for domain, row, position in zip(
        indices.domain.tolist(), indices.row.tolist(), indices.position.tolist(), strict=True
    ):
        split, rng = splits[domain], np.random.default_rng((_AUGMENT, *key, position))
        try:
            images.append(transform(split.image_bytes(row), rng))
        except BrokenImageError as error:
            raise undecodable(f"split {split.name} of domain {domain}", split.keys[row], error) from error
    return torch.stack(images)


class TrainLoader:
    """Makes the batches of a run; use as a context manager, or call `close`.

    Args:
        splits: a split for every domain of the sampler.
        sampler: decides what is in a batch.
        transform: bytes and generator to a (3, H, W) float32 tensor.
        seed: of the augmentation.
        num_workers: threads; 0 makes each batch in the caller's thread when it is asked for.
        prefetch: batches made ahead, at least 1.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        sampler: IdentityBatchSampler,
        transform: Augment,
        *,
        seed: int,
        num_workers: int = 2,
        prefetch: int = 4,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if num_workers < 0 or prefetch < 1:
            raise DmxError(
                f"loader: wanted num_workers of at least 0 and prefetch of at least 1, found {num_workers} "
                f"and {prefetch}"
            )
        self._splits, self._sampler, self._transform = list(splits), sampler, transform
        self._seed, self._rank, self._world = seed, rank, world
        self._prefetch = prefetch
        self._pool = (
            ThreadPoolExecutor(num_workers, thread_name_prefix="train-loader") if num_workers else None
        )

    def batch(self, epoch: int, step: int) -> TrainBatch:
        """The batch of one step, made here and now.

        Raises:
            DmxError: an image cannot be read or decoded; names it.
        """
        indices = self._sampler.batch(epoch, step, self._rank, self._world)
        return TrainBatch(
            images=load_images(self._splits, indices, self._transform, (self._seed, epoch, step)),
            label=torch.from_numpy(indices.label),
            domain=torch.from_numpy(indices.domain),
            row=torch.from_numpy(indices.row),
            position=torch.from_numpy(indices.position),
        )

    def batches(self, epoch: int, steps: int, start: int = 0) -> Iterator[TrainBatch]:
        """The batches of the steps `start` to `steps - 1` of an epoch, made ahead in order.

        Raises:
            DmxError: an image cannot be read or decoded; raised at the step that would have used it.
        """
        return map_ahead(
            self._pool, lambda step: self.batch(epoch, step), range(start, steps), self._prefetch
        )

    def close(self) -> None:
        """Stop the threads; what they have not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
