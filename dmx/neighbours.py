"""What clustering starts from: the features, with or without what cameras add, and their neighbours.

Neighbours are exact, or approximate with a recall that is measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.cameras import columns_to_choose_from, few_of_own_camera, without_cameras
from dmx.cluster.approximate import ivf_neighbours, recall_message
from dmx.cluster.sharded import Group
from dmx.cluster.sharded.neighbours import sharded_knn
from dmx.cluster.validation import as_features
from dmx.kernels.knn import Neighbours
from dmx.progress import say
from dmx.sections import ClusterConfig

Cameras = NDArray[np.integer] | None


def as_clustered(
    group: Group, features: torch.Tensor, squares: torch.Tensor, settings: ClusterConfig, cameras: Cameras
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features that are clustered: as they are, or less what their cameras add. Collective.

    Args:
        group: the processes and their rows.
        features: (own rows, D); squares: (own rows,) float64. As `dmx.cluster.validation.as_features` makes
            them.
        settings: `centre_cameras`.
        cameras: (N,) numbers of all images' cameras, -1 where unknown; None unless `settings.needs_cameras`.

    Returns:
        Features and squares of the same shapes.
    """
    if not settings.centre_cameras:
        return features, squares
    centred = without_cameras(group, features, squares, _own(group, cameras))
    return as_features(centred, features.device.type, may_be_empty=True)


def find_neighbours(
    group: Group, features: torch.Tensor, squares: torch.Tensor, settings: ClusterConfig, cameras: Cameras
) -> Neighbours:
    """The neighbours of this process's rows among those of all that clustering starts from. Collective.

    Args:
        group, features, squares, cameras: as `as_clustered` takes and returns them.
        settings: `k1`, `same_camera_share`, `knn` and `ivf_probes`.

    Returns:
        Neighbours (own rows, min(k1, N)): the nearest, or as many of them as may be of an image's own camera.
    """
    if settings.same_camera_share == 1:
        return _nearest(group, features, squares, settings, settings.k1)
    assert cameras is not None
    nearest = _nearest(group, features, squares, settings, columns_to_choose_from(settings.k1))
    own = _own(group, cameras)
    return few_of_own_camera(nearest, own, cameras, settings.k1, settings.same_camera_share)


def _own(group: Group, cameras: Cameras) -> NDArray[np.integer]:
    assert cameras is not None
    return cameras[group.first : group.first + group.own]


def _nearest(
    group: Group, features: torch.Tensor, squares: torch.Tensor, settings: ClusterConfig, columns: int
) -> Neighbours:
    if settings.knn == "exact":
        return sharded_knn(group, features, squares, columns)
    found = ivf_neighbours(group, features, squares, columns, probes=settings.ivf_probes)
    if group.rank == 0:
        text, is_low = recall_message(found, columns)
        say(f"{'warning: ' if is_low else ''}{text}")
    return found.neighbours


def label_settings(settings: ClusterConfig) -> dict[str, Any]:
    """The settings of what follows the neighbours, as `sharded_pseudo_labels` takes them."""
    names = ("k1", "k2", "eps", "eps_gap", "min_samples", "min_cluster_size")
    return {name: getattr(settings, name) for name in names}
