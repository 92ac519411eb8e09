"""A million tiny images through `dmx ingest`, `dmx embed` and `dmx cluster`: how long, and how much memory.

    python benchmarks/load.py                                   # a million: takes 5 GB below --work
    python benchmarks/load.py --images 20000 100000 1000000     # what grows with what

For every number of images a flat folder of JPEGs of 32 x 16 pixels is made: 20 of an identity on average, in
its colours, tinted by one of 8 cameras, which the files' names tell. Then the commands run as a user would
give them, one after the other, each in a process of its own:

    dmx ingest PICTURES DATA --layout crops --camera-pattern 'cam(\\d+)-'
    dmx embed MODEL DATA --out FEATURES --batch-size 256
    dmx cluster FEATURES --out CLUSTERS

The model is the demo's narrow ResNet-18 at half its width, D = 128, untrained, with the statistics of some of
the pictures: what it costs does not depend on its weights. Neighbours are exact, which up to a million images
costs less than inverted lists of the same recall (benchmarks/ivf.py); `--knn ivf` measures those.

Memory is that of a command and all it started, Ray included, read every second: `held` is what the system
cannot take back (heaps, arrays, shared memory); pages of files, which it can, stand beside it.

Interrupted, the same command goes on: pictures where they stand, a command as it does by itself; finished
ones are not repeated. What an interrupted attempt took counts. Writes benchmarks/results/load.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray
from processes import Usage, cpu_seconds, die_with_parent, disk_bytes, processor, usage

from dmx import __version__
from dmx.config import from_tree
from dmx.cores import cores
from dmx.train.purity import cluster_report
from dmx.writing import write_whole

RESULT = Path(__file__).parent / "results" / "load.json"
HEIGHT, WIDTH = 32, 16
PER_IDENTITY, CAMERAS = 20, 8
BLOCK = 10_000  # pictures drawn from a seed of their own
QUALITY = 90
MODEL = {"backbone": "resnet18", "backbone_args": {"channels": [16, 32, 64, 128]}}
BATCH = 256
SAMPLE_S = 1.0
STATE = "measured.json"
STEPS = ("pictures", "ingest", "embed", "cluster")
# What is promised for a million images on 2 cores and 24 GB.
PROMISED = {"images": 1_000_000, "seconds": 3600.0, "held_bytes": 8e9}
# Written down before the first measurement, for a million images on 2 cores that other work shares.
PREDICTION = {
    "seconds": {"pictures": 150, "ingest": 250, "embed": 900, "cluster": 1500},
    "held_gb": {"pictures": 0.6, "ingest": 0.8, "embed": 2.5, "cluster": 4.0},
    "reason": "a picture takes 90 us to draw, encode and write; ingest 60 us to check, 50 us to read and as "
    "much to write; the forward pass some 10 MFLOP, decoding 20 us of a core, Ray and copies as much again; "
    "clustering four times the neighbours of 500,000 rows in benchmarks/scaling.py. Memory: the listing of a "
    "folder, 300 bytes an entry; Ray's processes, 200 MB each, and its store; 0.5 GB of features, twice, and "
    "1.4 KB a row.",
}


def coordinates(length: int, cells: int) -> NDArray[np.float32]:
    """(length, cells) weights that stretch `cells` values over `length` pixels, linearly."""
    at = (np.arange(length) + 0.5) * cells / length - 0.5
    return np.clip(1 - np.abs(at[:, None].clip(0, cells - 1) - np.arange(cells)), 0, 1).astype(np.float32)


def pictures(images: int, first: int) -> Iterator[tuple[str, bytes]]:
    """Names and JPEGs of the pictures `first` to `first + BLOCK - 1` of so many."""
    rng = np.random.default_rng((1, first))
    numbers = np.arange(first, min(first + BLOCK, images))
    cameras = rng.integers(CAMERAS, size=len(numbers))
    tall, wide = coordinates(HEIGHT, 6), coordinates(WIDTH, 3)
    colours = np.stack(
        [np.random.default_rng((0, who)).uniform(30, 225, (6, 3, 3)) for who in identities(images)[numbers]]
    ).astype(np.float32)
    tints = np.random.default_rng(2).uniform(0.95, 1.05, (CAMERAS, 3)).astype(np.float32)
    for number, camera, colour in zip(numbers.tolist(), cameras.tolist(), colours, strict=True):
        pixels = np.einsum("hi,ijc,wj->hwc", tall, colour, wide, optimize=True) * tints[camera]
        pixels += 4 * rng.standard_normal(pixels.shape, np.float32)
        whole = np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8))
        encoded = simplejpeg.encode_jpeg(whole, quality=QUALITY, colorspace="RGB")
        yield f"cam{camera:02d}-{number:08d}.jpg", encoded


def identities(images: int) -> NDArray[np.int64]:
    """Who is on each of so many pictures, in an order that says nothing."""
    return np.random.default_rng(images).integers(max(1, images // PER_IDENTITY), size=images)


@dataclass
class Measured:
    """What is known of one number of images, kept in a file that survives an interruption."""

    images: int
    folder: Path

    def __post_init__(self) -> None:
        path = self.folder / STATE
        self.steps: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def is_done(self, step: str) -> bool:
        return bool(self.steps.get(step, {}).get("done"))

    def attempt(self, step: str) -> dict[str, Any]:
        """A new attempt at a step, to be filled while it runs."""
        attempts = self.steps.setdefault(step, {"done": False, "attempts": []})["attempts"]
        attempts.append({"seconds": 0.0, "cpu_s": 0.0, "load_before": round(os.getloadavg()[0], 2)})
        return attempts[-1]

    def save(self) -> None:
        write_whole(self.folder / STATE, json.dumps(self.steps, indent=1) + "\n")

    def done(self, step: str, **told: Any) -> None:
        self.steps[step] |= {"done": True, **told}
        self.save()
        print(json.dumps(self.row(step)), flush=True)

    def row(self, step: str) -> dict[str, Any]:
        """All attempts at a step together."""
        state = self.steps[step]
        attempts = state["attempts"]
        seconds = sum(attempt["seconds"] for attempt in attempts)
        peaks = [attempt["peak"] for attempt in attempts if "peak" in attempt]
        return {
            "images": self.images, "step": step, "attempts": len(attempts), "seconds": round(seconds, 3),
            "images_per_s": round(self.images / max(seconds, 1e-9), 1),
            "cpu_s": round(sum(attempt["cpu_s"] for attempt in attempts), 1),
            "load_before": attempts[-1]["load_before"], "load_after": attempts[-1].get("load_after"),
            "peak": {name: max(peak[name] for peak in peaks) for name in (peaks[0] if peaks else {})},
            **{name: value for name, value in state.items() if name not in ("done", "attempts")},
        }  # fmt: skip


class Watch:
    """Fills an attempt with what a process and all it started take, whenever it is asked to look."""

    def __init__(self, process: int, attempt: dict[str, Any]) -> None:
        self._process, self._attempt = process, attempt
        self._start, self._peak, self._held = time.monotonic(), Usage(), 0
        self._cpu_s: dict[int, float] = {}

    @property
    def interval_s(self) -> float:
        """How long to wait before the next look: short ones for what may soon be over."""
        return min(SAMPLE_S, 0.1 + (time.monotonic() - self._start) / 10)

    def look(self) -> None:
        """Read once more, and keep what is most."""
        found = usage(self._process)
        self._peak = self._peak.raised_to(found)
        self._held = max(self._held, found.held_bytes)
        self._cpu_s |= cpu_seconds(self._process)
        self._attempt |= {
            "seconds": time.monotonic() - self._start, "cpu_s": sum(self._cpu_s.values()),
            "load_after": round(os.getloadavg()[0], 2),
            "peak": self._peak.tree() | {"held_bytes": self._held},
        }  # fmt: skip


def run(measured: Measured, step: str, command: list[str]) -> str:
    """A command of DMX in a process of its own, watched to its end; returns what it printed."""
    attempt, log = measured.attempt(step), measured.folder / f"{step}.log"
    with open(log, "w", encoding="utf-8") as out, open(log.with_suffix(".err"), "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "dmx", *command], stdout=out, stderr=errors, preexec_fn=die_with_parent
        )
        watch = Watch(process.pid, attempt)
        try:
            while True:
                watch.look()
                measured.save()
                try:
                    status = process.wait(watch.interval_s)
                    break
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.terminate()
            process.wait()
            raise
    # A process that has ended has no memory to read: only the time is as late as it can be.
    watch.look()
    if status:
        measured.save()
        told = log.with_suffix(".err").read_text()[-4000:]
        raise SystemExit(f"dmx {' '.join(command)} ended with {status}:\n{told}")
    return log.read_text(encoding="utf-8")


def make_pictures(measured: Measured) -> None:
    """Write the pictures that are missing; a block that was begun is written again."""
    folder = measured.folder / "pictures"
    folder.mkdir(exist_ok=True)
    attempt = measured.attempt("pictures")
    watch = Watch(os.getpid(), attempt)
    state = measured.steps["pictures"]
    for first in range(state.get("made", 0), measured.images, BLOCK):
        for name, encoded in pictures(measured.images, first):
            (folder / name).write_bytes(encoded)
        state["made"] = min(first + BLOCK, measured.images)
        watch.look()
        measured.save()
    watch.look()
    measured.done("pictures", disk_bytes=disk_bytes(folder))


def ingest(measured: Measured) -> None:
    """`dmx ingest`: a folder of files to shards."""
    folder = measured.folder
    words = ["--layout", "crops", "--camera-pattern", r"cam(\d+)-", "--overwrite"]
    run(measured, "ingest", ["ingest", str(folder / "pictures"), str(folder / "data"), *words])
    measured.done("ingest", disk_bytes=disk_bytes(folder / "data"))


def embed(measured: Measured) -> None:
    """`dmx embed`: shards to features."""
    folder = measured.folder
    if not (folder / "model").exists():
        untrained_model(folder / "model", folder / "data")
    words = ["--out", str(folder / "features"), "--batch-size", str(BATCH)]
    run(measured, "embed", ["embed", str(folder / "model"), str(folder / "data"), *words])
    measured.done("embed", disk_bytes=disk_bytes(folder / "features"))


def cluster(measured: Measured, knn: str, launcher: str) -> None:
    """`dmx cluster`: features to pseudo-identities, and how pure they are."""
    folder = measured.folder
    words = ["--out", str(folder / "clusters"), "--knn", knn, "--launcher", launcher]
    run(measured, "cluster", ["cluster", str(folder / "features"), *words])
    told = json.loads((folder / "clusters" / "clusters.json").read_text(encoding="utf-8"))
    labels = pq.read_table(folder / "clusters" / "labels.parquet")
    if labels.num_rows != measured.images:
        raise SystemExit(f"wanted {measured.images} labels, found {labels.num_rows}")
    numbers = np.array([int(key.rpartition("-")[2][:-4]) for key in labels["key"].to_pylist()])
    report = cluster_report(labels["label"].to_numpy(), identities(measured.images)[numbers])
    timings = {name: value for name, value in told.items() if name.endswith("_s")}
    measured.done(
        "cluster", knn=knn, launcher=launcher, disk_bytes=disk_bytes(folder / "clusters"),
        width=told["width"], timings=timings, found=report,
    )  # fmt: skip


def untrained_model(folder: Path, data: Path) -> None:
    """A checkpoint whose normalisations have the statistics of some pictures."""
    # Seconds, which a load that goes on behind this step need not wait for.
    import torch

    from dmx.data.dataset import open_dataset
    from dmx.data.transforms import normalise_batch
    from dmx.embedding import decode_rows
    from dmx.model import build_model
    from dmx.train.checkpoint import Progress, write_checkpoint

    config = from_tree(("load", {"model": MODEL, "data": {"height": HEIGHT, "width": WIDTH}}))
    torch.manual_seed(0)
    model = build_model(config.model).train()
    split = open_dataset(str(data)).split("train")
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(50):  # their moving means, with a momentum of 0.1, forget where they began
            rows = np.sort(rng.choice(len(split), min(BATCH, len(split)), replace=False))
            model(normalise_batch(torch.from_numpy(decode_rows(split, rows, HEIGHT, WIDTH)[0])))
    write_checkpoint(folder, Progress(seed=0), config, {"model": model.state_dict()}, keep=1)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    names = ("torch", "ray", "numpy", "numba", "pyarrow", "simplejpeg")
    return {
        "date": datetime.date.today().isoformat(), "cpu": processor(), "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {"dmx": __version__} | {name: importlib.metadata.version(name) for name in names},
    }  # fmt: skip


def record(path: Path, measured: Measured) -> None:
    """Put the rows of one number of images in the place of those that were there."""
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [row for row in old if row["images"] != measured.images]
    rows += [measured.row(step) for step in STEPS if measured.is_done(step)]
    result = {
        "environment": environment(), "promised": PROMISED, "prediction": PREDICTION,
        "image": [HEIGHT, WIDTH], "images_an_identity": PER_IDENTITY, "model": MODEL, "batch": BATCH,
        "rows": sorted(rows, key=lambda row: (row["images"], STEPS.index(row["step"]))),
    }  # fmt: skip
    write_whole(path, json.dumps(result, indent=1) + "\n")


def broken_promises(measured: Measured) -> list[str]:
    """What took more than it may, the making of the pictures left out."""
    if measured.images > PROMISED["images"]:
        return []
    rows = [measured.row(step) for step in STEPS[1:]]
    seconds, held = sum(row["seconds"] for row in rows), max(row["peak"]["held_bytes"] for row in rows)
    found = []
    if seconds > PROMISED["seconds"]:
        found.append(f"{seconds:.0f} s, promised are {PROMISED['seconds']:.0f}")
    if held > PROMISED["held_bytes"]:
        found.append(f"{held / 1e9:.1f} GB, promised are {PROMISED['held_bytes'] / 1e9:.0f}")
    return found


def main() -> None:
    """Do what is not done yet, and write the result after every step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[PROMISED["images"]], metavar="N")
    parser.add_argument(
        "--knn", choices=("exact", "ivf"), default="exact", help="neighbours (default: %(default)s)"
    )
    parser.add_argument(
        "--launcher", choices=("ray", "inline"), default="ray", help="of dmx cluster (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, default=Path("load"), help="pictures, data sets and features")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if min(args.images) < PER_IDENTITY:
        parser.error(f"--images: wanted at least {PER_IDENTITY}, found {min(args.images)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, too
    broken = []
    for images in args.images:
        folder = args.work.resolve() / str(images)
        folder.mkdir(parents=True, exist_ok=True)
        measured = Measured(images, folder)
        steps: dict[str, Callable[[], None]] = {
            "pictures": lambda m=measured: make_pictures(m),
            "ingest": lambda m=measured: ingest(m),
            "embed": lambda m=measured: embed(m),
            "cluster": lambda m=measured: cluster(m, args.knn, args.launcher),
        }
        for step, do in steps.items():
            if not measured.is_done(step):
                do()
                record(args.out, measured)
        record(args.out, measured)
        broken += [f"{images:,} images: {found}" for found in broken_promises(measured)]
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
