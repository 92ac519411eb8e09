"""What a camera adds to the features of every image it takes, taken away before clustering.

    y(i) = x(i) - mean of x(j) over the images j of i's camera,    x of unit length

Light, height and sensor of a camera shift all its features alike. Images of one person then lie nearer to
strangers of the same camera than to each other across cameras, which clustering sees as people who never
change cameras. Only clustering sees y; centroids and training keep x.

Every process holds its share of the images. Sums are taken in whole numbers, steps of 2^-30, so that they do
not depend on their order, nor the labels on the number of processes.

Source: the first moment of camera-based batch normalisation, on features instead of activations; Zhuang et
al., "Rethinking the Distribution Gap of Person Re-identification with Camera-based Batch Normalization", ECCV
2020.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.cluster.sharded import Group

_STEPS = 2**30  # of 1: sums of 2^33 images fit into int64
_ELEMENTS = 2**25  # float64 elements at a time
_LEAST = 1e-6  # length below which nothing but rounding is left of an image


def without_cameras(
    group: Group, features: torch.Tensor, squares: torch.Tensor, cameras: NDArray[np.integer]
) -> torch.Tensor:
    """Features less the mean of their camera's. Collective.

    Args:
        group: the workers.
        features: (own rows, D), this worker's; squares: (own rows,) float64, their squared lengths.
        cameras: (own rows,) camera numbers; all images without one (-1) count as one camera's.

    Returns:
        (own rows, D) float32. An image that is all its camera has stays as it is, of unit length.
    """
    numbers = torch.from_numpy(cameras.astype(np.int64)).to(features.device) + 1
    count = group.most(int(numbers.max()) + 1 if len(numbers) else 0, "the highest camera number")
    sums = torch.zeros((count, features.shape[1]), dtype=torch.int64, device=features.device)
    blocks = range(0, len(features), max(1, _ELEMENTS // features.shape[1]))
    for begin in blocks:
        part = slice(begin, begin + blocks.step)
        unit = _unit(features[part], squares[part])
        sums.index_add_(0, numbers[part], (unit * _STEPS).round().long())
    images = torch.bincount(numbers, minlength=count)
    group.sum(sums, "the features of every camera")
    group.sum(images, "how many images every camera has")
    means = sums.double() / (_STEPS * images.clamp(min=1)[:, None])
    out = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    for begin in blocks:
        part = slice(begin, begin + blocks.step)
        unit = _unit(features[part], squares[part])
        rest = unit - means[numbers[part]]
        is_gone = rest.norm(dim=1, keepdim=True) < _LEAST
        out[part] = torch.where(is_gone, unit, rest).float()
    return out


def _unit(features: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    return features.double() / squares.sqrt()[:, None]
