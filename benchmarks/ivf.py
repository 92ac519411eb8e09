"""Approximate neighbours from inverted lists (`knn: ivf`) against exact ones, in the same run, on the CPU.

Recall is the share of the exact neighbours of all rows that were found, counted against `self_knn`; beside it
stands the recall that `ivf_neighbours` itself measures on 1000 rows. Wall times of a busy machine say little,
so CPU seconds stand beside them. Exact and approximate runs take turns; medians count, the first is warmed up
on a few rows.

Features: made for this purpose, not those of a network. 20 images an identity on average and 8 cameras;
identities, cameras and noise share a spectrum that falls as 1 / i, as that of images' features roughly does.
With k = 30, ten or so of the neighbours are other identities, whose place is mostly chance: these are what
lists miss.

    nice python benchmarks/ivf.py --sizes 20000 50000 100000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dmx.cluster.approximate import PROBES, default_lists, ivf_neighbours
from dmx.cluster.sharded import Group
from dmx.cluster.validation import as_features
from dmx.kernels.knn import Neighbours, self_knn

K, WIDTH, PER_IDENTITY, CAMERAS = 30, 128, 20, 8
Result = TypeVar("Result")


def people(n: int, seed: int) -> np.ndarray:
    """(n, 128) float32 unit rows; see above."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, WIDTH + 1, dtype=np.float32) ** -0.5

    def drawn(rows: int) -> np.ndarray:
        return rng.standard_normal((rows, WIDTH), dtype=np.float32) * scale

    centres, cameras = drawn(n // PER_IDENTITY), 0.3 * drawn(CAMERAS)
    spread = rng.uniform(0.25, 0.75, (len(centres), 1)).astype(np.float32)
    who, where = rng.integers(len(centres), size=n), rng.integers(CAMERAS, size=n)
    x = centres[who] + cameras[where] + spread[who] * drawn(n)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class Clock:
    """Wall and CPU seconds of the runs of one way."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    def __call__(self, work: Callable[[], Result]) -> Result:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)
        return result

    def row(self) -> dict[str, float]:
        return {
            "wall_s": round(statistics.median(self.wall_s), 2),
            "cpu_s": round(statistics.median(self.cpu_s), 2),
        }


def recall_of_all(found: Neighbours, exact: Neighbours) -> float:
    """Share of the exact neighbours found; who is as similar as the last of the exact ones is one of them."""
    right = found.similarities[:, 1:] >= exact.similarities[:, -1:]
    return float(right.double().mean())


class Size:
    """Exact and approximate neighbours of N rows, measured in turns."""

    def __init__(self, n: int, probes: list[int]) -> None:
        self.n, self.exact = n, Clock()
        self.ivf = {p: Clock() for p in probes}
        self.told: dict[int, dict[str, Any]] = {}

    def turn(self) -> None:
        """One more run of each way."""
        rows, squares = as_features(people(self.n, 0), "cpu")
        self_knn(rows[:1000], K)
        ivf_neighbours(Group.of(1000), rows[:1000], squares[:1000], K)
        exact = self.exact(lambda: self_knn(rows, K, squares=squares))
        for p, clock in self.ivf.items():
            found = clock(partial(ivf_neighbours, Group.of(self.n), rows, squares, K, probes=p))
            self.told[p] = {
                "recall": round(recall_of_all(found.neighbours, exact), 4),
                "recall_of_sample": round(found.recall, 4),
                "sampled": found.sampled,
            }

    def row(self) -> dict[str, Any]:
        """Medians of the turns so far; ratios above 1 are where lists are faster."""
        exact, ways = self.exact.row(), []
        for p, clock in self.ivf.items():
            row = clock.row()
            ratios = {f"exact_over_ivf_{kind}": round(exact[kind] / row[kind], 2) for kind in row}
            ways.append({"probes": p, **self.told[p], **row, **ratios})
        repeats = len(self.exact.wall_s)
        return {
            "rows": self.n, "lists": default_lists(self.n), "repeats": repeats, "exact": exact, "ivf": ways
        }  # fmt: skip


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    packages = ("numpy", "numba", "torch", "faiss-cpu")
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "load_before": round(os.getloadavg()[0], 2),
        **{name: version(name) for name in packages},
    }  # fmt: skip


def main() -> None:
    """Measure at every size and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 50_000, 100_000])
    parser.add_argument("--probes", type=int, nargs="+", default=[32, 128, PROBES])
    parser.add_argument("--repeats", type=int, default=3, help="turns over all sizes; each is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ivf.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "environment": environment(), "k": K, "width": WIDTH, "images_an_identity": PER_IDENTITY,
        "default_probes": PROBES, "measured": [],
    }  # fmt: skip
    sizes = [Size(n, sorted(set(arguments.probes))) for n in arguments.sizes]
    for _ in range(arguments.repeats):
        for size in sizes:
            size.turn()
            print(json.dumps(size.row()), flush=True)
            result["measured"] = [other.row() for other in sizes if other.told]
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
