"""Images in, unit features out: the first step of every epoch and of every evaluation, on one machine.

`dmx.extraction` does the same on many machines, with `decode_rows` on one and `unit_features` on another.
"""

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
from dmx.data.transforms import decode_resized, normalise_batch
from dmx.errors import DmxError
from dmx.names import printable
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
    if height < 1 or width < 1:
        raise DmxError(f"image size: wanted at least 1 x 1 pixels, found {height} x {width}")
    starts = range(0, chosen.size, batch_size)

    def load(start: int) -> NDArray[np.uint8]:
        return decode_all(split, chosen[start : start + batch_size], height, width, label)

    workers = cores() if num_workers is None else num_workers
    pool = ThreadPoolExecutor(workers, thread_name_prefix="embed") if workers else None
    result: NDArray[np.float32] | None = None
    try:
        with evaluating(model), torch.inference_mode(), progress_bar(chosen.size, label, "images") as bar:
            for start, images in zip(starts, map_ahead(pool, load, starts, AHEAD), strict=True):
                features = unit_features(model, images, device, flip)
                if result is None:
                    result = np.empty((chosen.size, features.shape[1]), np.float32)
                rows_here = chosen[start : start + batch_size]
                check_features(features, rows_here, split.keys.__getitem__, f"{label}: split {split.name}")
                result[start : start + batch_size] = features
                bar.update(len(images))
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
    if result is None:
        raise RuntimeError("no batch was embedded")
    return result


def decode_rows(
    split: Split, rows: NDArray[np.int64], height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[tuple[int, BrokenImageError]]]:
    """Decode and resize images of a split.

    Args:
        split: where the images are.
        rows: (B,) which ones.
        height: of the result, pixels.
        width: of the result, pixels.

    Returns:
        pixels (b, height, width, 3) uint8 of those that can be decoded, their rows (b,) in order, and the
        others with what is wrong with them.
    """
    pixels = np.empty((len(rows), height, width, 3), np.uint8)
    good: list[int] = []
    broken: list[tuple[int, BrokenImageError]] = []
    for row in rows.tolist():
        try:
            pixels[len(good)] = decode_resized(split.image_bytes(row), height, width)
            good.append(row)
        except BrokenImageError as error:
            broken.append((row, error))
    return pixels[: len(good)], np.array(good, np.int64), broken


def decode_all(
    split: Split, rows: NDArray[np.int64], height: int, width: int, label: str
) -> NDArray[np.uint8]:
    """`decode_rows` where nothing may be broken: the pixels alone.

    Raises:
        DmxError: an image cannot be decoded; names the first.
    """
    pixels, _, broken = decode_rows(split, rows, height, width)
    for row, error in broken:
        raise undecodable(f"{label}: split {split.name}", split.keys[row], error) from error
    return pixels


def unit_features(
    model: nn.Module, pixels: NDArray[np.uint8], device: torch.device | str, flip: bool = False
) -> NDArray[np.float32]:
    """One forward pass of a model in evaluation mode.

    Args:
        model: on `device`, with a method `embed`; images come in the dtype of its parameters.
        pixels: (B, H, W, 3) uint8.
        device: where the model is.
        flip: take the mean direction of each image and its mirror image.

    Returns:
        (B, D) float32, rows of unit length.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # In the layout of channels_last, in which convolutions are quicker.
    images = normalise_batch(torch.from_numpy(pixels).to(device)).to(dtype)
    embedder = cast(Embedder, model)
    features = F.normalize(embedder.embed(images).float(), dim=1)
    if flip:
        features = F.normalize(features + F.normalize(embedder.embed(images.flip(3)).float(), dim=1), dim=1)
    return features.cpu().numpy()


def check_features(
    features: NDArray[np.float32], rows: NDArray[np.int64], key_of: Callable[[int], str], where: str
) -> None:
    """Features must be finite and have a direction.

    Args:
        features: (B, D), normalised.
        rows: (B,) of the images.
        key_of: the key of a row.
        where: what is embedded.

    Raises:
        DmxError: naming the first image of which they are not.
    """
    lengths = np.linalg.norm(features, axis=1)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0.5)))
    if bad.size:
        row = int(rows[bad[0]])
        raise DmxError(
            f"{where}: image {printable(key_of(row))} (row {row}): wanted finite features, found a "
            f"vector of length {lengths[bad[0]]} after normalising; the model has diverged: lower its "
            "learning rate or go back to an earlier checkpoint"
        )
