"""The classifier at millions of identities: time of a step and memory beyond rows and moments.

A step is forward, backward and update of one batch. Compared in the same run: the class-sharded softmax in
blocks with float32 and with bfloat16 rows, over 1 and 2 processes (on GPUs: 1 and all), and the usual way
where it fits: `F.linear`, `F.cross_entropy` and `torch.optim.Adam` in one process.

Every measurement is a process of its own (or W of them), so that its memory is its own: peak of the resident
memory (on a GPU: of what torch allocated) during steps, less what was there before and less rows and moments.
The ways take turns for several rounds; medians over all timed steps count, because the machine is shared. On
a CPU every process has one thread and its own processor time counts, which others' work changes least
(waiting for the other process is not in it); wall time is in the JSON.

    python benchmarks/classifier.py
    python benchmarks/classifier.py --classes 10000 100000 --width 2048 --batch 512
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from classifier_checks import agreement, rounding
from cluster_cpu import environment, forget_peak, peak_bytes

from dmx.distributed import share, use_cores, world
from dmx.train.classifier import Classifier, ClassifierSettings
from dmx.train.softmax import BLOCK_BYTES

CLASSES = (10_000, 100_000, 1_000_000, 4_000_000)
PARTS = ("measured", "agreement", "rounding", "blocks")
WAYS = ("usual", "fp32", "bf16")
SMOOTHING, SCALE, LR, WEIGHT_DECAY = 0.1, 0.5, 3.5e-4, 5e-4
SECONDS, MOST_STEPS = 4.0, 15  # of timed steps in a process; at least two
SWEEP_CLASSES, SWEEP_MB = 100_000, (1, 4, 16, 64)
# Written before the first run, for 2 cores, one process, batch 64, width 128. Rates from trying single
# operations: products 150 GFLOP/s in float32 and 350 in bfloat16 on blocks that fit the cache, 40 on outputs
# that do not; memory 15 GB/s; exponentials 3 G/s. What is measured now has
# one thread a process: twice the time.
PREDICTION = {
    "classes": 4_000_000,
    "operations": {
        "blocks": "5 products of 2 B D a class: forward, twice again, two gradients",
        "usual": "3",
    },
    "bytes_a_weight": {
        "fp32": "32: rows read 3 times and written once, two moments read and written",
        "bf16": "28: rows of 2 bytes read 3 times, their rest once, both written, moments as before",
        "usual": "80: rows 3 times, gradient written and read, Adam in a dozen passes; logits 40 B a class",
    },
    "seconds": {"fp32": 3.7, "bf16": 2.5, "usual": 11.0},
    "beyond_state_mb": {"fp32": 40, "bf16": 40, "usual": 7000},
    "ratio_at_1m": {"seconds": 3, "memory": 50},
    "two_processes": "each half the memory, the same time on the same two cores",
}


# --- one measurement, in a process of its own -------------------------------------------------------------


def usual_step(rows: torch.nn.Parameter, adam: torch.optim.Adam) -> Callable[..., None]:
    """All logits at once, by torch alone."""

    def step(features: torch.Tensor, labels: torch.Tensor) -> None:
        logits = F.linear(features, rows) * SCALE
        F.cross_entropy(logits, labels, label_smoothing=SMOOTHING).backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def dmx_step(classifier: Classifier) -> Callable[..., None]:
    """The classifier's step as training makes it."""

    def step(features: torch.Tensor, labels: torch.Tensor) -> None:
        classifier.loss(features, labels).backward()
        classifier.step()

    return step


def rows_of(classes: int, width: int) -> torch.Tensor:
    """(C, D) unit rows, like centroids."""
    rows = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    for part in rows.split(65536):
        part /= part.norm(dim=1, keepdim=True)
    return rows


def make_step(way: str, place: Any, classes: int, width: int, block_mb: float) -> Callable[..., None]:
    """A classifier of one way and its step."""
    if way == "usual":
        rows = torch.nn.Parameter(rows_of(classes, width).to(place.device))
        return usual_step(rows, torch.optim.Adam([rows], lr=LR, weight_decay=WEIGHT_DECAY))
    settings = ClassifierSettings(
        width, LR, WEIGHT_DECAY, SMOOTHING, SCALE, way, int(block_mb * 2**20)  # type: ignore[arg-type]
    )  # fmt: skip
    return dmx_step(Classifier(place, settings, rows_of(classes, width)))


class Memory:
    """Peak memory of this process since it was made: resident, or allocated on the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.before = torch.cuda.memory_allocated(device)
        else:
            forget_peak()
            self.before = peak_bytes()

    def restart(self) -> None:
        """Forget what was held in between; `before` stays."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            forget_peak()

    def peak(self) -> int:
        """Bytes beyond those at the start."""
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_bytes()
        return now - self.before


def child(args: argparse.Namespace) -> None:
    """Times steps of one way and prints a JSON line; the first process speaks for all."""
    with world() as place:
        if args.device == "cpu":
            place = replace(place, device=torch.device("cpu"))
        use_cores(place)
        images = args.batch // place.size
        generator = torch.Generator().manual_seed(place.rank)

        def batch(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
            features = torch.randn(images, args.width, generator=generator)
            labels = torch.randint(0, classes, (images,), generator=generator)
            return features.to(place.device).requires_grad_(), labels.to(place.device)

        # Thread pools, kernels and autograd come into memory.
        warm = make_step(args.way, place, 2000, args.width, args.block_mb)
        for _ in range(2):
            warm(*batch(2000))
        del warm
        memory = Memory(place.device)
        step = make_step(args.way, place, args.classes, args.width, args.block_mb)
        step(*batch(args.classes))  # makes the moments
        memory.restart()
        wall, processor = list[float](), list[float]()
        while len(wall) < 2 or (len(wall) < MOST_STEPS and sum(wall) < SECONDS):
            inputs = batch(args.classes)
            synchronize(place.device)
            start, begin = time.perf_counter(), time.process_time()
            step(*inputs)
            synchronize(place.device)
            processor.append(time.process_time() - begin)
            wall = share(place, [*wall, time.perf_counter() - start])  # all stop together
        state = 12 * args.width * -(-args.classes // place.size)
        beyond = torch.tensor([memory.peak() - state])
        if place.size > 1:
            dist.all_reduce(beyond, op=dist.ReduceOp.MAX, group=place.control)
        if place.leads:
            timed = {"seconds_all": processor if args.device == "cpu" else wall, "wall_s_all": wall}
            sizes = {"state_bytes": state, "beyond_bytes": int(beyond)}
            args.out.write_text(json.dumps(timed | sizes))


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- all of them ------------------------------------------------------------------------------------------


def measure(
    args: argparse.Namespace, way: str, classes: int, processes: int, block_mb: float
) -> dict[str, Any]:
    """One measurement in `processes` new processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launcher = [sys.executable]
        if processes > 1:
            more = ["--standalone", f"--nproc-per-node={processes}"]
            launcher += ["-m", "torch.distributed.run", *more]
        subprocess.run(
            [*launcher, __file__, "--child", way, "--classes", str(classes), "--block-mb", str(block_mb),
             "--width", str(args.width), "--batch", str(args.batch), "--device", args.device,
             "--out", str(out)],
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def usual_bytes(classes: int, width: int, batch: int) -> int:
    """What the usual way takes: rows, gradient, moments, two temporaries of Adam; logits four times."""
    return classes * (24 * width + 16 * batch)


def compare(args: argparse.Namespace, classes: int) -> list[dict[str, Any]]:
    """Every way at one number of classes, taking turns."""
    plan = [("usual", 1)] + [(way, processes) for processes in args.processes for way in ("fp32", "bf16")]
    wanted = usual_bytes(classes, args.width, args.batch)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for turn in range(args.rounds):
        for way, processes in plan:
            row = rows.setdefault((way, processes), {"classes": classes, "way": way, "processes": processes})
            if way == "usual" and wanted > args.memory_gb * 2**30:
                row["skipped"] = f"wants {wanted / 2**30:.0f} GiB, --memory-gb is {args.memory_gb:g}"
                continue
            found = measure(args, way, classes, processes, args.block_mb)
            for name in ("seconds", "wall_s"):
                row.setdefault(f"{name}_all", []).extend(found[f"{name}_all"])
                row[name] = statistics.median(row[f"{name}_all"])
            row["state_bytes"] = found["state_bytes"]
            row["beyond_bytes"] = max(row.get("beyond_bytes", 0), found["beyond_bytes"])
            print(f"round {turn + 1}:", line(row), flush=True)
    return list(rows.values())


def line(row: dict[str, Any]) -> str:
    """A row to read."""
    name = f"{row['classes']:>9,} classes, {row['way']:>5}, {row['processes']} processes"
    if "seconds" not in row:
        return f"{name}: {row['skipped']}"
    sizes = (
        f"{row['state_bytes'] / 2**20:.0f} MiB of rows and moments, {row['beyond_bytes'] / 2**20:.0f} beyond"
    )
    return f"{name}: {row['seconds']:.4f} s ({len(row['seconds_all'])} steps), {sizes}"


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Step time by size of the blocks."""
    classes = SWEEP_CLASSES
    times: dict[tuple[str, float], list[float]] = {}
    for _ in range(args.rounds):
        for block_mb in SWEEP_MB:
            for way in ("fp32", "bf16"):
                found = measure(args, way, classes, 1, block_mb)
                times.setdefault((way, block_mb), []).extend(found["seconds_all"])
    return [
        {"classes": classes, "way": way, "block_mb": block_mb, "seconds": statistics.median(all_times)}
        for (way, block_mb), all_times in times.items()
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=list(CLASSES))
    parser.add_argument("--width", type=int, default=128, help="feature width (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=64, help="images of all processes (default: %(default)s)"
    )
    gpus = torch.cuda.device_count()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpus else "cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=sorted({1, gpus}) if gpus else [1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="turns of every way (default: %(default)s)")
    parser.add_argument("--memory-gb", type=float, default=9.0, help="the usual way is left out above this")
    parser.add_argument("--block-mb", type=float, help="of temporaries (default: suits the device)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "classifier.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these parts of --out anew")
    parser.add_argument("--child", dest="way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.block_mb = args.block_mb or BLOCK_BYTES[args.device] / 2**20
    if args.way:
        args.classes = args.classes[0]
    return args


def main() -> None:
    """Measure everything and write the JSON."""
    args = parse()
    if args.way:
        child(args)
        return
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {"width": args.width, "batch": args.batch, "device": device_name(args.device),
                     "block_mb": args.block_mb, "rounds": args.rounds, "memory_gb": args.memory_gb},
        "prediction": PREDICTION,
        "measured": [],
    }  # fmt: skip
    parts: list[tuple[str, Callable[[], list[Any]]]] = [
        *(("measured", partial(compare, args, classes)) for classes in args.classes),
        ("agreement", lambda: [agreement(c, args.width, args.batch) for c in args.classes if c <= 1_000_000]),
        ("rounding", rounding),
        ("blocks", partial(sweep, args)),
    ]
    if args.only:  # the rest stays as it was measured
        result = json.loads(args.out.read_text())
        result |= {name: [] for name in args.only}
    torch.set_num_threads(1)
    for name, part in parts:
        if args.only and name not in args.only:
            continue
        result[name] = result.get(name, []) + part()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def device_name(device: str) -> str:
    """What it was measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
