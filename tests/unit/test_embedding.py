"""Embedding: in order, unit length, the model left as it was, and bad images and models named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dmx import embedding
from dmx.data.transforms import TestTransform
from dmx.embedding import embed, evaluating
from dmx.errors import DmxError


class PixelSplit:
    """A split in memory, of PPM images of one colour with a mark on the left."""

    def __init__(self, images: int) -> None:
        self.name = "train"
        self.identities = np.full(images, -1, np.int64)
        self.cameras = np.full(images, -1, np.int32)
        self.keys = [f"{row}.ppm" for row in range(images)]
        self.encoded = []
        for row in range(images):
            pixels = np.random.default_rng(row).integers(0, 256, (8, 4, 3), np.uint8)
            self.encoded.append(b"P6 4 8 255\n" + pixels.tobytes())

    def __len__(self) -> int:
        return len(self.keys)

    def image_bytes(self, row: int) -> bytes:
        return self.encoded[row]


class Model(nn.Module):
    """A linear map behind batch normalisation, which tells evaluation from training."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3 * 8 * 4, width)

    def embed(self, images: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        features: Tensor = self.linear(self.norm(images).flatten(1))
        return features


def run(model: nn.Module, split: PixelSplit, **options: object) -> np.ndarray:  # type: ignore[type-arg]
    arguments: dict[str, object] = {"height": 8, "width": 4, "batch_size": 4, "device": "cpu"} | options
    return embed(model, split, **arguments)  # type: ignore[arg-type]


def expected(model: Model, split: PixelSplit) -> np.ndarray:  # type: ignore[type-arg]
    images = torch.stack([TestTransform(8, 4)(encoded) for encoded in split.encoded])
    model.eval()
    with torch.inference_mode():
        features = nn.functional.normalize(model.embed(images), dim=1).numpy()
    model.train()
    return features


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
@pytest.mark.parametrize("num_workers", [0, 3, None])
def test_features_are_unit_rows_in_order(batch_size: int, num_workers: int | None) -> None:
    model, split = Model(), PixelSplit(11)
    found = run(model, split, batch_size=batch_size, num_workers=num_workers)
    assert found.dtype == np.float32
    # Matrix products of other sizes sum in another order.
    np.testing.assert_allclose(found, expected(model, split), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_as_many_threads_decode_as_this_process_may_use_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as many as the machine has."""
    asked = []

    def pool(workers: int, **options: str) -> ThreadPoolExecutor:
        asked.append(workers)
        return ThreadPoolExecutor(workers, **options)

    monkeypatch.setattr(embedding, "ThreadPoolExecutor", pool)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 8})
    run(Model(), PixelSplit(2))
    assert asked == [3]


def test_rows_choose_and_order() -> None:
    model, split = Model(), PixelSplit(9)
    np.testing.assert_allclose(
        run(model, split, rows=[7, 0, 7]), expected(model, split)[[7, 0, 7]], atol=1e-6
    )


def test_flip_is_the_mean_direction() -> None:
    model, split = Model(), PixelSplit(6)
    mirrored = PixelSplit(6)
    for row, encoded in enumerate(split.encoded):
        pixels = np.frombuffer(encoded[11:], np.uint8).reshape(8, 4, 3)[:, ::-1]
        mirrored.encoded[row] = encoded[:11] + pixels.tobytes()
    total = expected(model, split) + expected(model, mirrored)
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(run(model, split, flip=True), total, atol=1e-6)


def test_every_part_of_the_model_keeps_its_mode() -> None:
    model, split = Model(), PixelSplit(3)
    model.train()
    model.norm.eval()  # a frozen part
    run(model, split)
    assert model.training
    assert model.linear.training
    assert not model.norm.training

    def fail() -> None:
        with evaluating(model):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.training


def test_images_come_in_the_models_dtype() -> None:
    model, split = Model().to(torch.bfloat16), PixelSplit(5)
    found = run(model, split)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    # bfloat16 has 8 bits: relative errors of 2^-8 a product, averaged over 96 of them.
    np.testing.assert_allclose(found, expected(Model(), split), atol=0.05)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_named(num_workers: int) -> None:
    split = PixelSplit(9)
    split.encoded[6] = b"P6 4 8 255\n too short"
    with pytest.raises(DmxError, match=r"split train: image 6\.ppm: wanted an image that can be decoded"):
        run(Model(), split, num_workers=num_workers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_features_without_direction_name_the_image(value: float) -> None:
    class Bad(Model):
        def embed(self, images: Tensor) -> Tensor:
            features = super().embed(images).clone()
            features[2] = value
            return features

    with pytest.raises(DmxError, match=r"image 2\.ppm \(row 2\): wanted finite features"):
        run(Bad(), PixelSplit(3))


def test_nothing_to_embed_is_said() -> None:
    with pytest.raises(DmxError, match="none in split train"):
        run(Model(), PixelSplit(3), rows=[])
    with pytest.raises(DmxError, match="batch size"):
        run(Model(), PixelSplit(3), batch_size=0)
