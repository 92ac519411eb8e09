"""DBSCAN on the CPU, step by step; the definition stands in `dmx.kernels.dbscan`.

Method: union-find over core-core pairs in which the lower root wins, one pair after the other.
Shapes: pairs i < j as CSR rows; everything else (N,), of one radius. Time: O(pairs) a step. Memory: O(N).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.kernels.cpu.sparse import SparseRows


@njit(cache=True, nogil=True)
def _degrees(starts, indices, distances, eps, degree):  # type: ignore[no-untyped-def]
    for i in range(starts.shape[0] - 1):
        for t in range(starts[i], starts[i + 1]):
            if distances[t] <= eps:
                degree[i] += 1
                degree[indices[t]] += 1


@njit(cache=True, nogil=True)
def _root(parent, i):  # type: ignore[no-untyped-def]
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True, nogil=True)
def _unite(starts, indices, distances, eps, degree, min_samples, parent):  # type: ignore[no-untyped-def]
    for i in range(starts.shape[0] - 1):
        if degree[i] < min_samples:
            continue
        for t in range(starts[i], starts[i + 1]):
            if distances[t] <= eps and degree[indices[t]] >= min_samples:
                a, b = _root(parent, i), _root(parent, indices[t])
                parent[max(a, b)] = min(a, b)


@njit(cache=True, nogil=True)
def _flatten(parent):  # type: ignore[no-untyped-def]
    for i in range(parent.shape[0]):  # a root is the lowest of its rows: what it stands for is known by then
        parent[i] = parent[parent[i]]


@njit(cache=True, nogil=True)
def _borders(starts, indices, distances, eps, degree, min_samples, labels):  # type: ignore[no-untyped-def]
    for i in range(starts.shape[0] - 1):
        for t in range(starts[i], starts[i + 1]):
            j = np.int64(indices[t])
            core = degree[i] >= min_samples
            if distances[t] <= eps and core != (degree[j] >= min_samples):
                if core:
                    labels[j] = min(labels[j], labels[i])
                else:
                    labels[i] = min(labels[i], labels[j])


def add_degrees(pairs: SparseRows, eps: float, degree: NDArray[np.int32]) -> None:
    """Counts the rows within eps of every row, in place."""
    _degrees(pairs.starts, pairs.indices, pairs.values, eps, degree)


def unite(
    pairs: SparseRows, eps: float, degree: NDArray[np.int32], min_samples: int, parent: NDArray[np.int32]
) -> None:
    """Joins the clusters of core rows within eps, in place; each row's parent is its root afterwards."""
    _unite(pairs.starts, pairs.indices, pairs.values, eps, degree, min_samples, parent)
    _flatten(parent)


def reach_borders(
    pairs: SparseRows, eps: float, degree: NDArray[np.int32], min_samples: int, labels: NDArray[np.int64]
) -> None:
    """Gives rows that are not core the lowest cluster in reach, in place; their labels are N before."""
    _borders(pairs.starts, pairs.indices, pairs.values, eps, degree, min_samples, labels)
