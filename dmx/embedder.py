"""A trained model ready for use: images in, embeddings out. `dmx.load` makes one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dmx.cores import cores
from dmx.data.images import BrokenImageError
from dmx.data.prefetch import map_ahead
from dmx.data.transforms import decode_resized, resize
from dmx.device import chosen_device
from dmx.embedding import AHEAD, check_features, unit_features
from dmx.errors import DmxError
from dmx.model import EmbeddingModel, Retrieval

Picture = str | Path | bytes | Image.Image | NDArray[np.uint8]


class ImageEmbedder:
    """Embeds images of people, however they are given.

    Attributes:
        model: the network, in evaluation mode, on `device`.
        size: (height, width) of its input, pixels.
        dimensions: width of its embeddings, D.
        device: where it computes.
        network: the same as a `torch.nn.Module`.
    """

    def __init__(self, model: EmbeddingModel, size: tuple[int, int], device: str) -> None:
        self.model = model.to(device).eval()
        self.size = size
        self.dimensions = model.width
        self.device = device

    @property
    def network(self) -> Retrieval:
        """The model as a module for other tools: images (N, 3, height, width) to embeddings (N, D).

        Images are RGB pixels in [0, 1], less ImageNet's mean and divided by its deviation. Weights have the
        names that they have in the `model.safetensors` of an export.
        """
        return Retrieval(self.model)

    @torch.inference_mode()
    def embed(
        self, images: Picture | Sequence[Picture], *, batch_size: int = 64, flip: bool = False
    ) -> NDArray[np.float32]:
        """Embeddings for retrieval: the product of two is the cosine of their angle, 1 for equal images.

        Args:
            images: one or many of: a path, the bytes of a file, a Pillow image, or an array (H, W, 3) uint8
                of RGB pixels (OpenCV's are BGR: `pixels[..., ::-1]`). Sizes may differ: each is resized to
                the model's input. Many at once also as one array (N, H, W, 3).
            batch_size: images in a forward pass.
            flip: take the mean direction of each image and its mirror image.

        Returns:
            (N, D) float32, rows of unit length.

        Raises:
            DmxError: an image cannot be read or decoded, or is of another shape or type; names it.
        """
        if batch_size < 1:
            raise DmxError(f"batch_size: wanted at least 1, found {batch_size}")
        many = _as_many(images)
        result = np.empty((len(many), self.dimensions), np.float32)
        starts = range(0, len(many), batch_size)

        def load(start: int) -> NDArray[np.uint8]:
            part = many[start : start + batch_size]
            return np.stack([self._pixels(image, start + place) for place, image in enumerate(part)])

        with ThreadPoolExecutor(cores(), thread_name_prefix="embed") as pool:
            for start, pixels in zip(starts, map_ahead(pool, load, starts, AHEAD), strict=True):
                features = unit_features(self.model, pixels, self.device, flip)
                rows = np.arange(start, start + len(pixels))
                check_features(features, rows, lambda row: _name(many[row]), "embed")
                result[start : start + len(pixels)] = features
        return result

    def _pixels(self, image: Picture, place: int) -> NDArray[np.uint8]:
        """(height, width, 3) of one image."""
        where = f"image {place} ({_name(image)})"
        if isinstance(image, Image.Image):
            return resize(np.asarray(image.convert("RGB")), *self.size)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise DmxError(
                    f"{where}: wanted an array (height, width, 3) of uint8, RGB, found {image.shape} of "
                    f"{image.dtype}"
                )
            return resize(image, *self.size)
        if not isinstance(image, str | Path | bytes):
            raise DmxError(
                f"{where}: wanted a path, bytes, a Pillow image or an array, found {type(image).__name__}"
            )
        try:
            encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
            return decode_resized(encoded, *self.size)
        except OSError as error:
            raise DmxError(f"{where}: cannot be read: {error.strerror or error}") from error
        except BrokenImageError as error:
            raise DmxError(f"{where}: {error}") from error


def _as_many(images: Picture | Sequence[Picture]) -> list[Picture]:
    is_one = isinstance(images, str | Path | bytes | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim == 3
    )
    return [cast(Picture, images)] if is_one else list(cast(Sequence[Picture], images))


def _name(image: object) -> str:
    """What an error calls an image."""
    return str(image) if isinstance(image, str | Path) else type(image).__name__


def load_embedder(path: str | Path, *, device: str = "auto", best: bool = False) -> ImageEmbedder:
    """See `dmx.load`."""
    from dmx.train.checkpoint import BEST, LATEST, load_model

    model, config = load_model(path, BEST if best else LATEST)
    return ImageEmbedder(
        model, (config.data.height, config.data.width), chosen_device(device, "dmx.load: device")
    )
