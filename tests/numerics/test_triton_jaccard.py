"""The Jaccard join's kernels against the formula in exact sums, the reference and the CPU's version."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dmx.kernels import jaccard as op
from dmx.kernels.cpu.jaccard import jaccard_pairs as pairs_on_the_cpu
from dmx.kernels.heads import WHOLE, find_heads
from dmx.kernels.jaccard import jaccard_pairs, jaccard_reference, plan_jaccard
from dmx.kernels.memory import NotEnoughMemory
from dmx.kernels.sparse import SparseRows, starts_of

# Distances are rounded to 12 decimals, and sums in another order may fall on the next one.
ONE_STEP = 1.1e-12


def sparse_rows(v: NDArray[np.float64], device: torch.device) -> SparseRows:
    """Columns ascending, as query expansion leaves them on a GPU."""
    i, j = v.nonzero()
    sizes = torch.from_numpy(np.bincount(i, minlength=len(v)))
    columns, values = torch.from_numpy(j.astype(np.int32)), torch.from_numpy(v[i, j])
    return SparseRows(starts_of(sizes).to(device), columns.to(device), values.to(device))


def rows_of_any_shape(rng: np.random.Generator, n: int, entries: int) -> NDArray[np.float64]:
    """Rows that sum to 1: long and short, heads and tails, columns that all hold, equal rows."""
    v = rng.random((n, n)) ** 4 * (rng.random((n, n)) < min(1, entries / n))
    v[:, : 1 + n // 50] += 0.05
    v[n // 2 :: 5] = v[: len(v[n // 2 :: 5])]
    return np.asarray(v / v.sum(1, keepdims=True))


def exactly(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """The formula with sums that are right to the last bit."""
    n = len(v)
    m = np.array([[math.fsum(np.minimum(v[i], v[j])) for j in range(n)] for i in range(n)])
    return np.asarray(np.round(1 - m / (2 - m), 12))


def check(v: NDArray[np.float64], max_distance: float, device: torch.device) -> None:
    rows = sparse_rows(v, device)
    found = jaccard_pairs(rows, max_distance)
    assert found.starts.dtype == torch.int64
    assert found.indices.dtype == torch.int32
    assert found.values.dtype == torch.float64
    assert found.values.device.type == device.type
    on_the_cpu = pairs_on_the_cpu(rows.on_cpu(), max_distance)
    np.testing.assert_array_equal(found.starts.cpu(), on_the_cpu.starts)
    np.testing.assert_array_equal(found.indices.cpu(), on_the_cpu.indices)
    np.testing.assert_allclose(found.values.cpu(), on_the_cpu.values, rtol=0, atol=ONE_STEP)
    share = np.triu((v > 0).astype(int) @ (v > 0).T, 1) > 0
    for want in (exactly(v), jaccard_reference(torch.from_numpy(v)).numpy()):
        i, j = (share & (want <= max_distance)).nonzero()
        np.testing.assert_array_equal(found.rows.cpu(), i)
        np.testing.assert_array_equal(found.indices.cpu(), j)
        np.testing.assert_allclose(found.values.cpu(), want[i, j], rtol=0, atol=ONE_STEP)


@pytest.mark.parametrize("max_distance", [0.0, 0.2, 0.62, 0.999, 1.0])
@pytest.mark.parametrize(("n", "entries"), [(1, 1), (2, 2), (33, 6), (50, 10)])
def test_equals_the_formula(triton_device: torch.device, n: int, entries: int, max_distance: float) -> None:
    check(rows_of_any_shape(np.random.default_rng(n), n, entries), max_distance, triton_device)


@settings(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 12), st.sampled_from([0.3, 0.62, 0.9]))
def test_equals_the_formula_on_any_rows(
    triton_device: torch.device, seed: int, n: int, entries: int, max_distance: float
) -> None:
    check(rows_of_any_shape(np.random.default_rng(seed), n, entries), max_distance, triton_device)


@pytest.mark.parametrize(("buckets", "slots"), [(1, 1), (4, 32), (64, 2)])
@pytest.mark.parametrize("max_distance", [0.62, 1.0])
def test_full_tables(
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    buckets: int,
    slots: int,
    max_distance: float,
) -> None:
    """Buckets that many rows meet, and more candidates than slots: each is still taken, and taken once."""
    monkeypatch.setattr(op, "_BUCKETS", buckets)
    monkeypatch.setattr(op, "_SLOTS", slots)
    check(rows_of_any_shape(np.random.default_rng(3), 25, 6), max_distance, triton_device)
    check(np.full((9, 9), 1 / 9), max_distance, triton_device)


def test_more_candidates_than_there_is_room_for(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal rows: all pairs are candidates, and passes are split until they fit."""
    v = np.zeros((24, 24))
    v[:, :4] = 0.25
    monkeypatch.setattr(op, "_CANDIDATES", 1)
    check(v, 0.5, triton_device)


def test_passes(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As little memory as will do, and a little more: rows and entries in many groups, and in few."""
    v = rows_of_any_shape(np.random.default_rng(7), 24, 4)
    n, entries = len(v), np.count_nonzero(v)
    least = next(free for free in range(2**24, 2**26, 64) if passes(n, entries, free))
    few = next(free for free in range(least, 2**26, 64) if passes(n, entries, free) == 3)
    assert passes(n, entries, least) == n
    for free in (least, few):
        monkeypatch.setattr(op, "free_bytes", lambda device, free=free: free)
        check(v, 0.9, triton_device)


def passes(n: int, entries: int, free: int) -> int:
    """0 where the memory does not do."""
    try:
        return plan_jaccard(n, entries, free).passes
    except NotEnoughMemory:
        return 0


@pytest.mark.parametrize(("shared", "distance"), [(4, 0.6), (3, 8 / 11), (6, 0.25), (7, 0.0)])
def test_pairs_exactly_at_the_radius_are_in(
    triton_device: torch.device, shared: int, distance: float
) -> None:
    """Rows of sevenths that share `shared` of them: d = 1 - shared / (14 - shared)."""
    v = np.zeros((14, 14))
    v[0, :7], v[1, 7 - shared : 14 - shared] = 1 / 7, 1 / 7
    v[range(2, 14), range(2, 14)] = 1
    rows, d = sparse_rows(v, triton_device), round(distance, 12)
    assert jaccard_pairs(rows, d).starts[1] == 1
    assert jaccard_pairs(rows, d - 1e-12).starts[1] == 0 if d else True


def test_rows_longer_than_a_tile(triton_device: torch.device) -> None:
    """Heads and rows of more entries than a tile has columns, against a row of one entry."""
    rng = np.random.default_rng(5)
    v = np.zeros((80, 80))
    v[:5] = rng.random((5, 80))
    v[range(5, 80), range(5, 80)] = 1
    check(v / v.sum(1, keepdims=True), 0.999, triton_device)


@pytest.mark.parametrize("most", [1, 7, 10**6])
def test_heads_and_their_lists(most: int) -> None:
    """However few entries are sorted at a time: heads as short as they may be, and every list complete."""
    n, tail = 40, 5000
    v = sparse_rows(rows_of_any_shape(np.random.default_rng(9), n, 8), torch.device("cpu"))
    found = find_heads(v, tail, most)
    counts = torch.bincount(v.indices, minlength=n)
    by_rank = counts.argsort(stable=True)
    lists: list[list[tuple[int, int]]] = [[] for _ in range(n)]
    for i in range(n):
        whole = slice(int(v.starts[i]), int(v.starts[i + 1]))
        columns = by_rank[found.ranks[whole].long()]
        assert found.ranks[whole].diff().gt(0).all()
        values = dict(zip(v.indices[whole].tolist(), v.values[whole].tolist(), strict=True))
        weights = {column: int(WHOLE * value) + 1 for column, value in values.items()}
        assert weights == dict(zip(columns.tolist(), found.weights[whole].tolist(), strict=True))
        size = int(found.head_starts[i + 1] - found.head_starts[i])
        assert found.weights[whole][size:].sum() <= tail < found.weights[whole][size - 1 :].sum()
        for t in range(size):
            lists[found.ranks[whole][t]].append((i, int(found.weights[whole][t])))
            assert found.after[found.head_starts[i] + t] == (
                found.list_starts[found.ranks[whole][t]] + len(lists[found.ranks[whole][t]])
            )
    flat = [entry for rows in lists for entry in rows]
    assert flat == list(zip(found.list_rows.tolist(), found.list_weights.tolist(), strict=True))
    assert found.list_starts.diff().tolist() == [len(rows) for rows in lists]


def test_memory_is_planned() -> None:
    """A million rows in one go on 80 GB, more passes on less, and an error that names the operation."""
    assert plan_jaccard(10**6, 10**8, 80 * 2**30).rows_per_pass == plan_jaccard(10**6, 10**8).rows_per_pass
    assert plan_jaccard(10**6, 10**8).peak_bytes < 6 * 2**30
    free = 4 * 2**30
    plan = plan_jaccard(10**6, 10**8, free)
    assert plan.passes > plan_jaccard(10**6, 10**8).passes
    assert plan.peak_bytes <= 0.9 * free
    with pytest.raises(NotEnoughMemory, match="jaccard_pairs"):
        plan_jaccard(10**6, 10**8, 2**30)
