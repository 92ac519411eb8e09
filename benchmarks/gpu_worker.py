"""The process that `gpu.py` gives jobs to: JSON lines in, rows as JSON lines out, each once it is measured.

It is a process of its own so that a fault on the device, which no later call survives, costs one job.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from checks import check_labels, check_neighbours, check_queries, check_with_cpu, sample
from rivals import PACKAGES, dense, installed, packages, torch_rivals
from timing import ceilings, features, free, measured, rotated
from triton.errors import TritonError

from dmx.cluster import pseudo_labels
from dmx.kernels.dbscan import dbscan
from dmx.kernels.jaccard import jaccard_pairs
from dmx.kernels.k_reciprocal import k_reciprocal
from dmx.kernels.knn import knn, self_knn
from dmx.kernels.similarity import squared_lengths

K1, K2, RADII, MIN_SAMPLES = 30, 6, (0.58, 0.6, 0.62), 4
QUERIES = 8192
Job = dict[str, Any]
Row = dict[str, Any]


def executed_share(n: int, d: int, device: torch.device) -> float:
    """Of the N^2 scores, the share that `self_knn` computes: half where all rows fit into a half ring."""
    from dmx.kernels.knn import plan_knn
    from dmx.kernels.memory import free_bytes

    return 0.5 if plan_knn(None, n, d, K1, free_bytes(device)).passes == 1 else 1.0


def scan_with(config: Any) -> None:
    """Makes later searches of this process scan with `config`; the one place to know how."""
    from dmx.kernels.candidates import use_scan_config

    use_scan_config(config)


def scan_configs() -> tuple[Any, ...]:
    """The configurations there are; the first is the default."""
    from dmx.kernels.candidates import SCAN_CONFIGS

    return tuple(SCAN_CONFIGS)


def environment(job: Job, device: torch.device) -> Iterator[Row]:
    """Device and versions. `gpu` is None where torch finds no CUDA device."""
    found: Row = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {name: installed(name) for name in ("triton", "numba", "numpy")}
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name, "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count, "driver": driver(),
        }  # fmt: skip
    yield {"gpu": gpu, "versions": found, "packages": {name: installed(name) for name in PACKAGES}}


def driver() -> str | None:
    """The driver's version, as nvidia-smi tells it."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0]


def ceiling_job(job: Job, device: torch.device) -> Iterator[Row]:
    """The two ceilings."""
    yield ceilings(device, job["gemm_size"], job["copy_bytes"])


def shape_of(job: Job) -> Row:
    return {name: job[name] for name in ("n", "d", "kind", "dtype")}


def stages(job: Job, device: torch.device) -> Iterator[Row]:
    """Every stage on what the one before found, a row each, and checks of a sample of rows."""
    n, d, shape = job["n"], job["d"], shape_of(job)
    inputs = rotated(n, d, job["kind"], job["dtype"], device)
    scores = {"flop_n2": 2 * n * n * d, "scores": n * n}
    share = executed_share(n, d, device)
    row, near = measured([partial(self_knn, x, K1) for x in inputs], device)
    yield {"stage": "self_knn", **shape, **scores, "flop_executed": share * scores["flop_n2"], **row}
    yield {"check": "self_knn", **shape, **check_neighbours(inputs[0], near[0], sample(n, 64, device))}

    squares = [squared_lengths(x) for x in inputs]
    rows = zip(inputs, squares, near, strict=True)
    row, encoded = measured(
        [partial(k_reciprocal, x, found, K1, K2, squares=s) for x, s, found in rows], device
    )
    entries = sum(len(v.indices) for v in encoded) // len(encoded)
    columns = near[0].indices.shape[1]
    del near
    yield {
        "stage": "k_reciprocal", **shape, "entries": entries,
        "bytes": 12 * n * columns + 12 * entries + 8 * n, "bytes_formula": "12 N K + 12 entries + 8 N", **row,
    }  # fmt: skip

    row, close = measured([partial(jaccard_pairs, v, RADII[-1]) for v in encoded], device)
    pairs = sum(len(p.indices) for p in close) // len(close)
    del encoded
    yield {
        "stage": "jaccard_pairs", **shape, "entries": entries, "pairs": pairs,
        "bytes": 12 * entries + 12 * pairs + 16 * n, "bytes_formula": "12 entries + 12 pairs + 16 N", **row,
    }  # fmt: skip

    row, _ = measured([partial(dbscan, p, RADII, MIN_SAMPLES) for p in close], device)
    del close
    yield {
        "stage": "dbscan", **shape, "pairs": pairs, "bytes": 12 * pairs + 8 * n + 8 * n * len(RADII),
        "bytes_formula": "12 pairs + 8 N + 24 N", **row,
    }  # fmt: skip

    row, labels = measured([partial(pseudo_labels, x, device=device.type) for x in inputs], device)
    yield {
        "stage": "pseudo_labels", **shape, **scores, "flop_executed": share * scores["flop_n2"],
        "identities": labels[0].num_identities, **row,
    }  # fmt: skip
    del labels

    queries = features(min(QUERIES, n), d, job["kind"], job["dtype"], device, seed=1000)
    row, nearest = measured([partial(knn, queries, x, K1) for x in inputs], device)
    count = len(queries)
    yield {
        "stage": "knn", **shape, "queries": count, "flop_n2": 2 * count * n * d, "scores": count * n,
        "flop_executed": 2 * count * n * d, **row,
    }  # fmt: skip
    some = sample(count, 64, device)
    yield {"check": "knn", **shape, **check_queries(queries, inputs[0], nearest[0], some)}


def check(job: Job, device: torch.device) -> Iterator[Row]:
    """All rows at a small N against float64, and the labels of the whole against dense references."""
    shape = shape_of(job)
    x = features(job["n"], job["d"], job["kind"], job["dtype"], device, seed=500)
    near = self_knn(x, K1)
    yield {"check": "self_knn", **shape, **check_neighbours(x, near, torch.arange(len(x), device=device))}
    queries = features(64, job["d"], job["kind"], job["dtype"], device, seed=501)
    yield {
        "check": "knn", **shape,
        **check_queries(queries, x, knn(queries, x, K1), torch.arange(64, device=device)),
    }  # fmt: skip
    yield {"check": "labels", **shape, **check_labels(x, K1, K2, RADII, MIN_SAMPLES)}


def check_cpu(job: Job, device: torch.device) -> Iterator[Row]:
    """The labels against those of the numba implementations, at a size that dense references cannot reach."""
    x = features(job["n"], job["d"], job["kind"], job["dtype"], device, seed=500)
    found = check_with_cpu(x, K1, K2, RADII, MIN_SAMPLES)
    yield {"check": "labels against the CPU", **shape_of(job), **found}


def tune(job: Job, device: torch.device) -> Iterator[Row]:
    """`self_knn` with every scan configuration; all have to find what the first finds."""
    inputs = rotated(job["n"], job["d"], job["kind"], job["dtype"], device)
    expected = self_knn(inputs[0], K1).indices
    default = scan_configs()[0]
    for config in scan_configs():
        row: Row = {"stage": "self_knn", **shape_of(job), "config": str(config), "default": config is default}
        scan_with(config)
        try:
            times, near = measured([partial(self_knn, x, K1) for x in inputs], device, 4.0)
            yield {**row, **times, "equal": bool(torch.equal(near[0].indices, expected))}
        except (RuntimeError, TritonError) as error:  # that one does not compile or fit is a result too
            yield {**row, "failed": str(error).strip().splitlines()[-1]}
        finally:
            scan_with(default)


JOBS: dict[str, Callable[[Job, torch.device], Iterator[Row]]] = {
    "environment": environment,
    "ceilings": ceiling_job,
    "stages": stages,
    "check": check,
    "check_cpu": check_cpu,
    "tune": tune,
    "torch": torch_rivals,
    "packages": packages,
    "dense": dense,
}


def alive(device: torch.device) -> bool:
    """Whether the device still answers: after a fault in a kernel no call of this process ever succeeds."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def main() -> int:
    """Work until there are no more jobs."""
    # Rows go to the pipe that came as standard output; whatever else prints, prints beside it.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        device = torch.device(job["device"])
        try:
            for row in JOBS[job["job"]](job, device):
                answers.write(json.dumps(row) + "\n")
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            answers.write(json.dumps({"failed": text, **job}) + "\n")
            error.__traceback__ = None  # its frames hold tensors
            if not alive(device):
                return 1
        answers.write('{"done": true}\n')
        gc.collect()
        free(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
