"""Neighbours and their candidates against the references, and the error bound against what was computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmx.kernels.candidates import _bound, _mean, _prepare, _product, cuda_candidates, self_candidates
from dmx.kernels.knn import knn, self_knn, self_knn_reference
from dmx.kernels.similarity import first_equal, similarity_reference, squared_lengths


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 3, 5), (40, 7, 30), (500, 33, 30), (500, 300, 64), (2500, 130, 30)]
)
def test_self_join_equals_the_reference(n: int, d: int, k: int) -> None:
    x = rows(n, d)
    x[n // 2 :: 7] = x[: len(x[n // 2 :: 7])]
    found, want = self_knn(x, k), self_knn_reference(x, k)
    np.testing.assert_array_equal(found.indices, want.indices)
    # Two multiples of 2^-44 that a different order of summation may put one step apart.
    np.testing.assert_allclose(found.similarities, want.similarities, rtol=0, atol=2.0**-44)


@pytest.mark.parametrize(
    ("q", "n", "d", "k"), [(30, 500, 20, 10), (2100, 300, 140, 500), (50, 4500, 200, 30)]
)
def test_queries_equal_the_reference(q: int, n: int, d: int, k: int) -> None:
    queries, x = rows(q, d, 1), rows(n, d, 2)
    x[n // 2 : n // 2 + 40] = x[3]
    s = similarity_reference(queries, x)
    same = first_equal(x)
    order = np.argsort(-s[:, same], axis=1, kind="stable")[:, :k]
    found = knn(queries, x, k)
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.similarities, np.take_along_axis(s, order, 1), rtol=0, atol=2.0**-44)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_keys_stay_within_the_bound(dtype: torch.dtype, shift: float) -> None:
    """|computed - exact| <= base + r |computed| for every pair, with room that is not absurd."""
    x = rows(300, 512) + np.float32(shift)
    squares = squared_lengths(x)
    mean = _mean(x, squares)
    near = _prepare(x, squares, mean, dtype)
    rounding = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-24
    base = _bound(near, near, rounding)
    computed = (_product(near.low, near.low) + near.offset).astype(np.float64)
    unit = x.astype(np.float64) / np.sqrt(squares)[:, None]
    offset = unit @ mean
    exact = (unit - mean) @ (unit - mean).T + offset - offset.mean()
    error = np.abs(computed - exact)
    bound = base[:, None] + rounding * np.abs(computed)
    assert (error <= bound).all()
    assert bound.max() < 1000 * error.max()


def test_rounding_is_to_nearest_even() -> None:
    x = rows(200, 256)
    squares = squared_lengths(x)
    low = _prepare(x, squares, np.zeros(256), torch.bfloat16).low
    unit = torch.from_numpy((x.astype(np.float64) / np.sqrt(squares)[:, None]).astype(np.float32))
    assert (low != unit.to(torch.bfloat16)).float().mean() < 1e-3  # float64 scaling may differ by a last bit


def test_candidates_hold_all_neighbours_and_few_others() -> None:
    x = rows(3000, 600)
    squares = squared_lengths(x)
    found = self_candidates(x, squares, 30)
    want = self_knn_reference(x, 30).indices
    assert (found.counts > 0).all()
    assert all(set(want[i]) <= set(found.ids[i, : found.counts[i]]) for i in range(len(x)))
    assert found.counts.mean() < 100
    s = similarity_reference(x, x)
    for i in range(len(x)):
        held = slice(0, found.counts[i])
        assert (s[i, found.ids[i, held]] <= found.at_most[i, held]).all()
        assert set(found.ids[i, :30]) & set(want[i])  # the likeliest lead


@pytest.mark.parametrize(("n", "d"), [(100, 40), (1500, 300), (1500, 3)])
def test_candidates_of_a_torch_device_hold_all_neighbours(n: int, d: int) -> None:
    """The CUDA way, on the device at hand."""
    x = rows(n, d)
    squares = squared_lengths(x)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = cuda_candidates(x, squares, x, squares, 30, device)
    want, s = self_knn_reference(x, 30).indices, similarity_reference(x, x)
    assert (found.counts > 0).any()
    for i in np.flatnonzero(found.counts > 0):
        held = slice(0, found.counts[i])
        assert set(want[i]) <= set(found.ids[i, held])
        assert (s[i, found.ids[i, held]] <= found.at_most[i, held]).all()


def test_equal_rows_are_found() -> None:
    x = rows(400, 37)
    x[100:200] = x[50]
    x[300] = x[7]
    first = first_equal(x)
    want = np.arange(400)
    want[100:200], want[300] = 50, 7
    np.testing.assert_array_equal(first, want)
    np.testing.assert_array_equal(first_equal(x.astype(np.float64)), want)
    np.testing.assert_array_equal(first_equal(np.zeros((5, 3), np.float32)), np.zeros(5))
