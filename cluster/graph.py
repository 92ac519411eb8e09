"""Jaccard distances of features: a sparse graph of the close pairs, or dense as published code has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from dmx.cluster.validation import as_count, as_features, as_radius
from dmx.kernels.jaccard import jaccard_pairs
from dmx.kernels.k_reciprocal import k_reciprocal
from dmx.kernels.knn import self_knn
from dmx.kernels.sparse import SparseRows


@dataclass(frozen=True)
class JaccardPairs:
    """Distances of the pairs i < j within a radius, with the features they were computed from.

    Attributes:
        features: (N, D); squares: (N,) float64, their squared lengths; all on one device.
    """

    features: torch.Tensor
    squares: torch.Tensor
    pairs: SparseRows


def close_pairs(features: Any, k1: int, k2: int, max_distance: float, device: str) -> JaccardPairs:
    """Features -> neighbours -> encoding -> pairs, as `jaccard_graph` without the second triangle."""
    rows, squares = as_features(features, device)
    neighbours = self_knn(rows, k1, squares=squares)
    encoded = k_reciprocal(rows, neighbours, k1, k2, squares=squares)
    return JaccardPairs(rows, squares, jaccard_pairs(encoded, max_distance))


def jaccard_graph(
    features: Any, k1: int = 30, k2: int = 6, max_distance: float = 0.62, *, device: str = "auto"
) -> sparse.csr_array:
    """Jaccard distances of all pairs within `max_distance`, from k-reciprocal encoding.

    Args:
        features: (N, D) NumPy array or torch tensor, float16, bfloat16, float32 or float64, no row zero.
        k1: nearest neighbours taken, the image itself included.
        k2: neighbours averaged by query expansion, itself included; 1 for none.
        max_distance: in [0, 1]; pairs at exactly this distance are in. Pairs that share no neighbour are at
            distance 1 and never stored, not even for 1.
        device: "cpu", "cuda", or "auto" for CUDA where there is one. The result is the same.

    Returns:
        (N, N) symmetric CSR of float64 distances with ascending columns, rounded to 12 decimals. Zeros are
        explicit entries: the diagonal, and pairs of images that nothing tells apart. What is not stored is
        farther than `max_distance`. scikit-learn takes it as it is: `DBSCAN(metric="precomputed")`.

    Raises:
        TypeError, ValueError: features or parameters as they cannot be; the first bad row is named.
        NotEnoughMemory: the GPU has not room enough for a step, even in passes; says how much it takes.

    Source: Zhong et al., CVPR 2017.
    """
    if not 0 <= max_distance <= 1:
        raise ValueError(f"max_distance: wanted a number from 0 to 1, found {max_distance!r}")
    columns, averaged = as_count("k1", k1), as_count("k2", k2)
    return _symmetric(close_pairs(features, columns, averaged, as_radius(max_distance), device).pairs)


def _symmetric(close: SparseRows) -> sparse.csr_array:
    pairs = close.on_cpu()
    # Built from coordinates, since sums of sparse matrices may drop explicit zeros.
    n = len(pairs)
    i = np.repeat(np.arange(n, dtype=np.int32), np.diff(pairs.starts))
    self_, zero = np.arange(n, dtype=np.int32), np.zeros(n)
    row = np.concatenate([i, pairs.indices, self_])
    column = np.concatenate([pairs.indices, i, self_])
    data = np.concatenate([pairs.values, pairs.values, zero])
    graph = sparse.coo_array((data, (row, column)), shape=(n, n)).tocsr()
    graph.sort_indices()
    return graph


def jaccard_distance(
    features: Any, k1: int = 30, k2: int = 6, *, device: str = "auto"
) -> NDArray[np.float32]:
    """All Jaccard distances, dense: the drop-in for the function of this job in published code.

    The one function here that needs O(N^2) memory: 4 N^2 bytes. `jaccard_graph` does without.

    Args:
        features: (N, D) as in `jaccard_graph`.
        k1: nearest neighbours taken, the image itself included.
        k2: neighbours averaged by query expansion, itself included.
        device: as in `jaccard_graph`.

    Returns:
        (N, N) float32 symmetric, 0 on the diagonal, 1 for pairs that share no neighbour.

    Raises:
        TypeError, ValueError: as `jaccard_graph`.
    """
    pairs = close_pairs(features, as_count("k1", k1), as_count("k2", k2), 1.0, device).pairs.on_cpu()
    n = len(pairs)
    out = np.ones((n, n), np.float32)
    np.fill_diagonal(out, 0)
    for i in range(n):
        part = slice(pairs.starts[i], pairs.starts[i + 1])
        out[i, pairs.indices[part]] = pairs.values[part]
        out[pairs.indices[part], i] = pairs.values[part]
    return out
