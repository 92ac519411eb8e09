"""Neighbours between two sets of rows: numba on the CPU, and Triton as `triton_device` runs it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dmx.kernels import candidates, cross
from dmx.kernels.candidates import ScanConfig
from dmx.kernels.cross import NOBODY, Wanted, cross_knn, cross_reference, nearer, plan_cross
from dmx.kernels.knn import Neighbours, self_knn
from dmx.kernels.memory import NotEnoughMemory
from dmx.kernels.similarity import similarity_reference, squared_lengths

SMALL = ScanConfig(rows=32, columns=32, depth=64, piece=16, group=2, warps=4, stages=2)


@pytest.fixture(params=["numba", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "numba":
        return torch.device("cpu")
    monkeypatch.setattr(candidates, "BLOCK", 32)
    monkeypatch.setattr(candidates, "_scan_config", SMALL)
    device: torch.device = request.getfixturevalue("triton_device")
    return device


def people(n: int, d: int, seed: int = 0, noise: float = 0.5) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(n // 8, 1), d))
    rows = centres[rng.integers(len(centres), size=n)] + noise * rng.standard_normal((n, d))
    return torch.from_numpy(rows.astype(np.float32))


def wanted(rows: torch.Tensor, least: torch.Tensor | float, device: torch.device) -> Wanted:
    rows = rows.to(device)
    floor = torch.full((len(rows),), float(least)) if isinstance(least, float) else least
    return Wanted(rows, squared_lengths(rows), floor.double().to(device))


def check(found: Neighbours, expected: Neighbours) -> None:
    np.testing.assert_array_equal(found.indices.cpu(), expected.indices)
    np.testing.assert_allclose(found.similarities.cpu(), expected.similarities, rtol=0, atol=2.0**-44)


@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(70, 45, 24, 7), (33, 130, 8, 20), (5, 64, 16, 12), (1, 1, 3, 2)]
)
def test_lists_of_both_sides_are_the_reference(n: int, m: int, d: int, k: int, device: torch.device) -> None:
    a, b = people(n, d, 1), people(m, d, 2)
    found = cross_knn(wanted(a, NOBODY, device), wanted(b, NOBODY, device), k)
    for one, expected in zip(found, cross_reference(a, b, k), strict=True):
        check(one, expected)


def test_rows_equal_within_and_across_sides_come_in_order_of_index(device: torch.device) -> None:
    a = people(40, 12, 3)
    b = torch.cat([a[5:9].repeat(12, 1), people(9, 12, 4), a[:3]])
    a = torch.cat([a, a[:20], b[:1].repeat(30, 1)])
    found = cross_knn(wanted(a, NOBODY, device), wanted(b, NOBODY, device), 9)
    for one, expected in zip(found, cross_reference(a, b, 9), strict=True):
        check(one, expected)


def test_whoever_is_similar_enough_is_found_and_lists_end_with_nobody(device: torch.device) -> None:
    a, b, k = people(90, 24, 5), people(60, 24, 6), 8
    s = similarity_reference(a, b)
    least = (s.quantile(0.97, dim=1), torch.full((60,), 0.35, dtype=torch.float64))
    found = cross_knn(wanted(a, least[0], device), wanted(b, least[1], device), k)
    for one, values, floor in zip(found, (s, s.T), least, strict=True):
        indices, similarities = one.indices.cpu(), one.similarities.cpu()
        for i in range(len(indices)):
            order = torch.argsort(values[i], descending=True, stable=True)[:k]
            needed = order[values[i][order] >= floor[i]].tolist()
            listed = [int(j) for j in indices[i] if j >= 0]
            assert listed[: len(needed)] == needed
            assert listed == order.tolist()[: len(listed)], "a list skips nobody"
            assert (similarities[i, len(listed) :] == NOBODY).all()
            assert (indices[i, len(listed) :] == -1).all()


def test_rows_whose_buffer_overflows_are_searched_in_full(device: torch.device) -> None:
    rng = np.random.default_rng(7)
    near = np.ones((400, 6)) + 1e-7 * rng.standard_normal((400, 6))
    a, b = torch.from_numpy(near[:10]), torch.from_numpy(near[10:])
    found = cross_knn(wanted(a, NOBODY, device), wanted(b, NOBODY, device), 5)
    for one, expected in zip(found, cross_reference(a, b, 5), strict=True):
        check(one, expected)


def test_shards_met_one_by_one_have_the_neighbours_of_all_rows(device: torch.device) -> None:
    rows, k = people(150, 16, 8), 10
    rows[100:110] = rows[:10]
    expected = self_knn(rows, k)
    bounds = [0, 61, 70, 150]
    shards = [rows[begin:end] for begin, end in itertools.pairwise(bounds)]
    for r, shard in enumerate(shards):
        own = self_knn(shard.to(device), k)
        own.similarities[:, 0] = 2  # a row leads its own list, whatever is equal to it
        best = Neighbours(own.indices + bounds[r], own.similarities)
        for t, other in enumerate(shards):
            if t != r:
                known = best.indices.shape[1] >= k
                least = best.similarities[:, k - 1].cpu() if known else NOBODY
                found, _ = cross_knn(wanted(shard, least, device), wanted(other, NOBODY, device), k)
                indices = torch.where(found.indices < 0, -1, found.indices + bounds[t]).int()
                columns = min(k, best.indices.shape[1] + indices.shape[1])
                best = nearer(best, Neighbours(indices, found.similarities), columns)
        best.similarities[:, 0] = 1
        part = slice(bounds[r], bounds[r + 1])
        np.testing.assert_array_equal(best.indices.cpu(), expected.indices[part])
        np.testing.assert_array_equal(best.similarities.cpu(), expected.similarities[part])


def test_passes_change_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = people(100, 16, 9), people(80, 16, 10)
    plan = plan_cross(100, 80, 16, 6)
    monkeypatch.setattr(cross, "plan_cross", lambda *_: type(plan)(0, 0, 32, 4))
    found = cross_knn(wanted(a, NOBODY, device), wanted(b, NOBODY, device), 6)
    for one, expected in zip(found, cross_reference(a, b, 6), strict=True):
        check(one, expected)


def test_the_plan_grows_with_both_sides_and_says_what_is_missing() -> None:
    assert plan_cross(10**5, 10**6, 512, 30).fixed_bytes > plan_cross(10**5, 10**5, 512, 30).fixed_bytes
    with pytest.raises(NotEnoughMemory, match="cross_knn"):
        plan_cross(10**6, 10**6, 2048, 30, free=10**8)
