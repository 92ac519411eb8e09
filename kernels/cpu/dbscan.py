"""DBSCAN on the CPU; the definition stands in `dmx.kernels.dbscan`.

Method: union-find over core-core pairs in which the lower root wins, one pair after the other.
Time: O(pairs) a radius. Memory: O(N).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.k_reciprocal import SparseRows


@njit(cache=True, nogil=True)
def _root(parent, i):  # type: ignore[no-untyped-def]
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def _dbscan(starts, indices, distances, eps, min_samples, labels):  # type: ignore[no-untyped-def]
    n = starts.shape[0] - 1
    degree = np.ones(n, np.int64)
    for i in range(n):
        for t in range(starts[i], starts[i + 1]):
            if distances[t] <= eps:
                degree[i] += 1
                degree[indices[t]] += 1
    parent = np.arange(n)
    for i in range(n):
        if degree[i] < min_samples:
            continue
        for t in range(starts[i], starts[i + 1]):
            if distances[t] <= eps and degree[indices[t]] >= min_samples:
                a, b = _root(parent, i), _root(parent, indices[t])
                parent[max(a, b)] = min(a, b)
    cluster = 0
    for i in range(n):  # a root is the lowest row of its cluster, so it is met first
        labels[i] = -1
        if degree[i] >= min_samples:
            root = _root(parent, i)
            if root == i:
                labels[i] = cluster
                cluster += 1
            else:
                labels[i] = labels[root]
    for i in range(n):
        for t in range(starts[i], starts[i + 1]):
            if distances[t] > eps:
                continue
            j = np.int64(indices[t])
            for a, b in ((i, j), (j, i)):  # a may be a border row of b's cluster
                border = degree[a] < min_samples and degree[b] >= min_samples
                if border and (labels[a] < 0 or labels[b] < labels[a]):
                    labels[a] = labels[b]


def dbscan(pairs: SparseRows, radii: Sequence[float], min_samples: int) -> NDArray[np.int64]:
    """Labels of every row at every radius.

    Args:
        pairs: distances of pairs i < j, at least all within the largest radius (`jaccard_pairs`).
        radii: eps of each labeling; pairs at exactly eps count.
        min_samples: rows within eps, itself included, that make a core row.

    Returns:
        (len(radii), N) int64; -1 marks outliers.
    """
    labels = np.empty((len(radii), len(pairs)), np.int64)
    for row, eps in zip(labels, radii, strict=True):
        _dbscan(pairs.starts, pairs.indices, pairs.values, eps, min_samples, row)
    return labels
