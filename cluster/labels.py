"""Pseudo-labels: the public function that runs every step of the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmx.cluster.graph import close_pairs
from dmx.cluster.reliability import reliable
from dmx.cluster.validation import as_count, as_radii
from dmx.kernels.dbscan import dbscan


@dataclass(frozen=True)
class PseudoLabels:
    """What clustering found in N images; C is `num_identities`.

    Attributes:
        labels: (N,) int64, 0..C-1 by the cluster's place in `base`, -1 for images that are not to train.
        tight: (N,) int64 DBSCAN labels at eps - eps_gap, numbered as scikit-learn does, -1 for outliers.
        base: the same at eps.
        loose: the same at eps + eps_gap.
        independence_threshold: the threshold applied, to be passed on in later epochs. None when there was
            nothing to derive it from (no cluster of two images); passing None on derives it then.
        centroids: (C, D) float32, unit mean of the unit features of every pseudo-identity.
    """

    labels: NDArray[np.int64]
    tight: NDArray[np.int64]
    base: NDArray[np.int64]
    loose: NDArray[np.int64]
    independence_threshold: float | None
    centroids: NDArray[np.float32]

    @property
    def num_identities(self) -> int:
        """C, the number of pseudo-identities."""
        return len(self.centroids)


def pseudo_labels(
    features: Any,
    *,
    k1: int = 30,
    k2: int = 6,
    eps: float = 0.6,
    eps_gap: float = 0.02,
    min_samples: int = 4,
    min_cluster_size: int = 5,
    independence_threshold: float | None = None,
    device: str = "auto",
) -> PseudoLabels:
    """Clusters features and keeps the reliable clusters as pseudo-identities.

    Args:
        features: (N, D) NumPy array or torch tensor, float16, float32 or float64; rows of any length but
            zero (they are made unit here).
        k1: nearest neighbours taken, the image itself included.
        k2: neighbours averaged by query expansion, the image itself included; 1 for none.
        eps: Jaccard distance within which images are neighbours, in (0, 1).
        eps_gap: how far the tight and the loose radius lie from eps.
        min_samples: images within eps, itself included, that make a core image.
        min_cluster_size: fewest kept images of a pseudo-identity.
        independence_threshold: as returned in the first epoch; None to derive it.
        device: "cpu", "cuda", or "auto" for CUDA where there is one. The result is the same.

    Returns:
        PseudoLabels. Same features, same labels, whatever the number of threads.

    Raises:
        TypeError, ValueError: features or parameters as they cannot be; the first bad row is named.

    Source: Wang et al., "DomainMix", BMVC 2021, section 3.2.
    """
    core, smallest = as_count("min_samples", min_samples), as_count("min_cluster_size", min_cluster_size)
    radii = as_radii(eps, eps_gap)
    if independence_threshold is not None and not independence_threshold >= 0:
        raise ValueError(f"independence_threshold: wanted None or a number of at least 0, found "
                         f"{independence_threshold!r}")  # fmt: skip
    close = close_pairs(features, k1, k2, radii[2], device)
    tight, base, loose = dbscan(close.pairs, radii, core)
    found = reliable(tight, base, loose, smallest, independence_threshold)
    return PseudoLabels(
        labels=found.labels,
        tight=tight,
        base=base,
        loose=loose,
        independence_threshold=found.independence_threshold,
        centroids=_centroids(close.features, close.squares, found.labels),
    )


def _centroids(
    features: NDArray[Any], squares: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Unit mean of the unit features of every label; sums in float64, a label at a time."""
    kept = np.flatnonzero(labels >= 0)
    order = kept[np.argsort(labels[kept], kind="stable")]
    groups = np.split(order, np.cumsum(np.bincount(labels[kept]))[:-1]) if len(kept) else []
    out = np.empty((len(groups), features.shape[1]), np.float32)
    for row, members in zip(out, groups, strict=True):
        total = (1 / np.sqrt(squares[members])) @ features[members].astype(np.float64)
        length = np.sqrt(total @ total)
        # Images that cancel out have no mean direction: the first of them stands for the cluster.
        row[:] = total / length if length > 0 else features[members[0]] / np.sqrt(squares[members[0]])
    return out
