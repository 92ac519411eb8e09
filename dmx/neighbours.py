"""The neighbours that clustering starts from: exact, or approximate with a recall that is measured."""

from __future__ import annotations

import sys
from typing import Any

import torch

from dmx.cluster.approximate import ivf_neighbours, recall_message
from dmx.cluster.sharded import Group
from dmx.cluster.sharded.neighbours import sharded_knn
from dmx.config import ClusterConfig
from dmx.kernels.knn import Neighbours


def find_neighbours(
    group: Group, features: torch.Tensor, squares: torch.Tensor, settings: ClusterConfig, columns: int
) -> Neighbours:
    """The nearest neighbours of this process's rows among those of all. Collective.

    Args:
        group: the processes and their rows.
        features: (own rows, D); squares: (own rows,) float64. As `dmx.cluster.validation.as_features` makes
            them.
        settings: `knn` and `ivf_probes`.
        columns: how many, the row itself included.

    Returns:
        Neighbours (own rows, min(columns, N)).
    """
    if settings.knn == "exact":
        return sharded_knn(group, features, squares, columns)
    found = ivf_neighbours(group, features, squares, columns, probes=settings.ivf_probes)
    if group.rank == 0:
        text, is_low = recall_message(found, columns)
        print(f"{'warning: ' if is_low else ''}{text}", file=sys.stderr, flush=True)
    return found.neighbours


def label_settings(settings: ClusterConfig) -> dict[str, Any]:
    """The settings of what follows the neighbours, as `sharded_pseudo_labels` takes them."""
    names = ("k1", "k2", "eps", "eps_gap", "min_samples", "min_cluster_size")
    return {name: getattr(settings, name) for name in names}
