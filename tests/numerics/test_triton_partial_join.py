"""A shard's part of the Jaccard join: numba on the CPU, and Triton as `triton_device` runs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmx.kernels import jaccard
from dmx.kernels.heads import WHOLE
from dmx.kernels.jaccard import jaccard_reference
from dmx.kernels.partial_join import Lists, Pairs, candidates, pair_distances
from dmx.kernels.sparse import SparseRows, starts_of


@pytest.fixture(params=["numba", "triton"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "numba":
        return torch.device("cpu")
    device: torch.device = request.getfixturevalue("triton_device")
    return device


def random_rows(n: int, entries: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    v = np.zeros((n, n))
    for i in range(n):
        columns = (i + rng.choice(2 * entries, entries, replace=False)) % n
        v[i, columns] = rng.random(entries) + 0.1
    return torch.from_numpy(v / v.sum(1, keepdims=True))


def csr(dense: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    row, column = dense.nonzero(as_tuple=True)
    starts = starts_of(torch.bincount(row, minlength=len(dense)))
    return starts.to(device), column.int().to(device), dense[row, column].to(device)


@pytest.mark.parametrize("slots", [2048, 4])
@pytest.mark.parametrize(("first", "rows"), [(0, 60), (13, 20), (59, 1)])
def test_candidates_are_the_later_rows_that_share_enough(
    first: int, rows: int, slots: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where hardly a row finds room in the hash table."""
    monkeypatch.setattr(jaccard, "_SLOTS", slots)
    n, enough = 60, 5000
    heads = (random_rows(n, 9, 1) * WHOLE).floor().add(1).mul(random_rows(n, 9, 1) > 0).short()
    own = Lists(*csr(heads[first : first + rows], device))
    lists = Lists(*csr(heads.T.contiguous(), device))
    found = candidates(own, lists, first, n, enough)
    share = torch.minimum(heads[:, None].int(), heads[None].int()).sum(2)
    for r in range(rows):
        later = [j for j in range(first + r + 1, n) if share[first + r, j] >= enough]
        have = found.others[found.starts[r] : found.starts[r + 1]].tolist()
        assert have == sorted(set(have))
        # A table's bucket that several rows share may let one through, never keep one out.
        assert set(later) <= set(have)
        assert all(j > first + r and share[first + r, j] > 0 for j in have)


def test_distances_of_pairs(device: torch.device) -> None:
    v = random_rows(40, 7, 2)
    rows = SparseRows(*csr(v, device))
    expected = jaccard_reference(v)
    r = torch.arange(15).repeat_interleave(3)
    others = (r + torch.tensor([1, 4, 20]).repeat(15)).int()
    pairs = Pairs(starts_of(torch.full((15,), 3)).to(device), others.to(device))
    found = pair_distances(rows, pairs, 40)
    np.testing.assert_allclose(found.cpu(), expected[r, others.long()], rtol=0, atol=1.1e-12)


def test_nothing_to_join(device: torch.device) -> None:
    empty = Lists(*csr(torch.zeros((3, 5)), device))
    heads = Lists(empty.starts, empty.indices, empty.weights.short())
    lists = Lists(torch.zeros(1, dtype=torch.int64, device=device), heads.indices, heads.weights)
    found = candidates(heads, lists, 0, 5, 1)
    assert len(found.others) == 0
    assert found.starts.tolist() == [0, 0, 0, 0]
