"""Clustering by several workers, each with its rows: bit by bit what one worker finds; no endless wait."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dmx.cluster import pseudo_labels
from dmx.cluster.sharded import Group, WorkerLostError, encoding, join, sharded_pseudo_labels
from dmx.cluster.sharded.encoding import sharded_k_reciprocal
from dmx.cluster.sharded.join import sharded_jaccard_pairs
from dmx.cluster.sharded.neighbours import sharded_knn
from dmx.kernels.device import as_array, interpreted
from dmx.kernels.jaccard import jaccard_pairs
from dmx.kernels.k_reciprocal import k_reciprocal
from dmx.kernels.knn import self_knn
from dmx.kernels.similarity import squared_lengths
from dmx.kernels.sparse import SparseRows

TIMEOUT_S = 30.0
N = 1500


def people(n: int = N, d: int = 48) -> NDArray[np.float32]:
    """Clusters of many sizes and looseness, copies of rows within and across shards, and a row far away."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((n // 12, d))
    noise = rng.uniform(0.2, 0.9, (len(centres), 1))
    who = rng.integers(len(centres), size=n)
    x = centres[who] + noise[who] * rng.standard_normal((n, d))
    x[n // 15 : n // 11], x[n - 3 :], x[20] = x[0], x[7], -x[0]
    return x.astype(np.float32)


def bounds_of(shares: list[float], n: int) -> list[int]:
    return [round(n * share) for share in (0, *itertools.accumulate(shares))]


@pytest.mark.parametrize(
    "shares", [[0.5, 0.5], [0.003, 0.997], [1 / 3, 0.0, 2 / 3], [0.02, 0.2, 0.5, 0.28]], ids=str
)
def test_labels_are_those_of_one_worker(shares: list[float]) -> None:
    """And so is everything before them: neighbours, encodings, pairs; whatever the shards are."""
    found = run("steps", shares)
    for rank, told in enumerate(found):
        steps = ("knn", "v", "pairs", "labels", "evidence", "centroids")
        assert told == dict.fromkeys(steps, True), rank


@pytest.mark.parametrize("shares", [[0.35, 0.65], [0.5, 0.0, 0.5]], ids=str)
def test_triton_kernels_find_the_same(shares: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, or compiled where there is a GPU; fewer rows, because that is slow."""
    monkeypatch.setenv("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
    for told in run("triton", shares):
        assert told == {"labels": True, "centroids": True}


def test_whoever_has_nothing_to_send_receives_all_the_same() -> None:
    assert run("deals", [0.5, 0.5]) == [
        {"numbers": [7, 8], "rows": [[1.0, 2.0], [3.0, 4.0]]},
        {"numbers": [], "rows": []},
    ]


def test_labels_of_one_worker_alone() -> None:
    x = people()
    found, expected = sharded_pseudo_labels(x), pseudo_labels(x)
    assert expected.num_identities > 20
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.centroids, expected.centroids)
    assert found.independence_threshold == expected.independence_threshold


def test_the_threshold_and_settings_are_passed_on() -> None:
    x = people(400)
    settings: dict[str, Any] = {
        "k1": 12,
        "k2": 1,
        "eps": 0.5,
        "min_samples": 3,
        "independence_threshold": 0.1,
    }
    found = sharded_pseudo_labels(x, **settings)
    np.testing.assert_array_equal(found.labels, pseudo_labels(x, **settings).labels)
    with pytest.raises(ValueError, match="eps: wanted a number between 0 and 1"):
        sharded_pseudo_labels(x, eps=2)
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="row 3, which contains NaN"):
        sharded_pseudo_labels(x)


def test_neighbours_that_others_found_are_looked_at_first() -> None:
    """Reciprocity reads the number of a row from its own list."""
    x = people(400)
    rows = torch.from_numpy(x)
    near = self_knn(rows, 30)
    found = sharded_pseudo_labels(x, neighbours=near)
    np.testing.assert_array_equal(found.labels, pseudo_labels(x).labels)
    near.indices[7, :2] = near.indices[7, [1, 0]].clone()
    with pytest.raises(ValueError, match=r"first in its own list, found \d+ first in that of row 7; move it"):
        sharded_pseudo_labels(x, neighbours=near)
    with pytest.raises(ValueError, match=r"wanted 400 lists of 20, found an array of \(400, 30\)"):
        sharded_pseudo_labels(x, neighbours=near, k1=20)


def test_no_cluster_at_all() -> None:
    found = sharded_pseudo_labels(np.eye(60, dtype=np.float32), min_cluster_size=61)
    assert (found.labels == -1).all()
    assert found.num_identities == 0
    assert found.centroids.shape == (0, 60)


def test_a_worker_that_dies_ends_the_others_in_time() -> None:
    start = time.monotonic()
    found = run("dies", [0.5, 0.25, 0.25])
    assert time.monotonic() - start < TIMEOUT_S + 60
    for rank in (0, 1):
        assert found[rank]["error"].startswith(
            f"worker {rank} of 3 on {os.uname().nodename} waited in vain for "
        ), found[rank]


def test_a_worker_that_hangs_ends_the_others_in_time() -> None:
    found = run("hangs", [0.5, 0.5])
    assert found[0]["seconds"] < 15, "the timeout was 5 s"
    assert "waited in vain for the rows of worker 1 in step 1 of 1 of the neighbours" in found[0]["error"]


def run(what: str, shares: list[float]) -> list[dict[str, Any]]:
    """What each worker told; empty of one that was killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, what, json.dumps(shares)],
            env=os.environ
            | address
            | {"PYTHONPATH": str(Path(__file__).parents[1])}
            | {"RANK": str(rank), "WORLD_SIZE": str(len(shares))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(shares))
    ]
    try:
        told = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert told[0][0], told[0][1][-4000:]
    return [json.loads(out or "{}") for out, _ in told]


def same(a: SparseRows, b: SparseRows) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("starts", "indices", "values"))


def check_steps(group: Group, x: NDArray[np.float32]) -> dict[str, bool]:
    """Each step of this worker against all rows at once."""
    encoding.BLOCK_ROWS, join.BLOCK_ROWS = 256, 128  # several blocks, and other numbers of them on each
    begin, end = group.first, group.first + group.own
    rows, squares = torch.from_numpy(x), squared_lengths(torch.from_numpy(x))
    own, own_squares = rows[begin:end].contiguous(), squares[begin:end].contiguous()
    near, all_near = sharded_knn(group, own, own_squares, 30), self_knn(rows, 30)
    v, all_v = (
        sharded_k_reciprocal(group, own, own_squares, near, 30, 6),
        k_reciprocal(rows, all_near, 30, 6),
    )
    pairs, all_pairs = sharded_jaccard_pairs(group, v, 0.62), jaccard_pairs(all_v, 0.62)
    found, expected = sharded_pseudo_labels(as_array(own), group=group), pseudo_labels(x)
    first, last = (expected.num_identities * r // group.size for r in (group.rank, group.rank + 1))
    return {
        "knn": torch.equal(near.indices, all_near.indices[begin:end])
        and torch.equal(near.similarities, all_near.similarities[begin:end]),
        "v": same(v, all_v.part(begin, end)),
        "pairs": same(pairs, all_pairs.part(begin, end)),
        "labels": bool((found.labels == expected.labels).all()),
        "evidence": found.evidence is None
        if group.rank
        else found.evidence is not None and bool((found.evidence.clusters == expected.base).all()),
        "centroids": bool((found.centroids.numpy() == expected.centroids[first:last]).all()),
    }


def deal(group: Group) -> dict[str, Any]:
    """The second worker sends two rows to the first, which has none; both from NumPy arrays."""
    count = 2 * group.rank
    numbers = torch.from_numpy(np.array([7, 8]) if count else np.empty(0, np.int64))  # whose stride is 0
    rows = torch.from_numpy(np.array([[1, 2], [3, 4]], np.float32)[:count])
    received = group.deal([numbers, rows], torch.tensor([count, 0]), "two rows")
    return dict(zip(("numbers", "rows"), (part.tolist() for part in received), strict=True))


def check_triton(group: Group, x: NDArray[np.float32]) -> dict[str, bool]:
    """Labels by the Triton kernels against numba's."""
    settings: dict[str, Any] = {"k1": 12, "k2": 4, "min_samples": 3, "eps": 0.55}
    encoding.BLOCK_ROWS, join.BLOCK_ROWS = 24, 24  # the last ones of a shorter shard are empty
    expected = pseudo_labels(x, **settings, device="cpu")
    own = x[group.first : group.first + group.own]
    if torch.cuda.is_available():
        found = sharded_pseudo_labels(own, group=group, device="cuda", **settings)
    else:
        runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))  # mends the interpreter
        with interpreted():
            found = sharded_pseudo_labels(own, group=group, device="cpu", **settings)
    first, last = (expected.num_identities * r // group.size for r in (group.rank, group.rank + 1))
    close = np.abs(found.centroids.cpu().numpy() - expected.centroids[first:last]).max(initial=0) < 1e-6
    return {"labels": bool((found.labels == expected.labels).all()), "centroids": bool(close)}


def main() -> None:
    what, shares = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    seconds = 5.0 if what == "hangs" else TIMEOUT_S
    backend = "cpu:gloo,cuda:nccl" if what == "triton" and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))
    rank, x = dist.get_rank(), people(64, 12) if what == "triton" else people()
    bounds = bounds_of(shares, len(x))
    own = x[bounds[rank] : bounds[rank + 1]]
    group = Group.of(len(own))
    if what == "deals":
        print(json.dumps(deal(group)), flush=True)
        return
    if what == "triton":
        print(json.dumps(check_triton(group, x)), flush=True)
        return
    if what == "steps":
        print(json.dumps(check_steps(group, x)), flush=True)
        return
    if rank == len(shares) - 1:
        time.sleep(1)
        if what == "dies":
            os.kill(os.getpid(), 9)
        time.sleep(20)
        return
    start = time.monotonic()
    try:
        sharded_pseudo_labels(own, group=group)
    except WorkerLostError as error:
        took = time.monotonic() - start
        print(json.dumps({"error": str(error), "seconds": took}), flush=True)
    os._exit(0)  # a group whose member is gone cannot be left in order


if __name__ == "__main__":
    main()
