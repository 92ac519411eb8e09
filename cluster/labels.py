"""Pseudo-labels: the public function that runs every step of the method."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.cluster.graph import close_pairs
from dmx.cluster.reliability import reliable
from dmx.cluster.validation import as_count, as_radii
from dmx.kernels.dbscan import dbscan

_ELEMENTS = 2**25  # float64 elements that averaging holds at a time


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


@dataclass(frozen=True)
class Settings:
    """Settings of `pseudo_labels`, checked: radii are eps - eps_gap, eps and eps + eps_gap."""

    k1: int
    k2: int
    radii: tuple[float, float, float]
    min_samples: int
    min_cluster_size: int
    independence_threshold: float | None

    @staticmethod
    def of(
        k1: int = 30, k2: int = 6, eps: float = 0.6, eps_gap: float = 0.02, min_samples: int = 4,
        min_cluster_size: int = 5, independence_threshold: float | None = None,
    ) -> Settings:  # fmt: skip
        """Check settings as `pseudo_labels` takes them; they have its defaults.

        Raises:
            TypeError, ValueError: one of them cannot be; says which.
        """
        if independence_threshold is not None and not independence_threshold >= 0:
            raise ValueError(f"independence_threshold: wanted None or a number of at least 0, found "
                             f"{independence_threshold!r}")  # fmt: skip
        return Settings(
            as_count("k1", k1), as_count("k2", k2), as_radii(eps, eps_gap),
            as_count("min_samples", min_samples), as_count("min_cluster_size", min_cluster_size),
            independence_threshold,
        )  # fmt: skip


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
        features: (N, D) NumPy array or torch tensor, float16, bfloat16, float32 or float64; rows of any
            length but zero (they are made unit here).
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
        NotEnoughMemory: the GPU has not room enough for a step, even in passes; says how much it takes.

    Source: Wang et al., "DomainMix", BMVC 2021, section 3.2.
    """
    chosen = Settings.of(k1, k2, eps, eps_gap, min_samples, min_cluster_size, independence_threshold)
    close = close_pairs(features, chosen.k1, chosen.k2, chosen.radii[2], device)
    tight, base, loose = dbscan(close.pairs, chosen.radii, chosen.min_samples).cpu().numpy()
    found = reliable(tight, base, loose, chosen.min_cluster_size, independence_threshold)
    return PseudoLabels(
        labels=found.labels,
        tight=tight,
        base=base,
        loose=loose,
        independence_threshold=found.independence_threshold,
        centroids=_centroids(close.features, close.squares, torch.from_numpy(found.labels)).cpu().numpy(),
    )


def _centroids(features: torch.Tensor, squares: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Unit mean of the unit features of every label, (C, D) float32; sums in float64."""
    kept = torch.nonzero(labels >= 0).flatten()
    order = kept[torch.argsort(labels[kept], stable=True)].to(features.device)
    sizes = torch.bincount(labels[kept])
    out = torch.empty((len(sizes), features.shape[1]), dtype=torch.float32, device=features.device)
    ends = sizes.cumsum(0).tolist()
    first = 0
    while first < len(sizes):
        begin = ends[first] - int(sizes[first])
        last = max(bisect_right(ends, begin + _ELEMENTS // features.shape[1]), first + 1)
        members = order[begin : ends[last - 1]]
        lengths = sizes[first:last].to(features.device)
        out[first:last] = mean_of_labels(features[members], squares[members], lengths)
        first = last
    return out


def mean_of_labels(features: torch.Tensor, squares: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Unit means of unit features, (C, D) float64.

    Args:
        features: (M, D), images of the first label, then of the second, ...; squares: (M,) float64.
        sizes: (C,) int64, images of each label, at least one.
    """
    unit = features.double() / squares.sqrt()[:, None]
    total = torch.segment_reduce(unit, "sum", lengths=sizes, axis=0)
    length = total.norm(dim=1, keepdim=True)
    # Images that cancel out have no mean direction: the first of them stands for the cluster.
    return torch.where(length > 0, total / length, unit[sizes.cumsum(0) - sizes])
