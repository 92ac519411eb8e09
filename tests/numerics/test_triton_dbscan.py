"""DBSCAN's kernels against scikit-learn, against the reference and against the CPU's own version."""

from __future__ import annotations

from contextvars import Context

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN

from dmx.kernels import dbscan as op
from dmx.kernels.dbscan import dbscan, dbscan_reference, plan_dbscan
from dmx.kernels.memory import NotEnoughMemory
from dmx.kernels.sparse import SparseRows, starts_of


def close_pairs(distances: NDArray[np.float64], largest: float, device: torch.device) -> SparseRows:
    d = torch.from_numpy(distances)
    i, j = ((d <= largest) & torch.ones(d.shape, dtype=torch.bool).triu(1)).nonzero(as_tuple=True)
    starts = starts_of(torch.bincount(i, minlength=len(d)))
    return SparseRows(starts.to(device), j.int().to(device), d[i, j].to(device))


def dbscan_on_the_cpu(pairs: SparseRows, radii: tuple[float, ...], min_samples: int) -> torch.Tensor:
    """By numba: a context of its own knows of no interpreter."""
    parts = (part.cpu() for part in (pairs.starts, pairs.indices, pairs.values))
    return Context().run(dbscan, SparseRows(*parts), radii, min_samples)


def check(
    distances: NDArray[np.float64], radii: tuple[float, ...], min_samples: int, device: torch.device
) -> None:
    pairs = close_pairs(distances, max(radii), device)
    found = dbscan(pairs, radii, min_samples)
    assert (found.shape, found.dtype, found.device.type) == (
        (len(radii), len(distances)), torch.int64, device.type
    )  # fmt: skip
    np.testing.assert_array_equal(found.cpu(), dbscan_on_the_cpu(pairs, radii, min_samples))
    for eps, labels in zip(radii, found.cpu(), strict=True):
        want = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(distances).labels_
        np.testing.assert_array_equal(labels, want)
        np.testing.assert_array_equal(dbscan_reference(torch.from_numpy(distances), eps, min_samples), want)


def on_a_line(at: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.abs(at[:, None] - at).astype(float)


@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 6))
def test_numbers_as_scikit_learn(triton_device: torch.device, seed: int, n: int, min_samples: int) -> None:
    """Points on a line in random order: chains, borders between clusters, distances exactly at a radius."""
    at = np.random.default_rng(seed).integers(0, 3 * n, n)
    check(on_a_line(at), (1.0, 2.0, 3.0), min_samples, triton_device)


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129])
@pytest.mark.parametrize("min_samples", [1, 2, 3])
def test_one_long_chain(triton_device: torch.device, n: int, min_samples: int) -> None:
    """Numbered at random, so that the trees are deep and roots are hooked in every order."""
    check(on_a_line(np.random.default_rng(n).permutation(n)), (1.0,), min_samples, triton_device)


def test_a_hub_and_equal_rows(triton_device: torch.device) -> None:
    """The last row is close to all the others; 20 rows are at distance 0 of each other."""
    d = np.full((60, 60), 9.0)
    d[-1] = d[:, -1] = 1.0
    d[:20, :20] = 0.0
    np.fill_diagonal(d, 0)
    for min_samples in (1, 20, 21, 22, 60, 61):
        check(d, (0.5, 1.0), min_samples, triton_device)


def test_a_border_row_between_clusters(triton_device: torch.device) -> None:
    """It goes to the lower number, whichever side of the pair it stands on."""
    for between in range(7):
        at = np.insert(np.array([0, 1, 2, 6, 7, 8]), between, 4)
        check(on_a_line(at), (2.0,), 4, triton_device)


def test_radii_in_passes(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    n, radii = 50, (0.5, 1.0, 2.0, 3.0, 4.0)
    room = next(free for free in range(10**6) if passes(n, free) == 3)
    monkeypatch.setattr(op, "free_bytes", lambda device: room)
    check(on_a_line(np.random.default_rng(1).integers(0, 150, n)), radii, 3, triton_device)


def passes(n: int, free: int) -> int:
    """0 where the memory does not do."""
    try:
        return plan_dbscan(n, 1, 5, free).passes
    except NotEnoughMemory:
        return 0


def test_memory_does_not_grow_with_the_pairs() -> None:
    assert plan_dbscan(10**6, 10**6, 3) == plan_dbscan(10**6, 10**12, 3)
    assert plan_dbscan(10**8, 10**10, 3, 80 * 2**30).passes == 1
    with pytest.raises(NotEnoughMemory, match="dbscan"):
        plan_dbscan(10**6, 10**6, 3, 10**6)


@pytest.mark.gpu
def test_chains_and_random_graphs_on_a_gpu(triton_device: torch.device) -> None:
    """Programs that hook, halve and flatten the same long paths at once: many chances to undo one another."""
    if triton_device.type != "cuda":
        pytest.skip("this process interprets: the GPU tests run in one of their own, see test_gpu.py")
    n = 1_000_000
    for seed in range(20):
        rng = np.random.default_rng(seed)
        order = rng.permutation(n) if seed % 2 else np.arange(n)
        edges = np.stack([order[:-1], order[1:]]) if seed % 4 < 2 else rng.integers(0, n, (2, n))
        i, j = np.unique(np.sort(edges, 0)[:, edges[0] != edges[1]], axis=1)
        starts = starts_of(torch.from_numpy(np.bincount(i, minlength=n)))
        distances = torch.from_numpy(rng.choice([0.5, 0.6, 0.7], len(j)))
        pairs = SparseRows(starts, torch.from_numpy(j.astype(np.int32)), distances)
        there = SparseRows(*(part.to(triton_device) for part in (pairs.starts, pairs.indices, pairs.values)))
        want = dbscan_on_the_cpu(pairs, (0.55, 0.65, 0.75), 2)
        np.testing.assert_array_equal(dbscan(there, (0.55, 0.65, 0.75), 2).cpu(), want)
