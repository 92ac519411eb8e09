"""How clustering grows with the number of images and of workers, on the CPU.

Rows of 128 numbers, 20 images an identity on average, in an order that says nothing about identities; cosine
0.4 to 0.8 within an identity, as between features that training has taken some way. Each measurement runs in
fresh processes, which are warmed up on a few rows first (compilation, thread pools); W workers share the
threads of this machine and talk through gloo on the loopback interface.

For every size and number of workers: seconds of each stage, wall and CPU (summed over the workers), and the
peak memory of a worker beyond its rows (VmHWM less what was there before the first stage); of several runs
the one with the median time. A line fitted through the logarithms gives the exponent with which time after
the neighbours, and memory, grow.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --sizes 10000 20000 50000 --workers 1 2
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dmx.cluster.sharded import Group, sharded_pseudo_labels
from dmx.cluster.sharded import labels as steps
from dmx.cores import cores

WIDTH = 128
IMAGES_PER_IDENTITY = 20
BLOCK = 65_536  # rows drawn from a seed of their own
SIZES = (10_000, 20_000, 50_000, 100_000, 200_000, 500_000)
MOST_REPEATED = 200_000  # images; more are measured once, for the time that neighbours take
SHARED_SIZES = (20_000, 100_000)  # with several workers
STAGES = ("neighbours", "encode", "join", "dbscan", "rest")
RESULT = Path(__file__).parent / "results" / "scaling.json"
MOST_EXPONENT = 1.1
TIMEOUT_S = 3600.0
# Written down before the first measurement.
PREDICTION = {
    "exponent_time": 1.03,
    "exponent_memory": 1.0,
    "reason": "entries, candidates and pairs a row depend on the identities, not on N; sorts add a "
    "logarithm, and arrays of N fall out of the cache. Two workers on two cores: the same CPU time and a "
    "tenth for renumbering; half the memory each.",
}


class Clock:
    """Wall and CPU seconds of the stages of `sharded_pseudo_labels`, taken where they are called."""

    def __init__(self) -> None:
        self.wall_s = dict.fromkeys(STAGES, 0.0)
        self.cpu_s = dict.fromkeys(STAGES, 0.0)
        for stage, name in (
            ("neighbours", "sharded_knn"),
            ("encode", "sharded_k_reciprocal"),
            ("join", "sharded_jaccard_pairs"),
            ("dbscan", "dbscan"),
        ):
            setattr(steps, name, self._timed(stage, getattr(steps, name)))

    def _timed(self, stage: str, work: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            result = work(*arguments, **named)
            self.wall_s[stage] += time.perf_counter() - wall
            self.cpu_s[stage] += time.process_time() - cpu
            return result

        return timed


def memory_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status: wanted {field}, found none")


def own_rows(n: int, rank: int, size: int) -> torch.Tensor:
    """An equal share of the rows, which are the same whoever makes them: (own rows, D) float32."""
    rng = np.random.default_rng(0)
    identities = max(n // IMAGES_PER_IDENTITY, 1)
    centres = rng.standard_normal((identities, WIDTH), np.float32)
    spread = rng.uniform(0.5, 1.2, identities).astype(np.float32)  # cosine 1 / (1 + spread^2) on average
    who = rng.integers(identities, size=n)
    begin, end = n * rank // size, n * (rank + 1) // size
    own = who[begin:end]
    rows = np.empty((end - begin, WIDTH), np.float32)
    for first in range(begin // BLOCK * BLOCK, end, BLOCK):
        drawn = np.random.default_rng([1, n, first]).standard_normal(
            (min(BLOCK, n - first), WIDTH), np.float32
        )
        low, high = max(first, begin), min(first + BLOCK, end)
        rows[low - begin : high - begin] = drawn[low - first : high - first]
    return torch.from_numpy(centres[own] + spread[own, None] * rows)


def worker(n: int) -> None:
    """Measure once, and print this worker's numbers as JSON."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, cores() // size))
    for images in (3000, n):  # the first warms up
        rows = own_rows(images, rank, size)
        group = Group.of(len(rows))
        if images != n:
            sharded_pseudo_labels(rows, group=group)
    clock = Clock()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, wall, cpu = memory_kib("VmRSS"), time.perf_counter(), time.process_time()
    found = sharded_pseudo_labels(rows, group=group)
    clock.wall_s["rest"] = time.perf_counter() - wall - sum(clock.wall_s.values())
    clock.cpu_s["rest"] = time.process_time() - cpu - sum(clock.cpu_s.values())
    told = {
        "wall_s": clock.wall_s,
        "cpu_s": clock.cpu_s,
        "peak_bytes": 1024 * (memory_kib("VmHWM") - before),
        "identities": found.num_identities,
        "kept": int((found.labels >= 0).sum()),
        "labels_sum": int((found.labels * np.arange(1, n + 1)).sum() % (2**61 - 1)),
    }
    print(json.dumps(told), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(n: int, workers: int) -> dict[str, Any]:
    """One row of the result."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(n)],
            env=os.environ | address | {"RANK": str(rank), "WORLD_SIZE": str(workers)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    told = [json.loads(process.communicate()[0]) for process in started]
    cpu = {stage: round(sum(one["cpu_s"][stage] for one in told), 3) for stage in STAGES}
    wall = {stage: round(max(one["wall_s"][stage] for one in told), 3) for stage in STAGES}
    return {
        "images": n,
        "workers": workers,
        "wall_s": wall,
        "cpu_s": cpu,
        "after_neighbours_cpu_s": round(sum(cpu.values()) - cpu["neighbours"], 3),
        "peak_bytes": max(one["peak_bytes"] for one in told),
        **{name: told[0][name] for name in ("identities", "kept", "labels_sum")},
    }


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    """Slope of log(value) over log(images)."""
    n, values = (np.log([row[field] for row in rows]) for field in ("images", name))
    return float(np.polyfit(n, values, 1)[0])


def middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several measurements the one with the median time; of two the faster."""
    ordered = sorted(found, key=lambda row: float(row["after_neighbours_cpu_s"]))
    return ordered[(len(ordered) - 1) // 2] | {"runs": len(found)}


def check_labels(rows: list[dict[str, Any]]) -> None:
    """Labels must not depend on the number of workers."""
    for n in {row["images"] for row in rows}:
        sums = {row["labels_sum"] for row in rows if row["images"] == n}
        if len(sums) > 1:
            raise SystemExit(f"{n} images: labels differ between numbers of workers")


def main() -> None:
    """Measure, fit, save; fails where labels differ or an exponent is too large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="images, by one worker")
    parser.add_argument(
        "--shared-sizes", type=int, nargs="+", default=SHARED_SIZES, help="by several workers"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=(2, 4), help="how many several are")
    parser.add_argument(
        "--runs",
        type=int,
        default=3,
        help=f"of each, one of more than {MOST_REPEATED:,} images (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    if args.runs < 1:
        parser.error(f"--runs: wanted at least 1, found {args.runs}")
    plan = [(n, 1) for n in args.sizes] + [(n, w) for n in args.shared_sizes for w in args.workers]
    measured: dict[tuple[int, int], list[dict[str, Any]]] = {each: [] for each in plan}
    for run in range(args.runs):  # in turn: the machine may be slower for a while
        for n, workers in plan:
            if run == 0 or n <= MOST_REPEATED:
                measured[n, workers].append(measure(n, workers))
                print(json.dumps(measured[n, workers][-1]), flush=True)
    check_labels([row for found in measured.values() for row in found])
    rows = [middle(found) for found in measured.values()]
    alone = [row for row in rows if row["workers"] == 1]
    found = {"time": exponent(alone, "after_neighbours_cpu_s"), "memory": exponent(alone, "peak_bytes")}
    result = {
        "date": datetime.date.today().isoformat(),
        "cores": cores(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "numba", "numpy")},
        "width": WIDTH,
        "prediction": PREDICTION,
        "exponents": {name: round(value, 3) for name, value in found.items()},
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"exponents: time after the neighbours {found['time']:.3f}, memory {found['memory']:.3f}")
    if max(found.values()) > MOST_EXPONENT:
        raise SystemExit(f"an exponent is above {MOST_EXPONENT}")


if __name__ == "__main__":
    main()
