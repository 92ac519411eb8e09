"""Images in, unit features out: the first step of every epoch and of every evaluation, on one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dmx.cores import cores
from dmx.data.images import BrokenImageError, undecodable
from dmx.data.prefetch import map_ahead
from dmx.data.shards import Split
from dmx.data.transforms import TestTransform
from dmx.errors import DmxError
from dmx.progress import progress_bar

# Batches decoded before the forward pass asks for them.
AHEAD = 4


class Embedder(Protocol):
    """A model with `embed`: (B, 3, H, W) images to (B, D) features."""

    def embed(self, images: Tensor) -> Tensor: ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every part of it back as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def embed(
    model: nn.Module,
    split: Split,
    *,
    height: int,
    width: int,
    batch_size: int,
    device: torch.device | str,
    label: str = "embed",
    rows: NDArray[np.int64] | Sequence[int] | None = None,
    flip: bool = False,
    num_workers: int | None = None,
) -> NDArray[np.float32]:
    """Features of a split's images, in order.

    The model is in evaluation mode meanwhile and left as it was found.

    Args:
        model: on `device`, with a method `embed`: (B, 3, H, W) normalised images to (B, D) features. Images
            are given in the dtype of its parameters.
        split: where the images are.
        height: of the model's input, pixels.
        width: of the model's input, pixels.
        batch_size: images in a forward pass.
        device: where the model is.
        label: of the progress report.
        rows: which images, in this order; None takes all.
        flip: also embed each image mirrored and take the mean direction.
        num_workers: threads that decode; None takes one for each core this process may use, 0 decodes in this
            thread.

    Returns:
        (N, D) float32, rows of unit length.

    Raises:
        DmxError: an image cannot be decoded, or its features are not finite or zero; names it.
    """
    chosen = np.arange(len(split)) if rows is None else np.asarray(rows, dtype=np.int64)
    if batch_size < 1:
        raise DmxError(f"batch size: wanted at least 1, found {batch_size}")
    if chosen.size == 0:
        raise DmxError(f"{label}: wanted images to embed, found none in split {split.name}")
    transform = TestTransform(height, width)
    starts = range(0, chosen.size, batch_size)

    def load(start: int) -> Tensor:
        return torch.stack(
            [_image(split, int(row), transform, label) for row in chosen[start : start + batch_size]]
        )

    workers = cores() if num_workers is None else num_workers
    pool = ThreadPoolExecutor(workers, thread_name_prefix="embed") if workers else None
    result: NDArray[np.float32] | None = None
    try:
        with evaluating(model), torch.inference_mode(), progress_bar(chosen.size, label, "images") as bar:
            for start, images in zip(starts, map_ahead(pool, load, starts, AHEAD), strict=True):
                features = _forward(model, images, device, flip)
                if result is None:
                    result = np.empty((chosen.size, features.shape[1]), np.float32)
                _check(features, split, chosen[start : start + batch_size], label)
                result[start : start + batch_size] = features.numpy()
                bar.update(len(images))
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
    if result is None:
        raise RuntimeError("no batch was embedded")
    return result


def _image(split: Split, row: int, transform: Callable[[bytes], Tensor], label: str) -> Tensor:
    try:
        return transform(split.image_bytes(row))
    except BrokenImageError as error:
        raise undecodable(f"{label}: split {split.name}", split.keys[row], error) from error


def _forward(model: nn.Module, images: Tensor, device: torch.device | str, flip: bool) -> Tensor:
    """Unit features (B, D), float32 on the CPU."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    images = images.to(device=device, dtype=dtype)
    if images.device.type == "cpu":
        # Convolutions on the CPU are quicker in this layout.
        images = images.contiguous(memory_format=torch.channels_last)
    embedder = cast(Embedder, model)
    features = F.normalize(embedder.embed(images).float(), dim=1)
    if flip:
        features = F.normalize(features + F.normalize(embedder.embed(images.flip(3)).float(), dim=1), dim=1)
    return features.cpu()


def _check(features: Tensor, split: Split, rows: NDArray[np.int64], label: str) -> None:
    """Features must be finite and have a direction."""
    norms = features.norm(dim=1)
    bad = torch.nonzero(~(torch.isfinite(norms) & (norms > 0.5)))
    if len(bad):
        row = int(rows[int(bad[0])])
        found = features[int(bad[0])].norm().item()
        raise DmxError(
            f"{label}: split {split.name}: image {split.keys[row]} (row {row}): wanted finite features, "
            f"found a vector of length {found} after normalising; the model has diverged: lower its "
            "learning rate or go back to an earlier checkpoint"
        )
