"""The model of a search, and what embeddings depend on, which both sides have to share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.cores import cores
from dmx.data.images import BrokenImageError
from dmx.data.prefetch import map_ahead
from dmx.data.shards import Split
from dmx.embedding import AHEAD, check_features, decode_rows, embed, unit_features
from dmx.errors import DmxError
from dmx.extraction.plan import weights_sha256
from dmx.model import EmbeddingModel
from dmx.progress import progress_bar


@dataclass(frozen=True)
class ModelRecord:
    """What embeddings depend on. The names are those of `dmx embed`'s settings.

    Attributes:
        model: where the model was found, which is not compared.
        weights_sha256: of all its tensors.
        width: of its embeddings, D.
        image_height, image_width: of its input, pixels.
        flip: whether the mean with the mirror image is taken.
    """

    model: str
    weights_sha256: str
    width: int
    image_height: int
    image_width: int
    flip: bool

    def require(self, found: Mapping[str, Any], where: str, remedy: str) -> None:
        """Check that other embeddings were made in the same way.

        Args:
            found: theirs, by the same names.
            where: they are.
            remedy: what to do if not, as the end of a sentence.

        Raises:
            DmxError: naming what differs.
        """
        if (weights := found.get("weights_sha256")) != self.weights_sha256:
            raise DmxError(
                f"{where}: wanted embeddings by the model {self.model} (weights {self.weights_sha256[:12]}), "
                f"found some by {found.get('model')} (weights {str(weights)[:12]}); give that with --model, "
                f"or {remedy}"
            )
        remedies = {
            "image_height": f"give --height {found.get('image_height')}",
            "image_width": f"give --width {found.get('image_width')}",
            "flip": "give --flip" if found.get("flip") else "leave --flip out",
            "width": "give the model that made them",
        }
        for name, do in remedies.items():
            if (other := found.get(name)) != getattr(self, name):
                raise DmxError(
                    f"{where}: wanted embeddings with {name} {getattr(self, name)}, as this command makes "
                    f"them, found {name} {other}; {do}, or {remedy}"
                )


@dataclass(frozen=True)
class Encoded:
    """A batch of a split: rows (b,) int64, features (b, D) float32 of unit length, and what is broken."""

    rows: NDArray[np.int64]
    features: NDArray[np.float32]
    broken: list[tuple[int, BrokenImageError]]


class Encoder:
    """Embeds both sides of a search in the same way.

    Args:
        path: where the model was found.
        model: in evaluation mode, on `device`.
        height: of its input, pixels.
        width: of its input, pixels.
        batch_size: images in a forward pass.
        device: where the model is.
        flip: take the mean direction of each image and its mirror image.
    """

    def __init__(
        self,
        path: str,
        model: EmbeddingModel,
        *,
        height: int,
        width: int,
        batch_size: int,
        device: str,
        flip: bool,
    ) -> None:
        self._model, self._batch_size, self._device = model, batch_size, device
        self.record = ModelRecord(path, weights_sha256(model), model.width, height, width, flip)

    def embed_all(self, split: Split, label: str) -> NDArray[np.float32]:
        """Unit features (N, D) of all images.

        Raises:
            DmxError: an image cannot be decoded; names it.
        """
        return embed(
            self._model,
            split,
            height=self.record.image_height,
            width=self.record.image_width,
            batch_size=self._batch_size,
            device=self._device,
            label=label,
            flip=self.record.flip,
        )

    def embed_parts(self, split: Split, label: str) -> Iterator[Encoded]:
        """Batch by batch, without what cannot be decoded; a few batches are in memory at a time.

        Raises:
            DmxError: features are not finite or zero; names the image.
        """
        size = self.record.image_height, self.record.image_width
        starts = range(0, len(split), self._batch_size)
        keys = split.keys

        def load(start: int) -> tuple[Any, ...]:
            rows = np.arange(start, min(start + self._batch_size, len(split)))
            return decode_rows(split, rows, *size)

        with (
            ThreadPoolExecutor(cores(), thread_name_prefix="search") as pool,
            progress_bar(len(split), label, "images") as bar,
        ):
            for pixels, rows, broken in map_ahead(pool, load, starts, AHEAD):
                features = np.empty((0, self.record.width), np.float32)
                if len(rows):
                    # Not around the yield: who takes the batch would be in this mode, too.
                    with torch.inference_mode():
                        features = unit_features(self._model, pixels, self._device, self.record.flip)
                check_features(features, rows, keys.__getitem__, f"{label}: split {split.name}")
                bar.update(len(rows) + len(broken))
                yield Encoded(rows, features, broken)
