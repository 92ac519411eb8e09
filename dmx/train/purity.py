"""How pure the pseudo-identities are, where the true identities happen to be known. Never used to train."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNKNOWN = -1


def cluster_report(labels: NDArray[np.int64], identities: NDArray[np.int64]) -> dict[str, float]:
    """Compare pseudo-labels with true identities.

    Args:
        labels: (N,) pseudo-identities, -1 where dropped.
        identities: (N,) true identities, -1 where unknown; those images are left out of the comparison.

    Returns:
        clusters, kept images and the kept share of all; and when any identity is known
        `purity`: share of kept images that belong to their cluster's most frequent identity,
        `pair_precision`: share of pairs within a cluster that are of one identity,
        `pair_recall`: share of pairs of one identity, among all images, that share a cluster.
    """
    kept = labels >= 0
    report: dict[str, float] = {
        "clusters": int(labels.max(initial=-1)) + 1,
        "kept": int(kept.sum()),
        "kept_share": float(kept.mean()) if len(labels) else 0.0,
    }
    known = identities != UNKNOWN
    if not known.any():
        return report
    _, person = np.unique(identities[known], return_inverse=True)
    cluster = labels[known]
    inside = cluster >= 0
    cells, counts = np.unique(np.stack([cluster[inside], person[inside]]), axis=1, return_counts=True)
    majority = np.zeros(int(report["clusters"]), dtype=np.int64)
    np.maximum.at(majority, cells[0], counts)
    right = _pairs(counts)
    together = _pairs(np.bincount(cluster[inside]))
    same = _pairs(np.bincount(person))
    report["purity"] = float(majority.sum() / inside.sum()) if inside.any() else 0.0
    report["pair_precision"] = right / together if together else 0.0
    report["pair_recall"] = right / same if same else 0.0
    return report


def _pairs(counts: NDArray[np.int64]) -> int:
    return int((counts * (counts - 1) // 2).sum())
