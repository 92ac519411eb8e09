"""Sparse re-ranking against the dense formulation of the paper, in float64."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from dmx.evaluation import Embedded, evaluate
from dmx.evaluation.rerank import reranked_blocks

# Inputs, V and the result are float32: relative roundings of 6e-8 on squared distances up to 4, on weights
# and on their sums; the measured maximum is below 1e-6.
TOLERANCE = 3e-6


def dense_rerank(query: NDArray, gallery: NDArray, k1: int, k2: int, lambda_: float) -> NDArray[np.float64]:
    """The published way: everything N x N. A row's own image comes first, other ties by index."""
    x = np.concatenate((query, gallery)).astype(np.float64)
    N, Q = len(x), len(query)
    d = np.square(x[:, None] - x[None]).sum(2)
    d /= d.max(axis=1, keepdims=True).clip(min=1e-300)
    rank = np.argsort(np.where(np.eye(N, dtype=bool), -1.0, d), axis=1, kind="stable")

    def reciprocal(i: int, k: int) -> list[int]:
        return [j for j in rank[i, : k + 1] if i in rank[j, : k + 1]]

    V = np.zeros((N, N))
    for i in range(N):
        members = set(reciprocal(i, k1))
        base = frozenset(members)
        for j in base:
            H = reciprocal(j, int(np.around(k1 / 2)))
            if len(base.intersection(H)) > 2 / 3 * len(H):
                members |= set(H)
        e = sorted(members)
        V[i, e] = np.exp(-d[i, e]) / np.exp(-d[i, e]).sum()
    if k2 > 1:
        V = np.stack([V[rank[i, :k2]].mean(axis=0) for i in range(N)])
    s = np.minimum(V[:Q, None], V[None, Q:]).sum(axis=2)
    return (1 - lambda_) * (1 - s / (2 - s)) + lambda_ * d[:Q, Q:]


def features(seed: int, identities: int, each: int, D: int = 24, noise: float = 0.6) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.standard_normal((identities, D)), each, axis=0)
    x = x + noise * rng.standard_normal(x.shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def rerank(query: NDArray, gallery: NDArray, k1: int, k2: int, lambda_: float, block_bytes: int) -> NDArray:
    blocks = reranked_blocks(query, gallery, k1, k2, lambda_, block_bytes)
    return np.concatenate([block.copy() for _, block in blocks])


@pytest.mark.parametrize(
    ("k1", "k2", "lambda_"),
    [(20, 6, 0.3), (7, 3, 0.1), (1, 1, 0.0), (20, 1, 0.5), (30, 12, 1.0), (3, 9, 0.3)],
)
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_equals_the_dense_formulation(k1: int, k2: int, lambda_: float, noise: float) -> None:
    x = np.random.default_rng(1).permutation(features(0, 20, 12, noise=noise))
    query, gallery = x[:70], x[70:]
    expected = dense_rerank(query, gallery, k1, k2, lambda_)
    found = rerank(query, gallery, k1, k2, lambda_, 4 * 240 * 33)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_features_of_any_length_are_ranked_by_distance() -> None:
    rng = np.random.default_rng(4)
    query, gallery = features(4, 6, 3), features(5, 12, 5)
    query *= rng.uniform(0.5, 2, (len(query), 1)).astype(np.float32)
    gallery *= rng.uniform(0.5, 2, (len(gallery), 1)).astype(np.float32)
    want = dense_rerank(query, gallery, 20, 6, 0.3)
    np.testing.assert_allclose(rerank(query, gallery, 20, 6, 0.3, 2**20), want, atol=TOLERANCE)


def test_blocks_do_not_matter() -> None:
    x = features(3, 10, 8)
    whole = rerank(x[:30], x[30:], 20, 6, 0.3, 10**9)
    single = rerank(x[:30], x[30:], 20, 6, 0.3, 1)
    np.testing.assert_allclose(single, whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("N", [2, 3, 9])
def test_fewer_images_than_neighbours(N: int) -> None:
    x = features(5, N, 1)
    np.testing.assert_allclose(
        rerank(x[:1], x[1:], 20, 6, 0.3, 10**6),
        dense_rerank(x[:1], x[1:], 20, 6, 0.3),
        atol=TOLERANCE,
        rtol=0,
    )


def test_duplicates_come_out_as_in_the_dense_formulation() -> None:
    """Coordinates are small integers: every distance is exact, so that duplicates tie exactly."""
    x = np.random.default_rng(7).integers(-2, 3, (40, 3)).astype(np.float32)
    x = np.concatenate((x, x[:25], x[:10]))
    np.testing.assert_allclose(
        rerank(x[20:50], x, 6, 3, 0.3, 3000), dense_rerank(x[20:50], x, 6, 3, 0.3), atol=TOLERANCE, rtol=0
    )


def test_coinciding_images_have_finite_distances() -> None:
    x = np.ones((6, 4), np.float32)
    assert np.isfinite(rerank(x[:2], x[2:], 3, 2, 0.3, 10**6)).all()


def test_reranking_helps_where_neighbours_agree() -> None:
    """Elongated identities: one's far end is closer to others than to itself, but chained by neighbours."""
    rng = np.random.default_rng(2)
    n = 30
    t = np.tile(np.linspace(0, 3, n), 8)
    identities = np.repeat(np.arange(8), n)
    x = np.stack((t, identities * 0.9 + 0.02 * rng.standard_normal(8 * n)), axis=1).astype(np.float32)
    query = Embedded(x[::5], identities[::5], np.zeros(len(x[::5])))
    gallery = Embedded(x, identities, np.ones(len(x)))
    plain, reranked = evaluate(query, gallery), evaluate(query, gallery, rerank=True)
    assert reranked.map > plain.map + 0.02


SPARSE_SIZE = """
import pathlib, re
import numpy as np
from dmx.evaluation import Embedded, evaluate
rng = np.random.default_rng(0)
Q, G, D, ids = 2_000, 14_000, 32, 700
centres = rng.standard_normal((ids, D), dtype=np.float32)
def split(n):
    identities = rng.integers(0, ids, n)
    x = centres[identities] + 0.7 * rng.standard_normal((n, D), dtype=np.float32)
    return Embedded(x / np.linalg.norm(x, axis=1, keepdims=True), identities, rng.integers(0, 6, n))
query, gallery = split(Q), split(G)
def few(s):
    return Embedded(s.features[:200], s.identities[:200], s.cameras[:200])
evaluate(few(query), few(gallery), rerank=True)  # compile
def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = peak_kib()
metrics = evaluate(query, gallery, rerank=True, block_bytes=32 * 2**20)
print(metrics.valid_queries, (peak_kib() - before) * 1024)
"""


def test_memory_is_a_block_and_the_neighbours() -> None:
    """16,000 images: dense matrices would be 1 GB each; a block of 32 MiB and sparse rows are far below."""
    done = subprocess.run(
        [sys.executable, "-c", SPARSE_SIZE], check=True, capture_output=True, text=True, timeout=300
    )
    valid, added = (int(v) for v in done.stdout.split())
    assert valid == 2_000
    print(f"added {added / 2**20:.0f} MiB")
    assert added < 200 * 2**20
