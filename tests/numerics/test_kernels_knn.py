"""Neighbours and their candidates against the references, and the error bound against what was computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dmx.kernels.cpu.candidates
import dmx.kernels.cpu.knn
from dmx.kernels.cpu.candidates import _product, bound_errors, mean_of_some, prepare, self_candidates
from dmx.kernels.cpu.knn import Neighbours, knn, self_knn
from dmx.kernels.cpu.similarity import cosine, first_equal, squared_lengths
from dmx.kernels.knn import self_knn_reference as reference
from dmx.kernels.similarity import similarity_reference as similarities


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def self_knn_reference(x: np.ndarray, k: int) -> Neighbours:
    found = reference(torch.from_numpy(x), k)
    return Neighbours(found.indices.numpy(), found.similarities.numpy())


def similarity_reference(queries: np.ndarray, x: np.ndarray) -> np.ndarray:
    return similarities(torch.from_numpy(queries), torch.from_numpy(x)).numpy()


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
    mean = mean_of_some(x, squares)
    near = prepare(x, squares, mean, dtype)
    rounding = torch.finfo(dtype).eps / 2
    base = bound_errors(near, near, rounding)
    computed = (_product(near.low, near.low) + near.offset).astype(np.float64)
    unit = x.astype(np.float64) / np.sqrt(squares)[:, None]
    offset = unit @ mean
    exact = (unit - mean) @ (unit - mean).T + offset - offset.mean()
    error = np.abs(computed - exact)
    bound = base[:, None] + rounding * np.abs(computed)
    assert (error <= bound).all()
    assert bound.max() < 1000 * error.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_round_by_half_a_step(dtype: torch.dtype) -> None:
    """|computed - exact| <= r |computed|, and r is no more than twice what is seen."""
    x = torch.from_numpy(rows(300, 2)).to(dtype)
    x[:, 1] = 0  # no sums: one rounding a product
    computed, exact = _product(x, x).astype(np.float64), (x.double() @ x.double().T).numpy()
    seen = (np.abs(computed - exact) / np.abs(computed)).max()
    rounding = dmx.kernels.cpu.candidates.rounding_of(dtype)
    assert rounding / 2 < seen <= rounding == torch.finfo(dtype).eps / 2


def fillers(square: float) -> list[float]:
    """Numbers that bfloat16 holds exactly and whose squares add up to `square`, but for 1e-10."""
    found = []
    while square > 1e-10:
        found.append(float(torch.tensor(square**0.5 * (1 - 2.0**-8)).bfloat16()))
        square -= found[-1] ** 2
    return found


def hidden_neighbour(d: int = 128) -> np.ndarray:
    """Rows 0 and 1 have the neighbours 82 and 83, which rounding a product to bfloat16 puts far behind.

    The mean is 1/2 on the first axis and the rest is exact in bfloat16, so only the product is rounded. With
    row 0, rows 2, 4, ... have the key 1/2 + 16.5 u, which rounds up to 1/2 + 32 u (u = 2^-13), and row 82 has
    1/2 + 47.5 u, which rounds down to the same, less 30.5 u for its part along the mean.
    """
    u, shift = 2.0**-13, 61 * 2.0**-13
    specs = [(0.5, (0.5, 0.5, 0.5))] + [(0.5, (0.5, 0.5, 33 * u))] * 40
    specs += [(0.5 - shift, (0.5, 0.5, 95 * u)), (0.5 + shift, (0.0, 0.0, 0.0))]
    x = np.zeros((len(specs), 2, d), np.float32)  # two of each, mirrored but for the first axis
    rng = np.random.default_rng(0)
    for row, (first, next_three) in zip(x, specs, strict=True):
        rest = fillers(1 - first**2 - sum(value**2 for value in next_three))
        row[:, 1:4] = next_three
        row[:, 4 + rng.permutation(d - 4)[: len(rest)]] = rest * rng.choice([-1, 1], len(rest))
        row[1] *= -1
        row[:, 0] = first
    return x.reshape(-1, d)


@pytest.mark.parametrize("k", [2, 10, 30])
def test_a_neighbour_that_bfloat16_hides_is_found(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        dmx.kernels.cpu.candidates,
        dmx.kernels.cpu.knn,
    ):  # also where the processor has no bfloat16
        monkeypatch.setattr(module, "product_dtype", lambda width: torch.bfloat16)
    x = hidden_neighbour()
    want = self_knn_reference(x, k).indices
    assert want[0, 1] == 82
    assert want[1, 1] == 83
    np.testing.assert_array_equal(self_knn(x, k).indices, want)


@pytest.mark.parametrize("spread", [1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("d", [3, 40, 200])
def test_ties_on_the_grid_are_kept(d: int, spread: float) -> None:
    """Rows this close tie in the similarity's 2^-44 steps, and the candidates must not part them."""
    x = (1 + spread * rows(600, d)).astype(np.float32)
    squares, first = squared_lengths(x), first_equal(x)
    s = np.array([[cosine(x[i], x[j], squares[i], squares[j]) for j in first] for i in first])
    np.fill_diagonal(s, 2)  # every row leads its own list
    want = np.argsort(-s, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(self_knn(x, 10).indices, want)


def test_rows_that_overflow_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near copies that bfloat16 factors cannot tell apart: none is left to compare with everybody."""
    for module in (dmx.kernels.cpu.candidates, dmx.kernels.cpu.knn):  # also where there is no bfloat16
        monkeypatch.setattr(module, "product_dtype", lambda width: torch.bfloat16)
    x = np.concatenate([rows(1, 200) + np.float32(0.03) * rows(600, 200, 1), rows(60, 200, 2)])
    assert (self_candidates(x, squared_lengths(x), 10).counts < 0).any()
    held = []
    rescored = dmx.kernels.cpu.knn.rescored
    monkeypatch.setattr(
        dmx.kernels.cpu.knn, "rescored", lambda *given: (held.append(given[4].counts), rescored(*given))[1]
    )
    want = self_knn_reference(x, 10).indices
    np.testing.assert_array_equal(self_knn(x, 10).indices, want)
    np.testing.assert_array_equal(knn(x, x, 10).indices, want)
    assert all((counts > 0).all() for counts in held)
    assert len(held) == 2


def test_rounding_is_to_nearest_even() -> None:
    x = rows(200, 256)
    squares = squared_lengths(x)
    low = prepare(x, squares, np.zeros(256), torch.bfloat16).low
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
