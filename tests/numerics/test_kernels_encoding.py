"""Encoding, Jaccard pairs and DBSCAN, each against its own reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from dmx.kernels.cpu.jaccard import jaccard_pairs
from dmx.kernels.cpu.k_reciprocal import half_columns, k_reciprocal
from dmx.kernels.cpu.knn import self_knn
from dmx.kernels.cpu.similarity import squared_lengths
from dmx.kernels.cpu.sparse import SparseRows
from dmx.kernels.dbscan import dbscan, dbscan_reference
from dmx.kernels.jaccard import jaccard_reference
from dmx.kernels.k_reciprocal import k_reciprocal_reference
from dmx.kernels.sparse import SparseRows as TensorRows


def dense(rows: SparseRows) -> np.ndarray:
    n = len(rows)
    out = np.zeros((n, n))
    out[np.repeat(np.arange(n), np.diff(rows.starts)), rows.indices] = rows.values
    return out


def sparse_rows(v: np.ndarray) -> SparseRows:
    i, j = v.nonzero()
    starts = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=len(v)))])
    return SparseRows(starts, j.astype(np.int32), v[i, j])


def people(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.repeat(rng.standard_normal((n // 10, d)), 10, 0) + 0.8 * rng.standard_normal((n, d))).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("k1", "half"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (20, 11), (29, 15), (30, 16), (31, 17)]
)
def test_half_lists(k1: int, half: int) -> None:
    assert half_columns(k1) == half


@pytest.mark.parametrize(
    ("n", "k1", "k2"), [(10, 30, 6), (400, 30, 6), (400, 30, 1), (1300, 20, 3), (60, 7, 20)]
)
def test_encoding_equals_the_reference(n: int, k1: int, k2: int) -> None:
    x = people(n, 24, n + k1)
    near = self_knn(x, k1)
    v = k_reciprocal(x, squared_lengths(x), near, k1, k2)
    want = k_reciprocal_reference(
        torch.from_numpy(x), torch.from_numpy(near.indices), k1, min(k1, k2)
    ).numpy()
    np.testing.assert_array_equal(np.diff(v.starts), (want > 0).sum(1))
    np.testing.assert_allclose(dense(v), want, rtol=1e-12, atol=0)  # 3 k1 additions of 2^-53 and a 2^-45 grid
    np.testing.assert_allclose(np.add.reduceat(v.values, v.starts[:-1]), 1, rtol=1e-13)


@pytest.mark.parametrize("max_distance", [0.0, 0.2, 0.62, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 30, 700])
def test_pairs_equal_the_reference(n: int, max_distance: float) -> None:
    """Rows of any shape that sum to 1: heads and tails, hubs, and columns that all rows hold."""
    rng = np.random.default_rng(n)
    v = rng.random((n, n)) ** 4 * (rng.random((n, n)) < min(1, 20 / n))
    v[:, : 1 + n // 100] += 0.05
    v[n // 2 :: 5] = v[: len(v[n // 2 :: 5])]
    v /= v.sum(1, keepdims=True)
    want = jaccard_reference(torch.from_numpy(v)).numpy()
    found = jaccard_pairs(sparse_rows(v), max_distance)
    wanted = np.triu((want <= max_distance) & (want < 1), 1)
    np.testing.assert_array_equal(np.diff(found.starts), wanted.sum(1))
    i, j = wanted.nonzero()
    np.testing.assert_array_equal(found.indices, j)
    np.testing.assert_allclose(found.values, want[i, j], rtol=0, atol=1.1e-12)


def test_more_pairs_than_there_is_room_for_at_first() -> None:
    v = np.full((400, 400), 1 / 400)
    found = jaccard_pairs(sparse_rows(v), 0.5)
    assert len(found.indices) == 400 * 399 // 2
    assert (found.values == 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 6))
def test_dbscan_numbers_as_scikit_learn(seed: int, n: int, min_samples: int) -> None:
    """Points on a line in random order: chains, borders between clusters, distances exactly at a radius."""
    rng = np.random.default_rng(seed)
    at = rng.integers(0, 3 * n, n)
    d = np.abs(at[:, None] - at).astype(float)
    i, j = np.triu_indices(n, 1)
    near = d[i, j] <= 3
    pairs = SparseRows(
        np.concatenate([[0], np.cumsum(np.bincount(i[near], minlength=n))]),
        j[near].astype(np.int32),
        d[i, j][near],
    )
    radii = (1.0, 2.0, 3.0)
    for eps, labels in zip(radii, dbscan(TensorRows.of(pairs), radii, min_samples), strict=True):
        want = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(d).labels_
        np.testing.assert_array_equal(labels, want)
        np.testing.assert_array_equal(dbscan_reference(torch.from_numpy(d), eps, min_samples), want)
