"""Other ways to the same neighbours and labels, timed on the same inputs, with their recall.

- `matmul` and `topk` by chunks of queries, in bfloat16, tf32 and float32, the chunk chosen among several, and
  the same through `torch.compile`. Rows come unit and in the product's type, which DMX has to do itself.
- flashlib 0.4.0, `flash_knn`: squared Euclidean distances of unit rows, which order as cosines do.
- flash-kmeans 0.3.1: assigns every row to the nearest of N centroids, here the rows. One id a row and no
  scores: not the same output, but the same products with the least selection there can be.
- the dense way of `cluster_cpu.py`: faiss on the CPU, NumPy loops, scikit-learn.

A way that would take long is timed on some of the queries; `seconds` is then None and `seconds_scaled` says
what that makes for all, which is right as far as chunks of queries are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from checks import array, nearest, sample, similarities
from cluster_cpu import Clock, run_dense
from timing import SECONDS, features, free, measured, rotated, timed

from dmx.cluster import pseudo_labels

K = 30
PACKAGES = ("flashlib", "flash-kmeans", "faiss-cpu", "scikit-learn")
CHUNKS = (1024, 2048, 4096, 8192, 16384)
PRECISIONS = {  # type, and what torch is to make of float32 products
    "bfloat16": ("bfloat16", "highest"),
    "tf32": ("float32", "high"),
    "float32": ("float32", "highest"),
}
Row = dict[str, Any]
Search = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def recall(ids: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of the exact neighbours that were found, (R, k) against (R, k)."""
    return float((ids[:, :, None].long() == exact[:, None, :]).any(1).double().mean())


def exact_sample(x: torch.Tensor, among: int) -> tuple[torch.Tensor, torch.Tensor]:
    """64 of the first `among` rows, and their exact neighbours, each row first."""
    rows = sample(among, 64, x.device)
    s = similarities(x[rows], x)
    s[torch.arange(len(rows), device=x.device), rows] = 2.0
    return rows, nearest(s, min(K, len(x)))


def by_chunks(search: Search, x: torch.Tensor, chunk: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids of the first `count` rows."""
    k = min(K, len(x))
    scores = torch.empty((count, k), dtype=x.dtype, device=x.device)
    ids = torch.empty((count, k), dtype=torch.int64, device=x.device)
    for begin in range(0, count, chunk):
        end = min(begin + chunk, count)
        scores[begin:end], ids[begin:end] = search(x[begin:end], x)
    return scores, ids


def matmul_topk(queries: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest products of every query, and where they are."""
    values, ids = torch.topk(torch.matmul(queries, rows.T), min(K, len(rows)), dim=1)
    return values, ids


def rate(call: Callable[[], object], rows: int, device: torch.device) -> float:
    """Rows a second, the best of three after a warm-up."""
    call()
    return rows / min(timed(call, device)[1] for _ in range(3))


def best_chunk(search: Search, x: torch.Tensor, chunks: Sequence[int]) -> tuple[int, float]:
    """The fastest of `chunks` whose scores fit, and its rows a second."""
    n, room = len(x), 2**34
    if x.is_cuda:
        free(x.device)
        room = torch.cuda.mem_get_info(x.device)[0]
    rates = {}
    for chunk in sorted({min(chunk, n) for chunk in chunks}):
        if 4 * chunk * n * x.element_size() < room:  # the scores, and as much again three times for `topk`
            rates[chunk] = rate(partial(search, x[:chunk], x), chunk, x.device)
    chunk = max(rates, key=lambda size: rates[size])
    return chunk, rates[chunk]


def timed_rows(n: int, rows_a_second: float, step: int) -> int:
    """How many queries to time: all if that takes at most SECONDS, else as many whole steps as do."""
    if n <= rows_a_second * SECONDS:
        return n
    return min(n, max(step, int(rows_a_second * SECONDS / 12) // step * step))


def row_of(name: str, job: Row, count: int, times: Row, **more: Any) -> Row:
    """A rival's row; `count` of the queries were timed."""
    row = {"rival": name, **{key: job[key] for key in ("n", "d", "kind", "dtype")}, **times, **more}
    row |= {"rows_timed": count, "seconds_scaled": None, "scores": job["n"] ** 2}
    row["flop_n2"] = 2 * row["scores"] * job["d"]
    if count < job["n"]:
        row["seconds_of_rows_timed"] = row["seconds"]
        row["seconds_scaled"] = row["seconds"] * job["n"] / count
        row["seconds"] = None
    return row


def torch_rivals(job: Row, device: torch.device) -> Iterator[Row]:
    """Chunked products in `job["precision"]`, through `torch.compile` where `job["compiled"]`."""
    name = f"matmul {job['precision']}"
    dtype, precision = PRECISIONS[job["precision"]]
    inputs = typed(dtype, job, device)
    torch.set_float32_matmul_precision(precision)
    try:
        if job["compiled"]:
            # Every size of a chunk is compiled anew.
            yield matmul_row(f"compiled {name}", torch.compile(matmul_topk), inputs, job, CHUNKS[2::2])
        else:
            yield matmul_row(name, matmul_topk, inputs, job, CHUNKS)
    finally:
        torch.set_float32_matmul_precision("highest")


def typed(dtype: str, job: Row, device: torch.device) -> list[torch.Tensor]:
    """The rotated inputs of a job in another type."""
    inputs = rotated(job["n"], job["d"], job["kind"], job["dtype"], device)
    return [x.to(getattr(torch, dtype)) for x in inputs]


def matmul_row(name: str, search: Search, inputs: list[torch.Tensor], job: Row, chunks: Sequence[int]) -> Row:
    """One way of multiplying."""
    n, device = len(inputs[0]), inputs[0].device
    chunk, speed = best_chunk(search, inputs[0], chunks)
    count = timed_rows(n, speed, chunk)
    times, found = measured([partial(by_chunks, search, x, chunk, count) for x in inputs], device)
    x = features(n, job["d"], job["kind"], job["dtype"], device, seed=0)
    rows, exact = exact_sample(x, count)
    return row_of(name, job, count, times, chunk=chunk, outputs="ids and scores",
                  recall=recall(found[0][1][rows], exact))  # fmt: skip


def installed(name: str) -> str | None:
    """Version of a package, None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def absent(name: str, job: Row, reason: str) -> Row:
    """A row that says why nothing was measured."""
    return {"rival": name, **{key: job[key] for key in ("n", "d", "kind", "dtype")},
            "seconds": None, "recall": None, "reason": reason}  # fmt: skip


def packages(job: Row, device: torch.device) -> Iterator[Row]:
    """flashlib and flash-kmeans in `job["precision"]`, where they are installed."""
    for name, run in (("flashlib", flashlib), ("flash-kmeans", flash_kmeans)):
        label, found = f"{name} {job['precision']}", installed(name)
        if found is None:
            yield absent(label, job, "not installed")
        elif device.type != "cuda":
            yield absent(label, job, "runs on CUDA alone")
        else:
            yield {**run(label, typed(job["precision"], job, device), job, device), "version": found}


def flashlib(label: str, inputs: list[torch.Tensor], job: Row, device: torch.device) -> Row:
    """`flash_knn` with its default configuration: its autotuning takes a minute a shape."""
    from flashlib.primitives.knn import flash_knn

    n, x = job["n"], inputs[0]
    part = min(n, 16384)
    count = timed_rows(n, rate(partial(flash_knn, x[:part], x, K), part, device), part)
    # The whole self-join is passed as one tensor: flashlib has a faster way for it.
    calls = [partial(flash_knn, x if count == n else x[:count], x, K) for x in inputs]
    times, found = measured(calls, device)
    rows, exact = exact_sample(features(n, job["d"], job["kind"], job["dtype"], device, seed=0), count)
    return row_of(label, job, count, times, outputs="ids and scores", recall=recall(found[0][1][rows], exact))


def flash_kmeans(label: str, inputs: list[torch.Tensor], job: Row, device: torch.device) -> Row:
    """The assignment step with the rows as centroids."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    squares = [x.float().square().sum(1) for x in inputs]
    n = job["n"]

    def assign(x: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
        queries = (x[None, :count], x[None], lengths[None, :count])
        found: torch.Tensor = euclid_assign_triton(*queries, c_sq=lengths[None])[0]
        return found

    part = min(n, 16384)
    count = timed_rows(n, rate(partial(assign, inputs[0], squares[0], part), part, device), part)
    calls = [partial(assign, x, lengths, count) for x, lengths in zip(inputs, squares, strict=True)]
    times, found = measured(calls, device)
    own = (found[0] == torch.arange(count, device=device)).double().mean()
    return row_of(label, job, count, times, recall=float(own),
                  outputs="one id a row, no scores; recall is that of the row itself")  # fmt: skip


def dense(job: Row, device: torch.device) -> Iterator[Row]:
    """The published way, on the CPU, and in how many labels it differs from DMX on the device."""
    name = "published dense way"
    missing = [package for package in ("faiss", "sklearn") if find_spec(package) is None]
    if missing:
        yield absent(name, job, f"not installed: {', '.join(missing)}")
        return
    x = features(job["n"], job["d"], job["kind"], "float32", device, seed=0)
    rows = x.cpu().numpy()
    run_dense(rows[:512].copy(), Clock())
    clock = Clock()
    found = run_dense(rows, clock)
    ours = pseudo_labels(x, device=device.type)
    differing = {key: int((array(getattr(ours, key)) != labels).sum()) for key, labels in found.items()}
    total = sum(clock.wall_s.values())
    yield {
        **absent(name, job, "1 run, on the CPU"), "seconds": total, "seconds_all": [total], "repeats": 1,
        "stages_s": clock.wall_s, "outputs": "labels", "labels_differing": differing,
    }  # fmt: skip
