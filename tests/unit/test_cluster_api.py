"""What the clustering functions accept, refuse and promise."""

from __future__ import annotations

import doctest
import warnings

import numpy as np
import pytest
import torch

import dmx.cluster
from dmx.cluster import PseudoLabels, jaccard_distance, jaccard_graph, pseudo_labels
from dmx.cluster.reliability import disagreement, outliers_as_singletons, reliable, threshold_of


def people(seed: int = 0, n: int = 120, d: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.repeat(rng.standard_normal((n // 20, d)), 20, 0) + 0.4 * rng.standard_normal((n, d))).astype(
        np.float32
    )


def equal(a: PseudoLabels, b: PseudoLabels) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("labels", "tight", "base", "loose")
    )


def test_example_of_the_package() -> None:
    assert doctest.testmod(dmx.cluster).failed == 0


def test_what_comes_back() -> None:
    found = pseudo_labels(people())
    assert found.num_identities == 6
    assert found.labels.dtype == np.int64
    assert found.centroids.shape == (6, 32)
    assert found.centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    assert sorted(set(found.labels)) == list(range(6))
    with pytest.raises(AttributeError):
        found.labels = found.base  # type: ignore[misc]


def test_arrays_and_tensors_are_alike() -> None:
    x = people()
    want = pseudo_labels(x)
    for same in (torch.from_numpy(x), torch.from_numpy(x).requires_grad_(), np.asfortranarray(x),
                 x.astype(np.float64), torch.from_numpy(x).double(), np.repeat(x, 2, 1)[:, ::2]):  # fmt: skip
        assert equal(pseudo_labels(same), want)
    half = pseudo_labels(x.astype(np.float16))
    assert equal(pseudo_labels(torch.from_numpy(x).half()), half)
    brain = torch.from_numpy(x).bfloat16()
    assert equal(pseudo_labels(brain), pseudo_labels(brain.float()))


def test_read_only_arrays_are_taken_without_a_word() -> None:
    x = people()
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(pseudo_labels(x), pseudo_labels(x.copy()))


def test_big_endian_arrays_are_taken() -> None:
    assert equal(pseudo_labels(people().astype(">f4")), pseudo_labels(people()))


def test_input_is_left_alone() -> None:
    for dtype in (np.float32, np.float64):
        x = people().astype(dtype)
        before = x.copy()
        pseudo_labels(x)
        jaccard_distance(x)
        np.testing.assert_array_equal(x, before)


def test_torch_precision_settings_change_nothing() -> None:
    """Whatever a user allows float32 products to be rounded to."""
    x = np.random.default_rng(0).standard_normal((600, 40)).astype(np.float32)
    want = jaccard_graph(x, max_distance=0.9)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = jaccard_graph(x, max_distance=0.9)
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(found.indices, want.indices)
    np.testing.assert_array_equal(found.data, want.data)


@pytest.mark.parametrize(
    ("bad", "says"), [(np.nan, "row 17, which contains NaN"), (np.inf, "row 17, which contains infinity"),
                      (0.0, "row 17, which is zero")]
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_first_bad_row_is_named(bad: float, says: str, dtype: type) -> None:
    x = people().astype(dtype)
    x[17] = bad
    x[40] = 0
    for call in (pseudo_labels, jaccard_graph, jaccard_distance):
        with pytest.raises(ValueError, match=says):
            call(x)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (8,), (2, 3, 4)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features: wanted"):
        pseudo_labels(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    "features", [[[1.0, 2.0]], np.ones((3, 2), np.int64), torch.ones(3, 2, dtype=torch.int32), None]
)
def test_wrong_types(features: object) -> None:
    with pytest.raises(TypeError, match="features: wanted"):
        pseudo_labels(features)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("k1", 0, ValueError), ("k1", 2.5, TypeError), ("k2", 0, ValueError), ("k2", True, TypeError),
        ("eps", 0.0, ValueError), ("eps", 1.0, ValueError), ("eps", float("nan"), ValueError),
        ("eps_gap", -0.1, ValueError), ("eps_gap", 0.6, ValueError), ("eps_gap", float("nan"), ValueError),
        ("min_samples", 0, ValueError), ("min_cluster_size", 0, ValueError),
        ("independence_threshold", float("nan"), ValueError), ("independence_threshold", -1.0, ValueError),
        ("device", "gpu", ValueError),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(name: str, value: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"{name}: wanted"):
        pseudo_labels(people(), **{name: value})  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        pseudo_labels(people(), device="cuda")
    assert equal(pseudo_labels(people(), device="auto"), pseudo_labels(people(), device="cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("d", [8, 256, 2048])
def test_gpu_gives_the_same(d: int) -> None:
    x = people(n=2000, d=d)
    x[500:700] = x[3]
    assert equal(pseudo_labels(x, device="cuda"), pseudo_labels(x, device="cpu"))


def test_threshold_travels_through_epochs() -> None:
    first = pseudo_labels(people(0))
    later = pseudo_labels(people(1), independence_threshold=first.independence_threshold)
    assert later.independence_threshold == first.independence_threshold
    nothing = pseudo_labels(np.random.default_rng(0).standard_normal((120, 400)), eps=0.05)
    assert nothing.independence_threshold is None
    assert nothing.num_identities == 0
    assert nothing.centroids.shape == (0, 400)
    assert (nothing.labels == -1).all()


def test_graph_holds_zeros_and_the_diagonal() -> None:
    x = np.concatenate([people(), people()[:10]])
    graph = jaccard_graph(x, 30, 6, 0.62)
    assert graph.shape == (130, 130)
    assert graph.nnz == (graph.tocoo().coords[0] >= 0).sum()
    rows, columns = graph.tocoo().coords
    stored = dict(zip(zip(rows.tolist(), columns.tolist(), strict=True), graph.data.tolist(), strict=True))
    assert all(stored[i, i] == 0 for i in range(130))
    assert all(stored[j, i] == d for (i, j), d in stored.items())
    assert max(stored.values()) <= 0.62
    with pytest.raises(ValueError, match="max_distance: wanted"):
        jaccard_graph(x, 30, 6, 1.5)


def test_dense_distances() -> None:
    x = people()
    d = jaccard_distance(torch.from_numpy(x))
    assert d.dtype == np.float32
    assert (d == d.T).all()
    assert (np.diag(d) == 0).all()
    graph = jaccard_graph(x, 30, 6, 0.62).tocoo()
    np.testing.assert_allclose(d[graph.coords], graph.data, atol=1e-7)
    assert (d <= 0.62).sum() == graph.nnz


def test_reliability_by_hand() -> None:
    base = np.array([0, 0, 0, 0, 0, 1, 1, 1, -1, -1])
    tight = np.array([0, 0, 0, 0, -1, 1, 1, 1, -1, -1])
    loose = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, -1])
    assert outliers_as_singletons(base).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 3]
    apart = disagreement(outliers_as_singletons(base), outliers_as_singletons(tight))
    assert apart.tolist() == [1 - 4 / 5] * 4 + [1 - 1 / 5] + [0.0] * 5
    # Independence: 0 for cluster 0, 1/4 for cluster 1; rank round(1.8) = 2 is capped at 1.
    found = reliable(tight, base, loose, 3, None)
    assert found.independence_threshold == 1 - 3 / 4
    assert found.labels.tolist() == [0, 0, 0, 0, -1, 1, 1, 1, -1, -1]
    assert reliable(tight, base, loose, 4, None).labels.tolist() == [0, 0, 0, 0, -1, -1, -1, -1, -1, -1]
    assert reliable(tight, base, loose, 3, 0.0).labels.tolist() == [0, 0, 0, 0, -1, -1, -1, -1, -1, -1]


def test_threshold_is_at_rank_nine_tenths() -> None:
    values = np.arange(12) / 12
    sizes = np.array([1, 1, *[2] * 10])
    assert threshold_of(values, sizes) == 11 / 12  # rank 9 of the 10 that count
    assert threshold_of(values[:7], sizes[:7]) == 6 / 12  # round(4.5) = 4, to even
    assert threshold_of(values[:2], sizes[:2]) is None
