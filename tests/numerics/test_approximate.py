"""Neighbours from inverted lists: exact over the lists searched, whoever searches; recall counted right."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dmx.cluster import approximate, inverted_lists
from dmx.cluster.approximate import Approximate, default_lists, ivf_neighbours, recall_message
from dmx.cluster.inverted_lists import nearest_lists, train_centroids
from dmx.cluster.sharded import Group
from dmx.cluster.validation import as_features
from dmx.kernels.knn import Neighbours, self_knn

K = 12


def people(n: int = 900, d: int = 24) -> np.ndarray:
    """Clusters, copies of rows near and far, parallel rows, and a row far away."""
    rng = np.random.default_rng(0)
    who = rng.integers(n // 12 + 1, size=n)
    x = rng.standard_normal((n // 12 + 1, d))[who] + 0.5 * rng.standard_normal((n, d))
    x[n // 9 : n // 9 + 40], x[n - 3 :], x[n // 45] = x[0], x[7], -x[0]
    x[n // 2] = 2 * x[7]
    return x.astype(np.float32)


def search(x: Any, k: int = K, **settings: Any) -> Approximate:
    rows, squares = as_features(x, "cpu")
    return ivf_neighbours(Group.of(len(rows)), rows, squares, k, **settings)


def same(a: Neighbours, b: Neighbours) -> bool:
    return torch.equal(a.indices, b.indices) and torch.equal(a.similarities, b.similarities)


def lattice(n: int) -> np.ndarray:
    """Whole numbers in few dimensions: ties everywhere, and rows equal and parallel."""
    x = np.random.default_rng(1).integers(-2, 3, (n, 4)).astype(np.float32)
    x[(x == 0).all(1)] = 1
    return x


def collapsed(n: int) -> np.ndarray:
    """Rows that float32 cannot tell apart: every row of every list has to be compared."""
    return 1 + 1e-6 * np.random.default_rng(2).standard_normal((n, 24))


@pytest.mark.parametrize("k", [1, K, 45, 70])
@pytest.mark.parametrize(
    "x", [people(), people().astype(np.float64), lattice(600), collapsed(500), np.ones((100, 3), np.float32)],
    ids=["people", "float64", "ties", "collapsed", "equal"],
)  # fmt: skip
def test_all_lists_searched_is_exact_bit_by_bit(x: np.ndarray, k: int) -> None:
    found = search(x, k, lists=20, probes=20)
    assert found.recall == 1.0
    assert same(found.neighbours, self_knn(torch.from_numpy(x), k))
    assert found.neighbours.indices.dtype == torch.int32


@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_fewer_rows_than_neighbours(n: int) -> None:
    x = people(100)[-n:]
    found = search(x, K, lists=n, probes=1)  # a list holds a row: more are searched until all are found
    assert same(found.neighbours, self_knn(torch.from_numpy(x), K))
    assert found.recall == 1.0
    assert found.sampled == n


def over_lists_searched(x: np.ndarray, k: int, lists: int, probes: int) -> Neighbours:
    """The definition, dense: exact neighbours of all rows, those in lists not searched struck out."""
    every = self_knn(torch.from_numpy(x), len(x))
    units, rng = unit(x), np.random.default_rng(0)
    drawn = np.sort(rng.choice(len(x), min(64 * lists, len(x)), replace=False))
    centroids = train_centroids(units[drawn], lists, 0)
    label = nearest_lists(units, centroids, np.full(lists, 1), 1, 0)[:, 0]
    near = nearest_lists(units, centroids, np.bincount(label, minlength=lists), probes, k)
    seen = (near[:, :, None] == label[every.indices.numpy()][:, None, :]).any(1)
    order = torch.from_numpy(np.argsort(~seen, axis=1, kind="stable")[:, :k])
    return Neighbours(every.indices.gather(1, order), every.similarities.gather(1, order))


def unit(x: np.ndarray) -> np.ndarray:
    return inverted_lists.unit_float32(x, (x.astype(np.float64) ** 2).sum(1))


@pytest.mark.parametrize("probes", [1, 3, 9])
def test_few_lists_searched_is_exact_over_them(probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several blocks too; lists of neighbours are full; and the recall is what counting all gives."""
    monkeypatch.setattr(approximate, "ROWS", 250)
    x = people()
    found = search(x, K, lists=30, probes=probes, sample=len(x))
    expected = over_lists_searched(x, K, 30, probes)
    assert same(found.neighbours, expected)
    assert (found.neighbours.indices >= 0).all()
    exact = self_knn(torch.from_numpy(x), K)
    hits = 0
    for mine, sims, last in zip(found.neighbours.indices.tolist(), found.neighbours.similarities.tolist(),
                                exact.similarities[:, -1].tolist(), strict=True):  # fmt: skip
        assert len(set(mine)) == K
        hits += sum(s >= last for s in sims[1:])
    assert found.recall == hits / (len(x) * (K - 1)) < 1
    assert found.sampled == len(x)


def test_low_recall_is_measured_on_a_sample_and_warned_of() -> None:
    x = np.random.default_rng(3).standard_normal((4000, 32)).astype(np.float32)  # no clusters: hard
    found = search(x, probes=1, sample=300)
    exact = self_knn(torch.from_numpy(x), K)
    true = float((found.neighbours.similarities[:, 1:] >= exact.similarities[:, -1:]).double().mean())
    assert found.sampled == 300
    assert found.recall == pytest.approx(true, abs=0.05)
    assert found.recall < 0.5
    text, low = recall_message(found, K)
    assert low
    assert text.startswith(
        f"recall {found.recall:.4f} of the 11 nearest others, measured on 300 rows: below "
    )
    assert "raise probes" in text
    good = search(x, probes=1000, sample=300)
    assert recall_message(good, K) == ("recall 1.0000 of the 11 nearest others, measured on 300 rows", False)


def test_threads_and_seeds() -> None:
    x, threads = people(), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(search(x, probes=2, lists=30).neighbours)
    finally:
        torch.set_num_threads(threads)
    assert same(*found)
    assert not same(found[0], search(x, probes=2, lists=30, seed=1).neighbours)


def test_how_many_lists() -> None:
    assert [default_lists(n) for n in (1, 100, 5000, 100_000)] == [1, 2, 128, 1265]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = people(50)
    for settings, text in (({"lists": 51}, "lists: wanted at most as many as there are rows"),
                           ({"lists": 0}, "lists: wanted at least 1"), ({"probes": 0}, "probes: wanted"),
                           ({"sample": 0}, "sample: wanted"), ({"k": 0}, "k: wanted at least")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            search(x, **settings)
    with pytest.raises(ValueError, match="features: wanted at least one row on some worker"):
        ivf_neighbours(Group.of(0), torch.empty(0, 4), torch.empty(0, dtype=torch.float64), 3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        search(x)


SHARES = {3: [0.6, 0.003, 0.397], 2: [0.35, 0.65, 0.0]}


def test_several_workers_find_what_one_finds() -> None:
    """Three workers, one with three rows; then the last with none, which leaves the rows to two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | address | {"RANK": str(rank), "WORLD_SIZE": "3"},
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        told = [worker.communicate(timeout=200) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    one = {str(probes): search(people(), probes=probes, lists=30).recall for probes in (2, 30)}
    assert one["2"] < one["30"] == 1.0
    errors = "\n".join(err[-3000:] for _, err in told)
    for out, _ in told:
        assert out, errors
        assert json.loads(out) == {f"{w} {p}": [True, one[p]] for w in (3, 2, "pair") for p in ("2", "30")}


def main() -> None:
    """For each split and number of lists: whether this worker finds what one finds, and the recall."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rows, squares = as_features(people(), "cpu")
    pair = dist.new_group([0, 1])
    told = {}
    for workers, process_group in ((3, None), (2, None), ("pair", pair)):
        ends = np.cumsum([0, *SHARES[3 if workers == 3 else 2]])
        begin, end = (round(len(rows) * share) for share in ends[dist.get_rank() :][:2])
        told |= {f"{workers} {p}": check(rows, squares, begin, end, p, process_group) for p in (2, 30)}
    print(json.dumps(told), flush=True)


def check(
    rows: torch.Tensor, squares: torch.Tensor, begin: int, end: int, probes: int, process_group: Any
) -> list[Any]:
    settings: dict[str, Any] = {"probes": probes, "lists": 30}
    one = ivf_neighbours(Group(None, 0, 1, (0, len(rows))), rows, squares, K, **settings)
    if process_group is not None and dist.get_rank() == 2:
        return [True, one.recall]  # no member of the pair
    inverted_lists.ROWS = approximate.ROWS = 128  # several blocks, and other numbers of them on each
    group = Group.of(end - begin, process_group)
    found = ivf_neighbours(group, rows[begin:end].contiguous(), squares[begin:end], K, **settings)
    expected = Neighbours(one.neighbours.indices[begin:end], one.neighbours.similarities[begin:end])
    return [same(found.neighbours, expected), found.recall]


if __name__ == "__main__":
    main()
