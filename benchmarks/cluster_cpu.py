"""Pseudo-labels on the CPU: DMX against the published dense way of working, in the same run.

The dense way is what public label generators do, written anew: exact neighbours with faiss, a NumPy loop that
fills a dense N x N encoding, query expansion and Jaccard distance over dense N x N arrays with an inverted
index, scikit-learn's DBSCAN on the full matrix at three radii, and dense N x N label matrices for the
reliability. It works in float32, DMX in float64 after the candidates; all labels have to be equal.

Each way runs in a process of its own, so that peak memory (VmHWM less what was there before the first stage)
is its own. Both get the same threads, and are warmed up on a few rows first (compilation, thread pools).

    python benchmarks/cluster_cpu.py --sizes 2048 8192 16384
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

K1, K2, EPS, GAP, MIN_SAMPLES, MIN_SIZE = 30, 6, 0.6, 0.02, 4, 5
WIDTH = 2048
STAGES = ("neighbours", "encode", "jaccard", "dbscan", "reliability")
# Written before the first run of this comparison (DMX stages had been timed), for two free cores at N = 8 k.
PREDICTION = {
    "images": 8192,
    "reason": "275 GFLOP: faiss in float32 at 190 GFLOP/s plus selection; DMX half of it in bfloat16 at 800 "
    "GFLOP/s plus scan and 0.5 M float64 dot products. After it: dense loops of about 2 ms an image, "
    "DMX 0.6 M entries and 12 M probes at a few ns.",
    "dense_s": {"neighbours": 3.0, "after": 20.0},
    "dmx_s": {"neighbours": 0.7, "after": 0.15},
    "speedup": {"all": 27, "after_neighbours": 130},
    "memory_share": 0.06,
}
Result = TypeVar("Result")


class Clock:
    """Wall and CPU seconds by stage."""

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}

    def __call__(self, stage: str, work: Callable[..., Result], *arguments: Any) -> Result:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work(*arguments)
        self.wall_s[stage] = self.wall_s.get(stage, 0) + time.perf_counter() - wall
        self.cpu_s[stage] = self.cpu_s.get(stage, 0) + time.process_time() - cpu
        return result


def people(n: int, seed: int) -> np.ndarray:
    """(n, 2048) float32: 16 images an identity on average, some identities tighter than others."""
    rng = np.random.default_rng(seed)
    identity = rng.integers(0, n // 16, n)
    spread = rng.uniform(1.5, 5.0, n // 16).astype(np.float32)
    spread_of = spread[identity] * rng.uniform(0.8, 1.25, n).astype(np.float32)
    centres = rng.standard_normal((n // 16, WIDTH), dtype=np.float32)
    x = rng.standard_normal((n, WIDTH), dtype=np.float32)
    x *= spread_of[:, None]
    x += centres[identity]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


# --- the dense way ----------------------------------------------------------------------------------------


def dense_neighbours(x: np.ndarray) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x)
    return np.asarray(index.search(x, min(K1, len(x)))[1])


def mutual_neighbours(ranks: np.ndarray, i: int, k: int) -> np.ndarray:
    forward = ranks[i, :k]
    return forward[np.where(ranks[forward, :k] == i)[0]]


def dense_encoding(x: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The dense way's V (N, N) float32 of k-reciprocal sets, query expansion included."""
    n, half = len(x), round(K1 / 2) + 1
    full_sets = [mutual_neighbours(ranks, i, K1) for i in range(n)]
    half_sets = [mutual_neighbours(ranks, i, half) for i in range(n)]
    v = np.zeros((n, n), np.float32)
    for i in range(n):
        expanded = full_sets[i]
        for j in full_sets[i]:
            if len(np.intersect1d(half_sets[j], full_sets[i])) > 2 / 3 * len(half_sets[j]):
                expanded = np.append(expanded, half_sets[j])
        expanded = np.unique(expanded)
        weight = np.exp(-(2 - 2 * (x[expanded] @ x[i])))
        v[i, expanded] = weight / weight.sum()
    averaged = np.zeros_like(v)
    for i in range(n):
        averaged[i] = v[ranks[i, :K2]].mean(axis=0)
    return averaged


def dense_jaccard(v: np.ndarray) -> np.ndarray:
    """The dense way's Jaccard distances (N, N) float32 from V, by lists of the rows that hold a column."""
    n = len(v)
    holders = [np.where(v[:, e] != 0)[0] for e in range(n)]
    distances = np.zeros((n, n), np.float32)
    for i in range(n):
        shared = np.zeros(n, np.float32)
        for e in np.where(v[i] != 0)[0]:
            shared[holders[e]] += np.minimum(v[i, e], v[holders[e], e])
        distances[i] = 1 - shared / (2 - shared)
    distances[distances < 0] = 0
    return distances


def dense_dbscan(distances: np.ndarray) -> list[np.ndarray]:
    from sklearn.cluster import DBSCAN

    return [
        DBSCAN(eps=eps, min_samples=MIN_SAMPLES, metric="precomputed", n_jobs=-1).fit_predict(distances)
        for eps in (EPS - GAP, EPS, EPS + GAP)
    ]


def dense_reliability(three: list[np.ndarray]) -> np.ndarray:
    """The dense way's labels (N,): reliability from N x N matrices of equal labels."""
    import torch

    n = len(three[0])
    numbered = []
    for found in three:
        labels, own = torch.from_numpy(found.astype(np.int64)), int(found.max()) + 1
        outliers = labels < 0
        labels[outliers] = own + torch.arange(int(outliers.sum()))
        numbered.append(labels)
    tight, base, loose = ((labels.expand(n, n) == labels.expand(n, n).t()).float() for labels in numbered)
    comp = 1 - torch.min(base, tight).sum(1) / torch.max(base, tight).sum(1)
    indep = 1 - torch.min(base, loose).sum(1) / torch.max(base, loose).sum(1)
    cluster_comp: dict[int, float] = {}
    cluster_indep: dict[int, float] = {}
    size: dict[int, int] = {}
    for c, a, b in zip(numbered[1].tolist(), comp.tolist(), indep.tolist(), strict=True):
        cluster_comp[c] = min(a, cluster_comp.get(c, 1.0))
        cluster_indep[c] = min(b, cluster_indep.get(c, 1.0))
        size[c] = size.get(c, 0) + 1
    ranked = sorted(value for c, value in cluster_indep.items() if size[c] > 1)
    threshold = ranked[min(round(0.9 * len(ranked)), len(ranked) - 1)]
    kept: dict[int, list[int]] = {}
    for i, (c, a) in enumerate(zip(numbered[1].tolist(), comp.tolist(), strict=True)):
        if cluster_indep[c] <= threshold and a <= cluster_comp[c]:
            kept.setdefault(c, []).append(i)
    out = np.full(n, -1, np.int64)
    for number, c in enumerate(sorted(c for c in kept if len(kept[c]) >= MIN_SIZE)):
        out[kept[c]] = number
    return out


def run_dense(x: np.ndarray, clock: Clock) -> dict[str, np.ndarray]:
    ranks = clock("neighbours", dense_neighbours, x)
    v = clock("encode", dense_encoding, x, ranks)
    distances = clock("jaccard", dense_jaccard, v)
    del v
    three = clock("dbscan", dense_dbscan, distances)
    del distances
    labels = clock("reliability", dense_reliability, three)
    return {"labels": labels, "tight": three[0], "base": three[1], "loose": three[2]}


# --- DMX --------------------------------------------------------------------------------------------------


def run_dmx(x: np.ndarray, clock: Clock) -> dict[str, np.ndarray]:
    """The steps of `pseudo_labels`, one by one, to time them."""
    from dmx.cluster.reliability import reliable
    from dmx.cluster.validation import as_features, as_radii
    from dmx.kernels.dbscan import dbscan
    from dmx.kernels.jaccard import jaccard_pairs
    from dmx.kernels.k_reciprocal import k_reciprocal
    from dmx.kernels.knn import self_knn

    radii = as_radii(EPS, GAP)
    rows, squares = clock("neighbours", as_features, x, "cpu")
    near = clock("neighbours", lambda: self_knn(rows, K1, squares=squares))
    v = clock("encode", lambda: k_reciprocal(rows, near, K1, K2, squares=squares))
    pairs = clock("jaccard", jaccard_pairs, v, radii[2])
    tight, base, loose = clock("dbscan", dbscan, pairs, radii, MIN_SAMPLES).numpy()
    found = clock("reliability", reliable, tight, base, loose, MIN_SIZE, None)
    return {"labels": found.labels, "tight": tight, "base": base, "loose": loose}


# --- one process a way ------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """High-water mark of this process's memory since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status; this benchmark needs Linux")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def child(way: str, features: Path, repeats: int, out: Path) -> None:
    """Runs one way and writes its labels, seconds and peak memory."""
    run = run_dense if way == "dense" else run_dmx
    x = np.load(features)
    run(x[:1024].copy(), Clock())
    forget_peak()
    before = peak_bytes()
    clocks = []
    for _ in range(repeats):
        clocks.append(Clock())
        result = run(x, clocks[-1])
    peak = peak_bytes() - before
    times = {
        kind: {stage: [getattr(clock, kind)[stage] for clock in clocks] for stage in STAGES}
        for kind in ("wall_s", "cpu_s")
    }
    np.savez(out.with_suffix(".npz"), **result)
    out.with_suffix(".json").write_text(json.dumps({"peak_bytes": peak, **times}))


def measure(
    way: str, features: Path, repeats: int, folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Labels, and median seconds and peak memory, of one way in processes of its own."""
    out = folder / way
    arguments = ["--way", way, "--features", str(features), "--repeats", str(repeats), "--out", str(out)]
    subprocess.run([sys.executable, __file__, *arguments], check=True)
    data = json.loads(out.with_suffix(".json").read_text())
    row: dict[str, Any] = {"repeats": repeats, "peak_mb": round(data["peak_bytes"] / 1e6, 1)}
    for kind in ("wall_s", "cpu_s"):
        medians = {stage: statistics.median(data[kind][stage]) for stage in STAGES}
        totals = [sum(values) for values in zip(*data[kind].values(), strict=True)]
        after = [total - first for total, first in zip(totals, data[kind]["neighbours"], strict=True)]
        row[kind] = {
            **medians,
            "after_neighbours": statistics.median(after),
            "all": statistics.median(totals),
        }
        row[kind] = {stage: round(value, 4) for stage, value in row[kind].items()}
    with np.load(out.with_suffix(".npz")) as arrays:
        return dict(arrays), row


def compare(n: int, seed: int, repeats: int, dense_repeats: int) -> dict[str, Any]:
    """Both ways on the same features of N images; ends the program when a label differs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "features.npy", people(n, seed))
        dense_labels, dense = measure("dense", folder / "features.npy", dense_repeats, folder)
        dmx_labels, dmx = measure("dmx", folder / "features.npy", repeats, folder)
    differ = {key: int((dense_labels[key] != dmx_labels[key]).sum()) for key in dmx_labels}
    if any(differ.values()):
        raise SystemExit(f"labels differ at N = {n}: {differ}")
    labels = dmx_labels["labels"]

    def ratios(kind: str) -> dict[str, float]:
        return {part: round(dense[kind][part] / dmx[kind][part], 1) for part in ("all", "after_neighbours")}

    row = {
        "images": n, "width": WIDTH, "labels_equal": True, "identities": int(labels.max()) + 1,
        "kept_share": round(float((labels >= 0).mean()), 3),
        "outlier_share": round(float((dmx_labels["base"] < 0).mean()), 3),
        "dense": dense, "dmx": dmx,
        "speedup": ratios("wall_s"), "speedup_cpu_time": ratios("cpu_s"),
        "memory_share": round(dmx["peak_mb"] / dense["peak_mb"], 4),
    }  # fmt: skip
    print(json.dumps(row, indent=1), flush=True)
    return row


def environment() -> dict[str, Any]:
    """What the figures depend on: processor, cores, load and versions."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    packages = ("numpy", "scipy", "numba", "torch", "faiss-cpu", "scikit-learn")
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2), **{name: version(name) for name in packages},
    }  # fmt: skip


def main() -> None:
    """Compare at every size and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5, help="runs of DMX, of which the median counts")
    parser.add_argument("--dense-repeats", type=int, default=3, help="runs of the dense way")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cluster_cpu.json")
    parser.add_argument("--way", choices=("dense", "dmx"), help=argparse.SUPPRESS)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        child(arguments.way, arguments.features, arguments.repeats, arguments.out)
        return
    result: dict[str, Any] = {"environment": environment(), "prediction": PREDICTION, "measured": []}
    for n in arguments.sizes:
        result["measured"].append(compare(n, arguments.seed, arguments.repeats, arguments.dense_repeats))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
