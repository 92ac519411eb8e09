"""k-reciprocal encoding's kernels against the formula in sets, the reference and the CPU's version."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dmx.kernels import expansion
from dmx.kernels import k_reciprocal as op
from dmx.kernels.cpu import k_reciprocal as cpu
from dmx.kernels.cpu.knn import Neighbours as CpuNeighbours
from dmx.kernels.cpu.knn import self_knn
from dmx.kernels.device import as_array
from dmx.kernels.k_reciprocal import half_columns, k_reciprocal, k_reciprocal_reference, plan_k_reciprocal
from dmx.kernels.knn import Neighbours
from dmx.kernels.memory import NotEnoughMemory
from dmx.kernels.similarity import similarity_reference, squared_lengths
from dmx.kernels.sparse import SparseRows

# The oracle does not round s to its grid: 2^-45 and D 2^-53 in s are twice that in a weight and in its row's
# sum; D <= 2048 in the tests.
ORACLE_RTOL = 8 * (2.0**-45 + 2048 * 2.0**-53)
# A sum in another order may put s on the next step of the grid, 2^-44, where it is not looked up.
REFERENCE_RTOL = 8 * 2.0**-44

slow_draws = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def people(n: int, d: int, seed: int, each: int = 10) -> torch.Tensor:
    """Clusters of `each` rows; the lists of 30 reach over several of them."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((-(-n // each), d)), each, 0)[:n]
    return torch.from_numpy((centres + 0.8 * rng.standard_normal((n, d))).astype(np.float32))


def neighbours_of(features: torch.Tensor, k: int) -> Neighbours:
    found = self_knn(as_array(features), k)
    return Neighbours(torch.from_numpy(found.indices), torch.from_numpy(found.similarities))


def with_lists(features: torch.Tensor, lists: NDArray[np.int64]) -> Neighbours:
    """Any lists of distinct rows, itself first, whether they are the nearest or not."""
    indices = torch.from_numpy(np.ascontiguousarray(lists))
    similarities = similarity_reference(features, features).gather(1, indices)
    return Neighbours(indices.to(torch.int32), similarities)


def oracle(features: torch.Tensor, lists: NDArray[np.int32], k1: int, k2: int) -> NDArray[np.float64]:
    """The formula in sets, weights and means summed exactly, similarities from unit rows."""
    x = features.double().numpy()
    unit = x / np.sqrt((x * x).sum(1, keepdims=True))
    knn = [row.tolist() for row in lists]
    half = half_columns(k1)
    R = [{j for j in knn[i] if i in knn[j]} for i in range(len(x))]
    H = [{j for j in knn[i][:half] if i in knn[j][:half]} for i in range(len(x))]
    v = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        accepted = [H[j] for j in R[i] if 3 * len(H[j] & R[i]) > 2 * len(H[j])]
        columns = sorted(R[i].union(*accepted))
        weights = np.exp(2 * unit[columns] @ unit[i] - 2)
        v[i, columns] = weights / math.fsum(weights)
    near = min(k2, len(knn[0]))
    return np.array([[math.fsum(v[row[:near], e]) / near for e in range(len(x))] for row in knn])


def dense(rows: SparseRows) -> NDArray[np.float64]:
    out = np.zeros((len(rows), len(rows)))
    out[rows.rows.cpu(), rows.indices.cpu().long()] = rows.values.cpu()
    return out


def encode(features: torch.Tensor, near: Neighbours, k1: int, k2: int, device: torch.device) -> SparseRows:
    there = features.to(device)
    return k_reciprocal(there, Neighbours(near.indices.to(device), near.similarities.to(device)), k1, k2)


def check(features: torch.Tensor, near: Neighbours, k1: int, k2: int, device: torch.device) -> SparseRows:
    found = encode(features, near, k1, k2, device)
    assert (found.starts.dtype, found.indices.dtype) == (torch.int64, torch.int32)
    assert found.values.dtype == torch.float64
    assert found.values.device.type == device.type
    starts, columns = found.starts.cpu().numpy(), found.indices.cpu().numpy()
    for begin, end in pairwise(starts):
        assert (np.diff(columns[begin:end]) > 0).all(), "columns ascend"
    v = dense(found)
    np.testing.assert_allclose(v.sum(1), 1, rtol=0, atol=1e-13)
    exact = oracle(features, near.indices.numpy(), k1, k2)
    np.testing.assert_array_equal(v > 0, exact > 0)
    np.testing.assert_allclose(v, exact, rtol=ORACLE_RTOL, atol=0)
    want = k_reciprocal_reference(features, near.indices, k1, k2)
    np.testing.assert_allclose(v, want, rtol=REFERENCE_RTOL, atol=0)
    numpy_near = CpuNeighbours(near.indices.numpy(), near.similarities.numpy())
    squares = squared_lengths(features).numpy()
    on_the_cpu = SparseRows.of(cpu.k_reciprocal(as_array(features), squares, numpy_near, k1, k2))
    np.testing.assert_array_equal(starts, on_the_cpu.starts)
    np.testing.assert_allclose(v, dense(on_the_cpu), rtol=REFERENCE_RTOL, atol=0)
    return found


@pytest.mark.parametrize(
    ("n", "d", "k1", "k2"),
    [
        (1, 3, 30, 6),
        (2, 3, 30, 6),
        (30, 16, 30, 1),
        (31, 16, 30, 6),
        (45, 24, 20, 6),
        (65, 8, 64, 1),
        (35, 8, 33, 1),
        (40, 3, 1, 1),
        (40, 3, 2, 2),
        (40, 5, 3, 3),
        (40, 6, 7, 20),
        (20, 6, 9, 9),
        (9, 4, 64, 64),
        (14, 4, 13, 11),
    ],
)
def test_any_numbers(n: int, d: int, k1: int, k2: int, triton_device: torch.device) -> None:
    features = people(n, d, n + k1)
    check(features, neighbours_of(features, k1), k1, k2, triton_device)


@pytest.mark.parametrize("d", [1, 3, 127, 130, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_width_and_type(d: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    """Lists that are not the nearest rows, so that many members are no neighbours and s is computed."""
    features = people(16, d, d).to(dtype)
    shuffled = np.random.default_rng(d).permuted(np.tile(np.arange(16), (16, 1)), axis=1)
    lists = np.array([[i, *row[row != i][:11]] for i, row in enumerate(shuffled)])
    assert check(features, with_lists(features, lists), 12, 1, triton_device).starts[-1] > 60


def loaded_lists(k: int, shared: bool) -> NDArray[np.int64]:
    """Row 0 gets as much as it can: every j of its R brings H(j) with the most members that are not in R.

    Rows 1 to k - 1 stand in a ring and hold their nearest there. The others stand beside one ring row each,
    or, if `shared`, beside as many as their lists have room for.
    """
    half = half_columns(k)
    bring = (half - 1) // 3
    ring, reach = k - 1, (half - 1 - bring) // 2
    assert 2 * reach == half - 1 - bring
    n = k + (bring if shared else ring * bring)
    lists = [list(range(k))]
    for j in range(1, k):
        side = [1 + (j - 1 + step) % ring for r in range(1, reach + 1) for step in (r, -r)]
        outside = range(k, n) if shared else range(k + (j - 1) * bring, k + j * bring)
        lists.append([j, *side, *outside, 0])
    for e in range(k, n):
        lists.append([e, *range(1, half)] if shared else [e, 1 + (e - k) // bring])
    filled = [[*row, *(e for e in range(n) if e not in row)] for row in lists]
    return np.array([row[:k] for row in filled])


@pytest.mark.parametrize("k", [10, 30])
def test_as_many_members_as_there_is_room_for(k: int, triton_device: torch.device) -> None:
    lists = loaded_lists(k, shared=False)
    features = people(len(lists), 5, k)
    found = check(features, with_lists(features, lists), k, 1, triton_device)
    _, added, width = op._widths(k, k)
    assert int(found.starts[1]) == width - added // k  # the list of row 0 itself brings nothing


@pytest.mark.parametrize("k2", [1, 5])
def test_members_that_several_lists_bring(k2: int, triton_device: torch.device) -> None:
    lists = loaded_lists(16, shared=True)
    features = people(len(lists), 5, k2)
    check(features, with_lists(features, lists), 16, k2, triton_device)


def test_hubs(triton_device: torch.device) -> None:
    """Three rows that stand in nearly everybody's list: the middle of a cloud of many dimensions."""
    features = people(50, 64, 5, each=1) + 1
    features[::20] = features.mean(0) + 0.1 * features[::20]
    near = neighbours_of(features, 10)
    assert (torch.bincount(near.indices.flatten())[::20] >= 45).all()
    check(features, near, 10, 4, triton_device)


def test_duplicates_and_ties(triton_device: torch.device) -> None:
    """Copies fill whole lists, and directions on a lattice are equally far; rows repeated are equal."""
    rng = np.random.default_rng(3)
    features = torch.from_numpy(rng.integers(1, 3, (50, 3)).astype(np.float32))
    features[20:35] = features[7]
    found = check(features, neighbours_of(features, 12), 12, 3, triton_device)
    assert len(found) == 50


@slow_draws
@given(st.data())
def test_any_lists(triton_device: torch.device, data: st.DataObject) -> None:
    """Lists without geometry, over few rows, so that anything is mutual with anything."""
    n = data.draw(st.integers(1, 20), "n")
    k1 = data.draw(st.integers(1, 16), "k1")
    k2 = data.draw(st.integers(1, 16), "k2")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    groups = rng.integers(0, data.draw(st.integers(1, 4), "groups"), n)
    noise = data.draw(st.sampled_from([0.0, 0.3, 1.0, 3.0]), "noise")
    far = (groups[:, None] != groups) + noise * rng.random((n, n))
    np.fill_diagonal(far, -1)
    lists = np.argsort(far, axis=1, kind="stable")[:, :k1]
    features = torch.from_numpy(rng.standard_normal((n, data.draw(st.integers(1, 9), "d"))))
    check(features, with_lists(features, lists), k1, k2, triton_device)


def test_passes_change_nothing(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    features = people(33, 8, 1)
    near = neighbours_of(features, 10)
    for k2 in (1, 4):
        whole = encode(features, near, 10, k2, triton_device)
        plan = plan_k_reciprocal(33, 10, k2)
        room = int((plan.fixed_bytes + plan.pass_bytes // 2) / 0.9)
        monkeypatch.setattr(op, "free_bytes", lambda device, room=room: room)
        assert plan_k_reciprocal(33, 10, k2, room).passes > 1
        parts = encode(features, near, 10, k2, triton_device)
        monkeypatch.undo()
        for one, other in zip(vars(whole).values(), vars(parts).values(), strict=True):
            assert torch.equal(one, other)


def test_expansion_in_passes_is_planned_with_what_was_counted(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = people(33, 8, 1)
    near = neighbours_of(features, 10)
    whole = encode(features, near, 10, 4, triton_device)
    asked: list[int] = []
    entries, longest = int(whole.starts[-1]), int(whole.starts.diff().max())
    needed = 8 * 33 + 12 * entries + 16 * (8 + 12 * longest)  # results and the smallest pass

    def free(room: int) -> None:
        asked.clear()

        def counted(device: torch.device) -> int:
            asked.append(room)
            return room

        monkeypatch.setattr(expansion, "free_bytes", counted)

    free(int(needed / 0.9) + 2)
    parts = encode(features, near, 10, 4, triton_device)
    assert torch.equal(parts.values, whole.values)
    free(int(needed / 0.9) - 100)
    with pytest.raises(NotEnoughMemory, match=r"k_reciprocal: wanted .* GiB .*16 of 33 rows"):
        encode(features, near, 10, 4, triton_device)


def test_plan_is_arithmetic() -> None:
    for n, k1, k2 in ((1, 30, 6), (32_621, 30, 6), (4_180_000, 20, 1), (100_000_000, 64, 64)):
        wanted = plan_k_reciprocal(n, k1, k2)
        assert wanted.passes * wanted.rows_per_pass >= n
        room = int(wanted.fixed_bytes / 0.9) + 10_000_000
        fitted = plan_k_reciprocal(n, k1, k2, room)
        assert fitted.peak_bytes <= room
        assert fitted.passes >= wanted.passes
        with pytest.raises(NotEnoughMemory, match="k_reciprocal"):
            plan_k_reciprocal(n, k1, k2, int(0.5 * wanted.fixed_bytes))
    # A million rows at the usual lengths: results of 2 GB at most, beside 0.7 GB of scratch.
    usual = plan_k_reciprocal(10**6, 30, 6)
    assert usual.fixed_bytes < 2.2e9
    assert usual.pass_bytes < 0.8e9


def test_lists_longer_than_a_mask(triton_device: torch.device) -> None:
    features = people(70, 8, 2)
    near = neighbours_of(features, 65)
    with pytest.raises(ValueError, match="wanted k1 <= 64, found 65"):
        encode(features, near, 65, 6, triton_device)


def test_the_cpu_takes_lists_of_any_length() -> None:
    features = people(70, 8, 2)
    near = neighbours_of(features, 65)
    found = encode(features, near, 65, 6, torch.device("cpu"))
    want = k_reciprocal_reference(features, near.indices, 65, 6)
    np.testing.assert_allclose(dense(found), want, rtol=REFERENCE_RTOL, atol=0)


@pytest.mark.parametrize(
    ("k1", "half"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (20, 11), (29, 15), (30, 16), (31, 17), (64, 33)]
)
def test_half_lists(k1: int, half: int) -> None:
    assert half_columns(k1) == half
