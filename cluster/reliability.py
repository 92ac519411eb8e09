"""Keeps the clusters that barely change when the radius does (step 6 of the method).

Legend: C(i), T(i), L(i): clusters of image i at the base, tight and loose radius; outliers are singletons.

    comp(i)  = 1 - |C(i) & T(i)| / |C(i) | T(i)|          comp(c)  = min over the images of cluster c
    indep(i) = 1 - |C(i) & L(i)| / |C(i) | L(i)|          indep(c) = min over the images of cluster c
    threshold = value at rank min(round(0.9 n), n - 1) of indep(c), over the n clusters of two images or more
    image i is kept  <=>  indep(C(i)) <= threshold  and  comp(i) <= comp(C(i))
    clusters left with fewer than min_cluster_size images are dropped

Everything comes from counts of label pairs, in O(N log N). Ratios are single float64 divisions of integers,
so equal ratios are equal numbers (2/4 and 1/2), which comparisons rely on.
Source: Wang et al., "DomainMix", BMVC 2021, section 3.2; the criteria are those of Ge et al., "Self-paced
Contrastive Learning with Hybrid Memory", NeurIPS 2020, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Fate(IntEnum):
    """What became of an image, and of what is dropped the first reason that holds."""

    KEPT = 0
    OUTLIER = 1
    NOT_INDEPENDENT = 2
    NOT_COMPACT = 3
    TOO_FEW_LEFT = 4


@dataclass(frozen=True)
class Evidence:
    """Why images were kept and dropped; B is the number of clusters at the base radius.

    Attributes:
        clusters: (N,) int32 labels at the base radius, -1 for outliers.
        fates: (N,) uint8, a `Fate` each.
        independence, compactness: (B,) float64, indep(c) and comp(c); 0 is the most reliable.
    """

    clusters: NDArray[np.int32]
    fates: NDArray[np.uint8]
    independence: NDArray[np.float64]
    compactness: NDArray[np.float64]


@dataclass(frozen=True)
class Reliable:
    """labels (N,) int64, -1 for what is dropped; the threshold applied, None if there was none; and why."""

    labels: NDArray[np.int64]
    independence_threshold: float | None
    evidence: Evidence


def outliers_as_singletons(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers every outlier (-1) as a cluster of its own, after the others, in the order of the images."""
    out = labels.copy()
    alone = labels < 0
    out[alone] = labels.max(initial=-1) + 1 + np.arange(int(alone.sum()))
    return out


def disagreement(labels: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 - |A & B| / |A | B| of every image's clusters A in `labels` and B in `others`, (N,) float64."""
    size, other_size = np.bincount(labels), np.bincount(others)
    pair = labels * len(other_size) + others
    _, inverse, counts = np.unique(pair, return_inverse=True, return_counts=True)
    common = counts[inverse]
    return np.asarray(1 - common / (size[labels] + other_size[others] - common))


def least(values: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The smallest value in every cluster, (C,)."""
    out = np.full(int(labels.max()) + 1, np.inf)
    np.minimum.at(out, labels, values)
    return out


def threshold_of(independence: NDArray[np.float64], sizes: NDArray[np.int64]) -> float | None:
    """The value at rank round(0.9 n) among the n clusters of two images or more; None when n is 0."""
    ranked = np.sort(independence[sizes > 1])
    if len(ranked) == 0:
        return None
    return float(ranked[min(round(0.9 * len(ranked)), len(ranked) - 1)])


def reliable(
    tight: NDArray[np.int64], base: NDArray[np.int64], loose: NDArray[np.int64],
    min_cluster_size: int, independence_threshold: float | None,
) -> Reliable:  # fmt: skip
    """Final labels from the three labelings.

    Args:
        tight, base, loose: (N,) int64 labels, -1 for outliers.
        min_cluster_size: fewest images a kept cluster has. An outlier is a cluster of one, so it can stay
            only at 1.
        independence_threshold: as returned for an earlier epoch; None to derive it from these labelings.

    Returns:
        Labels 0..C-1 in the order of the base labels. Without a threshold, and without a cluster of two to
        derive one from, nothing is kept and the threshold stays None, so that a later epoch may derive it.
    """
    cluster = outliers_as_singletons(base)
    compactness = disagreement(cluster, outliers_as_singletons(tight))
    independence = least(disagreement(cluster, outliers_as_singletons(loose)), cluster)
    threshold = independence_threshold
    if threshold is None:
        threshold = threshold_of(independence, np.bincount(cluster))
    least_compactness = least(compactness, cluster)
    independent = independence[cluster] <= (-1.0 if threshold is None else threshold)
    compact = compactness <= least_compactness[cluster]
    sizes = np.bincount(cluster[independent & compact], minlength=len(independence))
    stays = sizes >= min_cluster_size
    fates = np.select(
        [independent & compact & stays[cluster], base < 0, ~independent, ~compact],
        [Fate.KEPT, Fate.OUTLIER, Fate.NOT_INDEPENDENT, Fate.NOT_COMPACT],
        Fate.TOO_FEW_LEFT,
    ).astype(np.uint8)
    found = int(base.max(initial=-1)) + 1
    evidence = Evidence(base.astype(np.int32), fates, independence[:found], least_compactness[:found])
    return Reliable(labels_of(evidence), threshold, evidence)


def labels_of(evidence: Evidence) -> NDArray[np.int64]:
    """(N,) int64 pseudo-identities 0..C-1 in the order of the base labels, -1 for what is dropped."""
    labels = np.full(len(evidence.fates), -1, np.int64)
    kept = evidence.fates == Fate.KEPT
    cluster = outliers_as_singletons(evidence.clusters.astype(np.int64))[kept]
    labels[kept] = (np.cumsum(np.bincount(cluster) > 0) - 1)[cluster]
    return labels
