"""From encoded bytes to normalised tensors: the published recipe, quick on a CPU.

Everything geometric happens on uint8 pixels, and pixels are normalised once at the end. Randomness comes
from the generator that is passed in and from nowhere else, so the same bytes and generator give the same
tensor.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dmx.data.images import decode
from dmx.errors import DmxError

# Of ImageNet, RGB, for pixels in [0, 1]: what the backbones were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_SCALE = (1.0 / (255.0 * np.array(STD))).astype(np.float32).reshape(3, 1, 1)
_OFFSET = (-np.array(MEAN) / np.array(STD)).astype(np.float32).reshape(3, 1, 1)


def resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize, bicubic with anti-aliasing, as Pillow does it but several times as fast.

    Two passes, across and then down, each rounded to bytes. Pillow chooses their order by size, so that it
    may be some levels off where edges are sharp.

    Args:
        pixels: (h, w, 3) uint8.
        height: of the result, pixels.
        width: of the result, pixels.

    Returns:
        (height, width, 3) uint8.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    source = pixels if pixels.flags.writeable else pixels.copy()  # torch warns of arrays it could write to
    # A view: its layout in memory stays that of pixels, which torch calls channels_last.
    image = torch.from_numpy(np.ascontiguousarray(source)).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(image, (height, width), mode="bicubic", antialias=True)
    result: NDArray[np.uint8] = np.ascontiguousarray(resized.squeeze(0).permute(1, 2, 0).numpy())
    return result


def decode_resized(encoded: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Decode an image to RGB and resize it, bicubic with anti-aliasing.

    Args:
        encoded: bytes of a file.
        height: of the result, pixels.
        width: of the result, pixels.

    Returns:
        (height, width, 3) uint8, not necessarily writable.

    Raises:
        BrokenImageError: the bytes cannot be decoded.
    """
    return resize(decode(encoded), height, width)


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) uint8 pixels to (3, H, W) float32: (x / 255 - MEAN) / STD."""
    # One pass from bytes to floats, then in place: the only large allocation is the result.
    result = np.multiply(pixels.transpose(2, 0, 1), _SCALE, dtype=np.float32, order="C")
    result += _OFFSET
    return torch.from_numpy(result)


def normalise_batch(pixels: Tensor) -> Tensor:
    """`normalise` of many images on their device, to the same bits, in the layout of channels_last.

    Args:
        pixels: (B, H, W, 3) uint8.

    Returns:
        (B, 3, H, W) float32.
    """
    batch, height, width, channels = pixels.shape
    # Whole lines at a time: over three channels nothing vectorises.
    scale, offset = (
        torch.from_numpy(np.tile(values.ravel(), width)).to(pixels.device) for values in (_SCALE, _OFFSET)
    )
    lines = pixels.reshape(batch * height, width * channels).to(torch.float32).mul_(scale).add_(offset)
    return lines.view(batch, height, width, channels).permute(0, 3, 1, 2)


class TestTransform:
    """Decode, resize (bicubic), normalise.

    Args:
        height: of the result, pixels.
        width: of the result, pixels.
    """

    __test__ = False  # not a test case, whatever its name

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = _checked_size(height, width)

    def __call__(self, encoded: bytes) -> Tensor:
        """Encoded bytes to a (3, height, width) float32 tensor.

        Raises:
            BrokenImageError: the bytes cannot be decoded.
        """
        return normalise(decode_resized(encoded, self.height, self.width))


class TrainTransform:
    """Decode, resize (bicubic), flip, pad and crop, change of colours, normalise, random erasing.

    Source: the recipe of DomainMix's code (design: flip, pad 10 + crop, random erasing 0.5).

    Args:
        height: of the result, pixels.
        width: of the result, pixels.
        flip: probability of a horizontal flip.
        pad: black border before a random crop back to size, pixels a side.
        erase: probability of random erasing.
        erase_fill: `normalised` fills with the mean as it is after normalising (0); `raw` fills with the
            means of unnormalised pixels, which the published code does.
        colour_jitter: probability of `dmx.data.colours.with_other_colours`; the published recipe has none.
    """

    def __init__(
        self,
        height: int,
        width: int,
        flip: float = 0.5,
        pad: int = 10,
        erase: float = 0.5,
        erase_fill: Literal["normalised", "raw"] = "normalised",
        colour_jitter: float = 0.0,
    ) -> None:
        self.height, self.width = _checked_size(height, width)
        for name, probability in (("flip", flip), ("erase", erase), ("colour_jitter", colour_jitter)):
            if not 0.0 <= probability <= 1.0:
                raise DmxError(f"{name}: wanted a probability, found {probability}")
        if pad < 0:
            raise DmxError(f"pad: wanted pixels, at least 0, found {pad}")
        if erase_fill not in ("normalised", "raw"):
            raise DmxError(f"erase_fill: wanted normalised or raw, found {erase_fill!r}")
        self.flip, self.pad, self.erase, self.colour_jitter = flip, pad, erase, colour_jitter
        self._fill = torch.tensor(MEAN if erase_fill == "raw" else (0.0, 0.0, 0.0)).reshape(3, 1, 1)

    def __call__(self, encoded: bytes, rng: np.random.Generator) -> Tensor:
        """Encoded bytes to a (3, height, width) float32 tensor.

        Raises:
            BrokenImageError: the bytes cannot be decoded.
        """
        pixels = decode_resized(encoded, self.height, self.width)
        if rng.random() < self.flip:
            pixels = pixels[:, ::-1]
        if self.pad:
            down, right = rng.integers(-self.pad, self.pad + 1, size=2)
            pixels = shift(pixels, int(down), int(right))
        # Without it nothing is drawn, so that runs stay what they were.
        if self.colour_jitter and rng.random() < self.colour_jitter:
            # Here, because torchvision's transforms take a second to import.
            from dmx.data.colours import with_other_colours

            pixels = with_other_colours(pixels, rng)
        image = normalise(pixels)
        if rng.random() < self.erase:
            box = erasing_box(self.height, self.width, rng)
            if box is not None:
                top, left, height, width = box
                image[:, top : top + height, left : left + width] = self._fill
        return image


def shift(pixels: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    """Move an image within its frame, black where nothing is left: the same as padding and cropping back.

    Args:
        pixels: (H, W, 3) uint8.
        down: pixels to move down (up when negative).
        right: pixels to move right (left when negative).
    """
    height, width = pixels.shape[:2]
    rows, columns = height - abs(down), width - abs(right)
    result = np.zeros((height, width, 3), np.uint8)
    if rows > 0 and columns > 0:
        top, left = max(down, 0), max(right, 0)
        source_top, source_left = max(-down, 0), max(-right, 0)
        result[top : top + rows, left : left + columns] = pixels[
            source_top : source_top + rows, source_left : source_left + columns
        ]
    return result


def erasing_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    area_low: float = 0.02,
    area_high: float = 0.4,
    aspect: float = 0.3,
) -> tuple[int, int, int, int] | None:
    """Draw the rectangle of random erasing: top, left, height, width in pixels.

    Source: Zhong et al., Random Erasing Data Augmentation, AAAI 2020, algorithm 1, with s_l, s_h, r_1 as
    there.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        rng: where randomness comes from.
        area_low: smallest share of the image's area.
        area_high: largest share.
        aspect: least ratio of height to width; the largest is its inverse.

    Returns:
        None when a hundred draws gave no rectangle that fits (tiny images).
    """
    for _ in range(100):
        area = rng.uniform(area_low, area_high) * height * width
        ratio = rng.uniform(aspect, 1.0 / aspect)
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_height < height and box_width < width:
            top = int(rng.integers(0, height - box_height + 1))
            left = int(rng.integers(0, width - box_width + 1))
            return top, left, box_height, box_width
    return None


def _checked_size(height: int, width: int) -> tuple[int, int]:
    if height < 1 or width < 1:
        raise DmxError(f"image size: wanted at least 1 x 1 pixels, found {height} x {width}")
    return height, width
