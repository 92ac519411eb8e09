"""Colours as another camera would have them, for training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as colours

# What changes an image, the value that changes nothing, and how far from it values are drawn.
COLOUR_CHANGES: tuple[tuple[Callable[[Tensor, float], Tensor], float, float], ...] = (
    (colours.adjust_brightness, 1.0, 0.15),
    (colours.adjust_contrast, 1.0, 0.15),
    (colours.adjust_saturation, 1.0, 0.1),
    (colours.adjust_hue, 0.0, 0.1),
)


def with_other_colours(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Change brightness, contrast, saturation and hue a little, in an order that is drawn, too.

    Factors are uniform in 1 - a to 1 + a, and hue moves by up to a of its circle either way.

    Args:
        pixels: (H, W, 3) uint8.
        rng: where randomness comes from.

    Source: how far is FastReID's choice for re-identification (He et al., arXiv 2006.02631; its `CJ`).
    """
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    for number in rng.permutation(len(COLOUR_CHANGES)):
        change, centre, amount = COLOUR_CHANGES[number]
        image = change(image, float(rng.uniform(centre - amount, centre + amount)))
    result: NDArray[np.uint8] = image.numpy().transpose(1, 2, 0)
    return result
