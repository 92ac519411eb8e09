"""Pseudo-labels against a dense float64 oracle written from the method's text, not from the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from dmx.cluster import jaccard_distance, jaccard_graph, pseudo_labels


@dataclass
class Oracle:
    labels: np.ndarray
    three: list[np.ndarray]
    threshold: float | None
    distances: np.ndarray


def oracle_similarities(x: np.ndarray) -> np.ndarray:
    """Cosines on the grid of 2^-44; rows that are equal bit by bit share one row's values."""
    x = x.astype(np.float64)
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(x)))}
    same = [first[row.tobytes()] for row in x]
    x = np.ldexp(x, -np.frexp(np.abs(x).max(1))[1][:, None])  # huge and tiny rows; no angle changes
    squares = (x * x).sum(1)
    s = (x @ x.T) / np.sqrt(np.outer(squares, squares))
    return np.round(s[same][:, same] * 2**44) / 2**44


def oracle_distances(x: np.ndarray, k1: int, k2: int) -> np.ndarray:
    n, s = len(x), oracle_similarities(x)
    ranks = [[i, *sorted((j for j in range(n) if j != i), key=lambda j: (-s[i, j], j))] for i in range(n)]
    full = [set(r[:k1]) for r in ranks]
    half = [set(r[: min(int(np.round(k1 / 2)) + 1, k1)]) for r in ranks]
    R = [{j for j in full[i] if i in full[j]} for i in range(n)]
    H = [{j for j in half[i] if i in half[j]} for i in range(n)]
    V = np.zeros((n, n))
    for i in range(n):
        members = set(R[i])
        for j in R[i]:
            if len(H[j] & R[i]) * 3 > 2 * len(H[j]):
                members |= H[j]
        columns = np.array(sorted(members))
        V[i, columns] = np.exp(-(2 - 2 * s[i, columns]))
        V[i] /= V[i].sum()
    V = np.array([V[r[: min(k1, k2)]].mean(0) for r in ranks])
    m = np.array([np.minimum(V[i], V).sum(1) for i in range(n)])
    return np.abs(np.round(1 - m / (2 - m), 12))


def oracle_labels(
    x, k1=30, k2=6, eps=0.6, eps_gap=0.02, min_samples=4, min_cluster_size=5, independence_threshold=None
) -> Oracle:
    d = oracle_distances(x, k1, k2)
    n = len(x)
    three = [
        DBSCAN(eps=round(e, 12), min_samples=min_samples, metric="precomputed").fit(d).labels_
        for e in (eps - eps_gap, eps, eps + eps_gap)
    ]
    clusters = []
    for labels in three:  # per image, the set of images that share its label
        clusters.append([set(np.flatnonzero(labels == c)) if c >= 0 else {i} for i, c in enumerate(labels)])
    tight, base, loose = clusters
    comp = [1 - len(base[i] & tight[i]) / len(base[i] | tight[i]) for i in range(n)]
    indep = [1 - len(base[i] & loose[i]) / len(base[i] | loose[i]) for i in range(n)]
    cluster_comp = [min(comp[j] for j in base[i]) for i in range(n)]
    cluster_indep = [min(indep[j] for j in base[i]) for i in range(n)]
    ranked = sorted(cluster_indep[i] for i in range(n) if len(base[i]) > 1 and min(base[i]) == i)
    threshold = independence_threshold
    if threshold is None and ranked:
        threshold = ranked[min(round(0.9 * len(ranked)), len(ranked) - 1)]
    out = np.full(n, -1)
    if threshold is not None:
        keep = [cluster_indep[i] <= threshold and comp[i] <= cluster_comp[i] for i in range(n)]
        order = sorted({(three[1][i] if three[1][i] >= 0 else n + i, min(base[i])) for i in range(n)})
        number = 0
        for _, lead in order:
            members = [i for i in base[lead] if keep[i]]
            if len(members) >= min_cluster_size:
                out[members] = number
                number += 1
    return Oracle(out, three, threshold, d)


def check(x: np.ndarray, **options) -> Oracle:
    """Everything `pseudo_labels` returns, on one and on two threads."""
    want = oracle_labels(x, **options)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got = pseudo_labels(x, device="cpu", **options)
        finally:
            torch.set_num_threads(before)
        for name, labels in zip(("tight", "base", "loose"), want.three, strict=True):
            np.testing.assert_array_equal(getattr(got, name), labels, err_msg=name)
        assert got.independence_threshold == want.threshold
        np.testing.assert_array_equal(got.labels, want.labels)
        assert got.num_identities == want.labels.max(initial=-1) + 1
    unit = x.astype(np.float64)
    unit = np.ldexp(unit, -np.frexp(np.abs(unit).max(1))[1][:, None])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for c, centroid in enumerate(got.centroids):
        mean = unit[want.labels == c].mean(0)
        if np.linalg.norm(mean) > 1e-6:
            np.testing.assert_allclose(centroid, mean / np.linalg.norm(mean), atol=1e-6)
    return want


def people(n: int, d: int, per: int, noise: float, seed: int = 0, dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((-(-n // per), d))
    x = np.repeat(centres, per, 0)[:n] + noise * rng.standard_normal((n, d))
    return x[rng.permutation(n)].astype(dtype)


@pytest.mark.parametrize(("d", "noise"), [(2, 0.1), (3, 0.1), (16, 0.5), (64, 0.9), (256, 1.3), (300, 1.0)])
@pytest.mark.parametrize("per", [5, 16, 40])
def test_clustered(d: int, noise: float, per: int) -> None:
    want = check(people(400, d, per, noise, seed=d + per))
    if d > 3 and noise < 1 and per > 5:
        assert want.labels.max() > 3  # the case is about something


@pytest.mark.parametrize("d", [1, 2, 3, 17, 128, 512])
def test_random(d: int) -> None:
    check(np.random.default_rng(d).standard_normal((300, d)).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("d", [5, 200])
def test_types(dtype: type, d: int) -> None:
    check(people(200, d, 10, 0.5, dtype=dtype))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 15, 16, 17, 29, 30, 31, 32])
def test_fewer_images_than_neighbours(n: int) -> None:
    check(people(n, 8, 8, 0.4, seed=n))


@pytest.mark.parametrize("copies", [2, 3, 31, 64])
@pytest.mark.parametrize("d", [4, 160])
def test_duplicates(copies: int, d: int) -> None:
    rng = np.random.default_rng(copies)
    x = np.repeat(people(240 // copies + 3, d, 4, 0.5, seed=copies), copies, 0)
    check(x[rng.permutation(len(x))])


@pytest.mark.parametrize("n", [1, 4, 5, 30, 31, 200])
@pytest.mark.parametrize("d", [1, 3, 130])
def test_all_equal(n: int, d: int) -> None:
    want = check(np.full((n, d), 0.3, np.float32))
    if n == 5:
        assert (want.labels == 0).all()


def test_all_outliers() -> None:
    want = check(np.random.default_rng(0).standard_normal((120, 400)).astype(np.float32), eps=0.05)
    assert (want.labels == -1).all()
    assert want.threshold is None
    check(np.eye(50, dtype=np.float32))


def test_more_near_copies_than_candidates_fit() -> None:
    """Hundreds of rows closer to each other than the cheap product can tell apart: done in full."""
    rng = np.random.default_rng(1)
    x = np.concatenate([
        rng.standard_normal(200) + 1e-5 * rng.standard_normal((400, 200)),
        rng.standard_normal((60, 200)),
    ])  # fmt: skip
    check(x.astype(np.float32))


def test_collapsed_features() -> None:
    """All rows within a narrow cone, as a network that learnt nothing gives them."""
    x = people(400, 256, 16, 1.0) * 1e-3 + 1
    check(x.astype(np.float32))
    check((people(300, 256, 16, 1.0) * 1e-5 + 1).astype(np.float32))


def test_hubs() -> None:
    """A few rows near everybody: they are in every list, and lists are hardly mutual."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((300, 150))
    x[:5] = x.mean(0) + 0.01 * rng.standard_normal((5, 150))
    check(x.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_odd_scales(dtype: type) -> None:
    x = people(200, 150, 10, 0.5, dtype=np.float64)
    exponents = np.random.default_rng(0).integers(-30, 30, (200, 1))
    if dtype == np.float64:
        exponents = exponents * 9  # 1e-270 to 1e270: squares would leave float64
    check((x * 10.0**exponents).astype(dtype))
    parallel = np.repeat(people(60, 6, 6, 0.3, dtype=np.float64), 4, 0)
    check((parallel * np.tile([1.0, 2, 3, 7], 60)[:, None]).astype(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"k1": 1}, {"k1": 2}, {"k1": 3, "k2": 1}, {"k1": 5, "k2": 9}, {"k1": 20, "k2": 6}, {"k2": 1},
        {"k1": 500}, {"min_samples": 1}, {"min_cluster_size": 1}, {"min_samples": 1, "min_cluster_size": 1},
        {"eps": 0.5, "eps_gap": 0.1}, {"eps_gap": 0.0}, {"independence_threshold": 0.0},
        {"independence_threshold": 0.3}, {"eps": 0.3, "min_cluster_size": 2},
    ],
)  # fmt: skip
def test_options(options: dict[str, float]) -> None:
    check(people(250, 32, 12, 0.8, seed=4), **options)


@pytest.mark.parametrize("seed", range(6))
def test_lattices_tie_everywhere(seed: int) -> None:
    """Small integers: many equal similarities, distances exactly at a radius, duplicates."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2 + seed % 3, (150, 2 + seed)).astype(np.float32)
    check(x[x.any(1)], eps=[0.6, 0.5, 0.4][seed % 3], eps_gap=0.1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_small_set(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40), "n")
    d = data.draw(st.integers(1, 6), "d")
    values = st.integers(-3, 3) if data.draw(st.booleans(), "whole") else st.floats(-1, 1, width=32)
    rows = data.draw(st.lists(st.lists(values, min_size=d, max_size=d), min_size=n, max_size=n), "rows")
    x = np.array(rows, np.float32)
    x = x[(np.abs(x) > 1e-6).any(1)]
    if len(x) == 0:
        return
    k1 = data.draw(st.integers(1, 12), "k1")
    k2 = data.draw(st.integers(1, 4), "k2")
    eps = data.draw(st.sampled_from([0.3, 0.5, 0.6, 2 / 3]), "eps")
    check(
        x, k1=k1, k2=k2, eps=eps, min_samples=data.draw(st.integers(1, 5), "min_samples"), min_cluster_size=2
    )


@pytest.mark.parametrize("max_distance", [0.0, 0.3, 0.62, 1.0])
def test_graph_and_dense_distances(max_distance: float) -> None:
    x = np.concatenate([people(150, 24, 10, 0.7), people(150, 24, 10, 0.7)[:20]])
    want = oracle_distances(x, 20, 6)
    graph = jaccard_graph(x, 20, 6, max_distance)
    wanted = want <= max_distance if max_distance < 1 else want < 1
    np.testing.assert_array_equal(np.diff(graph.indptr), wanted.sum(1))
    i, j = wanted.nonzero()
    np.testing.assert_array_equal(graph.indices, j)
    # Rounded to 12 decimals from sums in another order: the same but for a last decimal.
    np.testing.assert_allclose(graph.data, want[i, j], rtol=0, atol=1.1e-12)
    assert all(np.all(np.diff(graph.indices[a:b]) > 0) for a, b in pairwise(graph.indptr))
    dense = jaccard_distance(x, 20, 6)
    np.testing.assert_allclose(dense, want, rtol=0, atol=1e-7)
    labels = DBSCAN(eps=0.5, min_samples=4, metric="precomputed").fit(jaccard_graph(x, 20, 6, 0.62)).labels_
    np.testing.assert_array_equal(
        labels, DBSCAN(eps=0.5, min_samples=4, metric="precomputed").fit(want).labels_
    )
