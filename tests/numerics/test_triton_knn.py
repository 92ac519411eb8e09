"""The neighbour kernels: in Triton's interpreter, or on a GPU where this process compiles."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmx.kernels import candidates, exact
from dmx.kernels import knn as module
from dmx.kernels.candidates import Scan, ScanConfig, base_errors, keys_reference
from dmx.kernels.cpu import knn as cpu
from dmx.kernels.distinct import distinct, first_equal_reference, row_hashes
from dmx.kernels.knn import knn, plan_knn, self_knn, self_knn_reference
from dmx.kernels.memory import NotEnoughMemory
from dmx.kernels.rescore import Side
from dmx.kernels.similarity import GRID, similarity_reference, squared_lengths
from dmx.kernels.unit_rows import mean_of_units, unit_rows, unit_rows_reference

SMALL = ScanConfig(rows=32, columns=32, depth=64, piece=16, group=2, warps=4, stages=2)


@pytest.fixture
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Small blocks, so that few rows make many of them."""
    monkeypatch.setattr(candidates, "BLOCK", 32)
    monkeypatch.setattr(candidates, "_scan_config", SMALL)
    return triton_device


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32))


def oracle(queries: np.ndarray, x: np.ndarray, k: int, own: bool) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours by the definition: float64 cosines on the grid, sorted by (-s, index), in plain Python."""
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(x)))}
    q, y = queries.astype(np.float64), x.astype(np.float64)
    s = (q @ y.T) / np.sqrt(np.outer((q * q).sum(1), (y * y).sum(1)))
    s = np.round(s * 2**44) / 2**44
    if own:
        s = s[[first[row.tobytes()] for row in queries]]
    s = s[:, [first[row.tobytes()] for row in x]]
    order = [
        sorted(range(len(x)), key=lambda j, i=i: (not (own and i == j), -s[i, j], j))[:k]
        for i in range(len(queries))
    ]
    values = np.take_along_axis(s, np.array(order), 1)
    if own:
        values[:, 0] = 1
    return np.array(order), values


def check_self(x: torch.Tensor, k: int, device: torch.device) -> None:
    found = self_knn(x.to(device), k)
    want, values = oracle(x.double().numpy(), x.double().numpy(), k, own=True)
    assert found.indices.dtype == torch.int32
    assert found.similarities.dtype == torch.float64
    np.testing.assert_array_equal(found.indices.cpu().numpy(), want)
    # Two multiples of 2^-44 that a different order of summation may put one step apart.
    np.testing.assert_allclose(found.similarities.cpu().numpy(), values, rtol=0, atol=2.0**-44)


@pytest.mark.parametrize(
    ("n", "d", "k"),
    [(1, 3, 5), (2, 1, 2), (5, 3, 1), (30, 130, 30), (31, 127, 30), (33, 3, 5), (70, 2048, 7), (97, 130, 30),
     (160, 5, 4), (66, 40, 64)],
)  # fmt: skip
def test_self_join_equals_the_oracle(n: int, d: int, k: int, device: torch.device) -> None:
    x = rows(n, d, n)
    check_self(x, k, device)
    want = self_knn_reference(x, k)
    np.testing.assert_array_equal(self_knn(x.to(device), k).indices.cpu(), want.indices)


def test_tiles_as_they_run(triton_device: torch.device) -> None:
    """Full tiles of 128 x 128 in blocks of 256: two blocks, half a ring apart."""
    check_self(rows(290, 70), 30, triton_device)


@pytest.mark.parametrize("blocks", range(1, 8))
def test_every_pair_meets_once(blocks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of any length; without limits every buffer holds everybody else exactly once."""
    n = 32 * blocks - 5
    x = rows(n, 8).to(device)
    squares = squared_lengths(x)
    mean = mean_of_units(x, squares)
    low = unit_rows(x, squares, torch.arange(n, dtype=torch.int32, device=device), mean, 32)
    monkeypatch.setattr(Scan, "_tighten", lambda self: None)
    found = Scan(low, low, mean, 30, own=True).ring()
    for i in range(n):
        held = (found.packed[i, : found.counts[i]] & 0xFFFFFFFF).tolist()
        assert sorted(held) == [j for j in range(n) if j != i]


def test_candidates_hold_all_neighbours_and_few_others(device: torch.device) -> None:
    x = rows(150, 90).to(device)
    squares = squared_lengths(x)
    mean = mean_of_units(x, squares)
    low = unit_rows(x, squares, torch.arange(150, dtype=torch.int32, device=device), mean, 32)
    want = self_knn_reference(x.cpu(), 11).indices[:, 1:]
    for found in (Scan(low, low, mean, 10, own=True).ring(), Scan(low, low, mean, 10, own=True)(0, 150)):
        for i in range(150):
            assert set(want[i].tolist()) <= set((found.packed[i, : found.counts[i]] & 0xFFFFFFFF).tolist())
        assert found.counts[:150].float().mean() < 30


@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_keys_stay_within_the_bound(shift: float, device: torch.device) -> None:
    """|computed - exact| <= base + r |computed|, with room that is not absurd."""
    x = (rows(60, 200) + shift).to(device)
    squares = squared_lengths(x)
    mean = mean_of_units(x, squares)
    low = unit_rows(x, squares, torch.arange(60, dtype=torch.int32, device=device), mean, 32)
    product = (low.low.float() @ low.low.float().T)[:60, :60] + low.offset[:60]
    unit = unit_rows_reference(x, mean) + mean.double()
    error = (product.double() - keys_reference(unit, unit, mean.double())).abs()
    bound = base_errors(low, low)[:, None] + 2.0**-24 * product.abs()
    assert bool((error <= bound).all())
    assert bound.max() < 100 * error.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_compared_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    check_self(rows(75, 33).to(dtype), 10, device)


@pytest.mark.parametrize(
    ("q", "n", "d", "k"), [(1, 1, 3, 4), (40, 130, 20, 10), (70, 33, 64, 64), (3, 66, 1, 5)]
)
def test_queries_equal_the_oracle(q: int, n: int, d: int, k: int, device: torch.device) -> None:
    queries, x = rows(q, d, 1), rows(n, d, 2)
    x[n // 2 : n // 2 + 9] = x[0]
    found = knn(queries.to(device), x.to(device), k)
    want, values = oracle(queries.numpy(), x.numpy(), k, own=False)
    np.testing.assert_array_equal(found.indices.cpu(), want)
    np.testing.assert_allclose(found.similarities.cpu(), values, rtol=0, atol=2.0**-44)


@settings(max_examples=12, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), d=st.sampled_from([1, 2, 3, 8]),
       k=st.integers(1, 12))  # fmt: skip
def test_lattices_tie_by_index(seed: int, n: int, d: int, k: int, device: torch.device) -> None:
    """Whole numbers: equal rows, parallel rows, and similarities that tie by construction."""
    x = np.random.default_rng(seed).integers(-2, 3, (n, d)).astype(np.float32)
    x[(x == 0).all(1), 0] = 1
    check_self(torch.from_numpy(x), k, device)


@pytest.mark.parametrize(("scale", "dtype"), [(1e70, "float64"), (1e-70, "float64"), (1e-39, "float32")])
def test_rows_of_any_length(scale: float, dtype: str, device: torch.device) -> None:
    x = rows(50, 12).double() * scale * (1 + torch.arange(50)[:, None])
    check_self(x.to(getattr(torch, dtype)), 5, device)


def test_copies_and_hubs(device: torch.device) -> None:
    x = rows(110, 20)
    x[5:60:2] = x[3]  # 28 copies
    x[70:] = x[70] + 0.2 * x[70:]  # a hub with forty around it
    check_self(x, 12, device)


def test_rows_that_overflow_are_compared_with_everybody(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near copies that float16 cannot tell apart: hundreds within the error of the tenth."""
    x = torch.cat([rows(1, 50) + 1e-4 * rows(290, 50, 1), rows(9, 50, 2)])
    sought = []
    search = exact.search
    monkeypatch.setattr(exact, "search", lambda *given: (sought.append(len(given[2])), search(*given))[1])
    found = self_knn(x.to(device), 10)
    assert sum(sought) >= 290
    np.testing.assert_array_equal(found.indices.cpu(), cpu.self_knn(x.numpy(), 10).indices)


def test_a_round_of_the_exact_scan_that_overflows_is_done_again(device: torch.device) -> None:
    """Columns that get closer and closer: every round is full of newcomers."""
    n = 1100
    x = torch.stack([torch.arange(n, 0, -1.0), torch.full((n,), 40.0)], 1).to(device)
    query = torch.tensor([[0.0, 1.0]], device=device)
    sides = [Side(part, squared_lengths(part), torch.arange(len(part), device=device)) for part in (query, x)]
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    found = exact.search(*sides, zero, torch.arange(n, dtype=torch.int32, device=device), 5, False)
    assert found.ids.tolist() == [[n - 1, n - 2, n - 3, n - 4, n - 5]]
    want = similarity_reference(query, x)[0, found.ids[0].long()] * GRID
    assert (found.steps[0] - want).abs().max() <= 1


def test_passes_change_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(150, 40)
    x[100:110] = x[1]
    queries = rows(100, 40, 1)
    want, among = self_knn(x.to(device), 8), knn(queries.to(device), x.to(device), 8)
    held = plan_knn(None, 150, 40, 8).pass_bytes // 150
    passes: list[Any] = []
    call = Scan.__call__
    monkeypatch.setattr(Scan, "__call__", lambda *given: (passes.append(given[1:]), call(*given))[1])
    free = (module.finish_bytes(150, 8) + 70 * held) / 0.9
    monkeypatch.setattr(module, "free_bytes", lambda device: int(free))
    found = self_knn(x.to(device), 8)
    assert passes[:2] == [(0, 64), (64, 128)]
    assert torch.equal(found.indices, want.indices)
    assert torch.equal(found.similarities, want.similarities)
    assert torch.equal(knn(queries.to(device), x.to(device), 8).indices, among.indices)


def test_a_plan_says_what_is_missing() -> None:
    one = plan_knn(None, 1_000_000, 2048, 30)
    assert one.passes == 1
    assert 7e9 < one.peak_bytes < 9e9  # 4.1 GB of float16, 2 GB of buffers, 0.7 GB of results, and hashes
    two = plan_knn(None, 1_000_000, 2048, 30, free=int(0.9 * one.peak_bytes))
    assert two.passes > 1
    assert two.passes * two.rows_per_pass >= 1_000_000
    assert two.peak_bytes < one.peak_bytes
    said = r"knn: wanted 5\.\d+ GiB .*\(256 of 1000000 rows\).* found 1\.00 GiB"
    with pytest.raises(NotEnoughMemory, match=said):
        plan_knn(None, 1_000_000, 2048, 30, free=2**30)


def test_more_neighbours_than_a_gpu_takes(device: torch.device) -> None:
    with pytest.raises(ValueError, match="k: wanted 1 to 64 neighbours on a GPU, found 65"):
        self_knn(rows(3, 2).to(device), 65)


def test_equal_rows_are_joined(device: torch.device) -> None:
    x = rows(50, 37)
    x[20:30], x[40] = x[5], x[7]
    found = distinct(x.to(device))
    assert found is not None
    first = torch.arange(50)
    first[20:30], first[40] = 5, 7
    assert torch.equal(first_equal_reference(x), first)
    assert torch.equal(found.rows.cpu()[found.group.cpu()], first)
    assert found.members[found.starts[5] : found.starts[6]].tolist() == [5, *range(20, 30)]
    assert distinct(rows(50, 37).to(device)) is None


def test_rows_that_only_hash_alike_stay_apart(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(40, 6)
    x[9], x[21] = x[3], x[3]
    hashes = row_hashes(x.to(device)) % 3
    monkeypatch.setattr("dmx.kernels.distinct.row_hashes", lambda features: hashes)
    check_self(x, 9, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_at_size(dtype: torch.dtype, triton_device: torch.device) -> None:
    """As many rows as fill the device, clustered, against the CPU; memory as planned."""
    if triton_device.type != "cuda":
        pytest.skip("this process interprets: the GPU tests run in one of their own, see test_gpu.py")
    n, d, k = 20_000, 300, 30
    x = (rows(n // 20, d).repeat_interleave(20, 0) + 0.5 * rows(n, d, 1)).to(dtype)
    on_device = x.to(triton_device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = self_knn(on_device, k)
    assert torch.cuda.max_memory_allocated() - before <= plan_knn(None, n, d, k).peak_bytes
    want = cpu.self_knn(x.float().numpy(), k)
    np.testing.assert_array_equal(found.indices.cpu(), want.indices)
    np.testing.assert_allclose(found.similarities.cpu(), want.similarities, rtol=0, atol=2.0**-44)


def test_a_pass_ends_before_the_next_begins(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of two passes together would be more than was planned."""
    alive: list[weakref.ref[torch.Tensor]] = []
    start = Scan._start

    def watched(scan: Scan, begin: int, end: int) -> None:
        assert all(buffer() is None for buffer in alive)
        start(scan, begin, end)
        alive.append(weakref.ref(scan.buffers))

    monkeypatch.setattr(Scan, "_start", watched)
    room = module.finish_bytes(96, 4) + 40 * module.row_bytes(4)
    monkeypatch.setattr(module, "free_bytes", lambda device: int(room / 0.9))
    x = rows(96, 12).to(device)
    self_knn(x, 5)
    assert len(alive) == 3
