"""What images of one camera have in common, kept out of clustering in two ways.

Light, height and sensor of a camera shift all its features alike. Images of one person then lie nearer to
strangers of the same camera than to each other across cameras, which clustering sees as people who never
change cameras. Only clustering sees what is computed here; centroids and training keep the features x.

`without_cameras`: features less what a camera adds to all of them.

    y(i) = x(i) - mean of x(j) over the images j of i's camera,    x of unit length

Every process holds its share of the images. Sums are taken in whole numbers, steps of 2^-30, so that they do
not depend on their order, nor the labels on the number of processes.

`few_of_own_camera`: lists of neighbours in which an image's own camera has no more than its share.

    of the first m columns of a list at most max(1, ceil(share m)) are of the image's camera, itself included

A list is filled column by column with the nearest image that this allows. Since it holds for every m, it does
for the half list and for the few neighbours of query expansion.

Sources: the first moment of camera-based batch normalisation, on features instead of activations; Zhuang et
al., "Rethinking the Distribution Gap of Person Re-identification with Camera-based Batch Normalization", ECCV
2020. Neighbours of the same and of other cameras found apart; Chen et al., "CA-Jaccard: Camera-aware Jaccard
Distance for Person Re-identification", CVPR 2024, section 3.2, which takes a fixed number of each.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.cluster.sharded import Group
from dmx.kernels.knn import MOST, Neighbours

_STEPS = 2**30  # of 1: sums of 2^33 images fit into int64
_ELEMENTS = 2**25  # float64 elements at a time
_LEAST = 1e-6  # length below which nothing but rounding is left of an image
_ENTRIES = 2**22  # of lists at a time
_SHARE_STEPS = 10**9  # shares are whole numbers of these: ceil(0.1 * 30) is 3


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


def columns_to_choose_from(columns: int) -> int:
    """How long lists `few_of_own_camera` wants for so many columns: twice that, where a GPU finds as many."""
    return max(columns, min(2 * columns, MOST))


def few_of_own_camera(
    nearest: Neighbours, own: NDArray[np.integer], cameras: NDArray[np.integer], columns: int, share: float
) -> Neighbours:
    """Shorter lists with at most a share of images of the list's own camera.

    Args:
        nearest: (own rows, K), every row first in its own list; longer than wanted, to choose from.
        own: (own rows,) camera numbers of the lists' images, -1 where unknown: those are nobody's.
        cameras: (N,) of all images.
        columns: images wanted in a list; min(columns, K) are returned.
        share: from 0 (of its camera only the image itself) to 1 (the nearest, whosever they are). A list
            that holds too few others goes on with the nearest that are left.

    Returns:
        Neighbours (own rows, min(columns, K)); not in the order of similarity.
    """
    device = nearest.indices.device
    everyone, here = (torch.from_numpy(numbers.astype(np.int64)).to(device) for numbers in (cameras, own))
    width = min(columns, nearest.indices.shape[1])
    indices = torch.empty((len(here), width), dtype=nearest.indices.dtype, device=device)
    similarities = torch.empty((len(here), width), dtype=nearest.similarities.dtype, device=device)
    blocks = range(0, len(here), max(1, _ENTRIES // nearest.indices.shape[1]))
    for begin in blocks:
        part = slice(begin, begin + blocks.step)
        theirs = everyone[nearest.indices[part].long()]
        is_own = (theirs == here[part, None]) & (theirs >= 0)
        is_own[:, 0] = True
        places = _fill(is_own, width, share)
        indices[part] = nearest.indices[part].gather(1, places)
        similarities[part] = nearest.similarities[part].gather(1, places)
    return Neighbours(indices, similarities)


def _fill(is_own: torch.Tensor, width: int, share: float) -> torch.Tensor:
    """Which columns (R, width) of lists are taken, in order; `is_own` (R, K) of the camera of the list."""
    is_free = torch.ones_like(is_own)
    taken_own = torch.zeros(len(is_own), dtype=torch.int64, device=is_own.device)
    steps = round(share * _SHARE_STEPS)
    places = []
    for column in range(width):
        most = max(1, -(-steps * (column + 1) // _SHARE_STEPS))
        is_fit = is_free & (~is_own | (taken_own < most)[:, None])
        has_fit = is_fit.any(1, keepdim=True)
        place = torch.where(has_fit, is_fit, is_free).long().cumsum(1).eq(0).sum(1, keepdim=True)
        is_free.scatter_(1, place, False)
        taken_own += is_own.gather(1, place)[:, 0]
        places.append(place)
    return torch.cat(places, 1)
