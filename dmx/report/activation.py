"""Where a model looks: the last feature map's activation, drawn over the image.

    A = sum_c F_c^2,    scaled to [0, 1] within each image

It needs no gradient and no class, so that it serves for people the model has never seen.

Source: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017 (F^2_sum, equation 1).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dmx.model import EmbeddingModel

# From little to much: rising lightness, told apart by eyes that see few colours too.
RAMP = np.array([(20, 12, 60), (110, 26, 110), (190, 55, 85), (240, 120, 40), (252, 220, 100)], np.float32)
MAP_SHARE = 0.6


def activation_maps(model: EmbeddingModel, images: Tensor) -> Tensor | None:
    """Maps (N, h, w) float32 in [0, 1] of normalised images (N, 3, H, W); None where a model has no map.

    Transformers over patches give a list of tokens, which is no picture.
    """
    features: Tensor = model.backbone(images)
    if features.ndim != 4:
        return None
    channels_last = str(getattr(model.backbone, "output_fmt", "NCHW")).endswith("NHWC")
    energy = features.float().square().sum(3 if channels_last else 1)
    low, high = energy.amin((1, 2), keepdim=True), energy.amax((1, 2), keepdim=True)
    return (energy - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)


def drawn_over(pixels: NDArray[np.uint8], energy: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) under its map (h, w)."""
    wide = F.interpolate(
        torch.from_numpy(energy)[None, None], pixels.shape[:2], mode="bilinear", align_corners=False
    )[0, 0].numpy()
    places = np.linspace(0, 1, len(RAMP))
    colours = np.stack([np.interp(wide, places, RAMP[:, channel]) for channel in range(3)], 2)
    mixed = (1 - MAP_SHARE) * pixels + MAP_SHARE * colours
    return mixed.round().astype(np.uint8)
