"""Transforms: against the slow and obvious way of writing each of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dmx.data.colours import with_other_colours
from dmx.data.images import BrokenImageError, decode
from dmx.data.transforms import (
    MEAN,
    STD,
    TestTransform,
    TrainTransform,
    decode_resized,
    erasing_box,
    normalise,
    normalise_batch,
    resize,
    shift,
)
from dmx.errors import DmxError


def pixels_of(height: int = 40, width: int = 18, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_normalise_is_the_formula() -> None:
    pixels = pixels_of()
    expected = (pixels.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    found = normalise(pixels)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    # Three float32 roundings of numbers below 3.
    np.testing.assert_allclose(found.numpy(), expected.transpose(2, 0, 1), atol=3 * 2**-23 * 3)


def test_a_batch_is_normalised_to_the_same_bits() -> None:
    pixels = np.stack([pixels_of(seed=seed) for seed in range(3)])
    found = normalise_batch(torch.from_numpy(pixels))
    assert torch.equal(found, torch.stack([normalise(image) for image in pixels]))
    assert found.is_contiguous(memory_format=torch.channels_last)


def photo(height: int = 61, width: int = 37) -> Image.Image:
    """Smooth, as what JPEG is made for; noise would hide how colours are interpolated."""
    return Image.fromarray(pixels_of(6, 4)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"optimize": True}])
def test_jpegs_have_the_pixels_that_pillow_gives(mode: str, options: dict[str, object]) -> None:
    buffer = io.BytesIO()
    photo().convert(mode).save(buffer, "JPEG", quality=80, **options)
    expected = np.asarray(Image.open(buffer).convert("RGB"))
    found = decode(buffer.getvalue())
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(decode_resized(buffer.getvalue(), 20, 10), resize(expected, 20, 10))


def test_faulty_jpegs_are_judged_by_pillow() -> None:
    """What it decodes all the same is decoded; what it refuses is refused with its reason."""
    buffer = io.BytesIO()
    photo().save(buffer, "JPEG")
    whole = buffer.getvalue()
    np.testing.assert_array_equal(decode(whole + b"after the end"), decode(whole))
    with_stray_bytes = whole[:-2] + bytes(5) + whole[-2:]
    expected = np.asarray(Image.open(io.BytesIO(with_stray_bytes)).convert("RGB"))
    np.testing.assert_array_equal(decode(with_stray_bytes), expected)
    with pytest.raises(BrokenImageError, match=r"not decodable: .*truncated"):
        decode(whole[: len(whole) * 3 // 4])
    with pytest.raises(BrokenImageError, match=r"not decodable|not an image"):
        decode(whole[:4] + b"nothing of the kind")


@pytest.mark.parametrize(("height", "width"), [(40, 18), (32, 16), (64, 48), (10, 60), (1, 1)])
def test_test_transform_is_bicubic_resize(height: int, width: int) -> None:
    """As Pillow's, but for the rounding: each of the two passes rounds, and Pillow chooses their order."""
    pixels = pixels_of() // 2 + 64  # nothing passes 0 or 255 between the passes
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    assert np.abs(resize(pixels, height, width).astype(int) - np.asarray(resized).astype(int)).max() <= 2
    found = TestTransform(height, width)(png(pixels))
    assert found.shape == (3, height, width)
    assert torch.equal(found, normalise(resize(pixels, height, width)))


def test_train_transform_without_randomness_is_the_test_transform() -> None:
    encoded = png(pixels_of())
    plain = TrainTransform(32, 16, flip=0, pad=0, erase=0)
    assert torch.equal(plain(encoded, np.random.default_rng(0)), TestTransform(32, 16)(encoded))
    flipped = TrainTransform(32, 16, flip=1, pad=0, erase=0)
    assert torch.equal(flipped(encoded, np.random.default_rng(0)), TestTransform(32, 16)(encoded).flip(2))


@pytest.mark.parametrize("down", [-10, -3, 0, 4, 10, 40])
@pytest.mark.parametrize("right", [-10, 0, 7, 10, -18])
def test_shift_is_pad_and_crop(down: int, right: int) -> None:
    pixels, pad = pixels_of(), 40
    padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
    expected = padded[pad - down : pad - down + 40, pad - right : pad - right + 18]
    np.testing.assert_array_equal(shift(pixels, down, right), expected)


def test_crop_offsets_cover_the_whole_range() -> None:
    transform = TrainTransform(20, 20, flip=0, pad=2, erase=0)
    dot = np.zeros((20, 20, 3), np.uint8)
    dot[10, 10] = 255
    rng = np.random.default_rng(0)
    places = {tuple(divmod(int(transform(png(dot), rng)[0].argmax()), 20)) for _ in range(400)}
    assert places == {(row, column) for row in range(8, 13) for column in range(8, 13)}


@pytest.mark.parametrize(("fill", "value"), [("normalised", (0.0, 0.0, 0.0)), ("raw", MEAN)])
def test_erasing_fills_one_rectangle(fill: str, value: tuple[float, ...]) -> None:
    encoded = png(pixels_of(64, 32))
    plain = TestTransform(64, 32)(encoded)
    transform = TrainTransform(64, 32, flip=0, pad=0, erase=1, erase_fill=fill)  # type: ignore[arg-type]
    rng = np.random.default_rng(3)
    for _ in range(50):
        found = transform(encoded, rng)
        changed = (found != plain).any(0)
        rows, columns = torch.nonzero(changed.any(1)).ravel(), torch.nonzero(changed.any(0)).ravel()
        inside = found[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert torch.equal(inside, torch.tensor(value).reshape(3, 1, 1).expand_as(inside))
        outside = plain.clone()
        outside[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = inside
        assert torch.equal(outside, found)


def test_erased_areas_and_aspects_are_within_the_published_bounds() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([erasing_box(256, 128, rng) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top + height).max() <= 256
    assert (left + width).max() <= 128
    area, aspect = height * width / (256 * 128), height / width
    # Rounding to pixels moves them a little.
    assert 0.018 < area.min() < 0.03
    assert 0.37 < area.max() < 0.41
    assert 0.28 < aspect.min() < 0.35
    assert 3.0 < aspect.max() < 3.6
    assert erasing_box(20, 10, rng, area_low=1.1, area_high=1.5) is None


def test_probabilities() -> None:
    encoded = png(pixels_of())
    plain = TestTransform(40, 18)(encoded)
    rng = np.random.default_rng(0)
    for transform in (TrainTransform(40, 18, pad=0, erase=0), TrainTransform(40, 18, pad=0, flip=0)):
        same = sum(torch.equal(transform(encoded, rng), plain) for _ in range(1000))
        assert 430 < same < 570  # 0.5 +- 4.4 standard deviations


def test_same_bytes_and_generator_give_the_same_tensor() -> None:
    encoded, transform = png(pixels_of(200, 80)), TrainTransform(64, 32)
    left = [transform(encoded, np.random.default_rng(seed)) for seed in range(20)]
    torch.manual_seed(1)
    right = [transform(encoded, np.random.default_rng(seed)) for seed in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert len({tuple(image.ravel().tolist()) for image in left}) > 15


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels_of()).convert("RGB" if mode != "LA" else "L").convert(mode).save(
        buffer, "TIFF" if mode == "CMYK" else "PNG"
    )
    assert TestTransform(32, 16)(buffer.getvalue()).shape == (3, 32, 16)


def test_what_cannot_be_used_is_said() -> None:
    with pytest.raises(BrokenImageError, match="zero bytes"):
        TestTransform(8, 8)(b"")
    with pytest.raises(BrokenImageError, match=r"truncated|not decodable"):
        TrainTransform(8, 8)(png(pixels_of())[:300], np.random.default_rng(0))
    with pytest.raises(DmxError, match="image size"):
        TestTransform(0, 8)
    with pytest.raises(DmxError, match="flip"):
        TrainTransform(8, 8, flip=1.5)
    with pytest.raises(DmxError, match="pad"):
        TrainTransform(8, 8, pad=-1)
    with pytest.raises(DmxError, match="erase_fill"):
        TrainTransform(8, 8, erase_fill="grey")  # type: ignore[arg-type]


def test_colours_change_within_their_bounds_and_by_the_generator_alone() -> None:
    """Each change by itself, with the largest that can be drawn, bounds what all four do in any order."""
    pixels = np.asarray(photo())
    rng = np.random.default_rng(0)
    several = [with_other_colours(pixels, rng) for _ in range(20)]
    assert all(image.shape == pixels.shape and image.dtype == np.uint8 for image in several)
    brightness = [image.mean() / pixels.mean() for image in several]
    # Brightness alone moves the mean by up to 15 %, and the others move little of it.
    assert 0.75 < min(brightness) < 0.95
    assert 1.05 < max(brightness) < 1.25
    again = with_other_colours(pixels, np.random.default_rng(0))
    np.testing.assert_array_equal(again, several[0])
    grey = np.full((8, 8, 3), 100, np.uint8)
    changed = with_other_colours(grey, np.random.default_rng(1))
    assert np.ptp(changed.astype(int), axis=2).max() <= 1  # what has no colour gets none
    assert np.abs(changed.astype(int) - 100).max() <= 16


def test_without_colour_jitter_the_same_numbers_are_drawn() -> None:
    encoded = png(pixels_of())
    images = []
    for share in (0.0, 1.0):
        rng = np.random.default_rng(3)
        images.append(TrainTransform(32, 16, erase=0, colour_jitter=share)(encoded, rng))
        images.append(torch.tensor(rng.random()))
    assert not torch.equal(images[0], images[2])
    rng = np.random.default_rng(3)
    plain = TrainTransform(32, 16, erase=0)(encoded, rng)
    assert torch.equal(plain, images[0])
    assert torch.equal(torch.tensor(rng.random()), images[1])
    with pytest.raises(DmxError, match="colour_jitter: wanted a probability"):
        TrainTransform(8, 8, colour_jitter=2)
