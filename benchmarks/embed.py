"""How much of the bare forward pass `dmx embed` keeps, and what memory it takes for more images.

    python benchmarks/embed.py

Rendered people of 256 x 128 are ingested, and the whole of `dmx embed` is run on them in processes of its
own: shards, decoding, forward pass, Parquet. In turn with it, the bare forward pass runs on batches of pixels
that lie in memory, with the same model, batch size, precision and number of threads, at the niceness of this
process, while Ray lets its workers give way to others; what counts is images a second from the first batch
to the last. Memory is that of all processes of the command, shared memory
included, for some images and for several times as many. On the CPU it also measures whether compiling the
model pays, and bfloat16. Writes benchmarks/results/embed.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from synth import cpu_model

from dmx import __version__
from dmx.config import from_tree
from dmx.cores import cores
from dmx.data.dataset import open_dataset
from dmx.data.shards import DatasetWriter
from dmx.embedding import decode_rows, unit_features
from dmx.extraction.stages import Player, prepared
from dmx.model import build_model
from dmx.synth.dataset import Request, write_dataset
from dmx.train.checkpoint import Progress, load_model, write_checkpoint
from dmx.train.engines import computes_in_bf16

RESULT = Path(__file__).parent / "results" / "embed.json"
HEIGHT, WIDTH, BATCH = 256, 128, 64
ROWS_PER_SHARD = 512
# Adding up the memory of a process stops it from taking more meanwhile: more often, it would slow down what
# is measured.
SAMPLE_S = 2.0


def checkpoint(folder: Path, backbone: str) -> Path:
    """A run folder with an untrained model."""
    config = from_tree(
        ("benchmark", {"model": {"backbone": backbone}, "data": {"height": HEIGHT, "width": WIDTH}})
    )
    state = build_model(config.model).state_dict()
    write_checkpoint(folder, Progress(seed=0), config, {"model": state}, keep=1)
    return folder


def ingest(people: list[bytes], folder: Path, images: int) -> Path:
    """`images` rows of shards, the people again and again."""
    with DatasetWriter(folder, layout="crops", rows_per_shard=ROWS_PER_SHARD) as writer:
        for row in range(images):
            writer.add("train", people[row % len(people)], -1, -1, f"{row}.jpg")
    return folder


def private_bytes(pid: int) -> int:
    """Memory of a process that no other shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


class Usage:
    """What a process and its descendants take: the most memory at a time, and the time of cores.

    Attributes:
        private: bytes of memory that no other process shares.
        shared: bytes of shared memory that the machine took meanwhile.
        cpu_s: seconds of cores, of processes that have ended too.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.private, self.shared = 0, 0
        self._cpu_s: dict[int, float] = {}
        self._process, self._done = psutil.Process(process.pid), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu_s.values())

    def _watch(self) -> None:
        before = psutil.virtual_memory().shared
        while not self._done.wait(SAMPLE_S):
            held = 0
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for member in family:
                try:
                    times = member.cpu_times()
                    self._cpu_s[member.pid] = times.user + times.system
                    held += private_bytes(member.pid)
                except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                    continue
            self.private = max(self.private, held)
            self.shared = max(self.shared, psutil.virtual_memory().shared - before)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def pipeline(run: Path, dataset: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """`dmx embed` in a process of its own: its rate once batches come, all its time, and its memory."""
    command = [sys.executable, "-m", "dmx", "embed", str(run), str(dataset), "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    usage = Usage(process)
    printed, errors = process.communicate(timeout=3600)
    usage.stop()
    if process.returncode:
        raise SystemExit(errors)
    told = re.search(r"(\d+) images embedded.*\(([\d.]+) images/s", printed)
    if told is None:
        raise SystemExit(printed)
    return {
        "images": int(told[1]), "images_per_s": float(told[2]),
        "command_s": time.perf_counter() - start, "cpu_s": usage.cpu_s,
        "private_bytes": usage.private, "shared_bytes": usage.shared,
    }  # fmt: skip


def bare(model: torch.nn.Module, pixels: NDArray[np.uint8], images: int, device: str) -> dict[str, float]:
    """The forward pass alone, over about `images` images: images a second, and seconds of cores an image."""
    with torch.inference_mode():
        unit_features(model, pixels, device)
        start, cpu = time.perf_counter(), time.process_time()
        rounds = max(1, images // len(pixels))
        for _ in range(rounds):
            unit_features(model, pixels, device)
    count = rounds * len(pixels)
    return {
        "images_per_s": count / (time.perf_counter() - start),
        "cpu_s_per_image": (time.process_time() - cpu) / count,
    }


def models(run: Path, pixels: NDArray[np.uint8], images: int, device: str) -> list[dict[str, Any]]:
    """What the bare forward pass takes in both precisions, and compiled, in turn."""
    rows: list[dict[str, Any]] = []
    players = {}
    for precision, compiled in (("fp32", False), ("bf16", False), ("bf16", True)):
        player = Player(device, cores(), precision, compiled, False, HEIGHT, WIDTH, BATCH)
        model = prepared(load_model(run)[0], player)
        start = time.perf_counter()
        with torch.inference_mode():
            unit_features(model, pixels, device)
        rows.append(
            {"precision": precision, "compiled": compiled, "first_call_s": time.perf_counter() - start}
        )
        players[precision, compiled] = model
    rates: dict[Any, list[float]] = {key: [] for key in players}
    for _ in range(3):
        for key, model in players.items():
            rates[key].append(
                bare(model, pixels, images, device)["cpu_s_per_image" if device == "cpu" else "images_per_s"]
            )
    for row in rows:
        measure = statistics.median(rates[row["precision"], row["compiled"]])
        row["images_per_s" if device == "cuda" else "cpu_ms_per_image"] = (
            measure if device == "cuda" else 1e3 * measure
        )
    return rows


def main() -> None:
    """Measure all, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="resnet50", help="of timm (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2048, help="of a measured run (default: %(default)s)")
    parser.add_argument("--times", type=int, default=3, help="as many for the memory (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each, in turn (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.runs < 2:
        parser.error(f"--runs: wanted at least 2, some images and more of them, found {args.runs}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bf16" if computes_in_bf16(device) else "fp32"
    torch.set_num_threads(cores())
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(
            folder / "people", Request(style="street", identities=4, images=20, height=HEIGHT, seed=0)
        )
        people = [path.read_bytes() for path in sorted((folder / "people").rglob("*.jpg"))]
        run = checkpoint(folder / "run", args.backbone)
        small = ingest(people, folder / "small", args.images)
        large = ingest(people, folder / "large", args.times * args.images)
        pixels, _, _ = decode_rows(open_dataset(small).split("train"), np.arange(BATCH), HEIGHT, WIDTH)
        ways = models(run, pixels, args.images // 8, device)
        print(json.dumps(ways, indent=1), flush=True)
        player = Player(device, cores(), precision, False, False, HEIGHT, WIDTH, BATCH)
        model = prepared(load_model(run)[0], player)
        options = ["--batch-size", str(BATCH), "--precision", precision, "--compile", "off"]
        for turn in range(args.runs):
            before = bare(model, pixels, args.images // 2, device)
            row = pipeline(run, large if turn == args.runs - 1 else small, folder / f"out{turn}", options)
            after = bare(model, pixels, args.images // 2, device)
            for name in before:
                row[f"bare_{name}"] = statistics.mean((before[name], after[name]))
            row["share"] = row["images_per_s"] / row["bare_images_per_s"]
            runs.append(row)
            print(json.dumps(row), flush=True)
    # What an image more takes: what starting takes is in both runs.
    small_run, large_run = runs[-2:]
    more = large_run["images"] - small_run["images"]
    marginal = (large_run["cpu_s"] - small_run["cpu_s"]) / more
    bare_cpu = statistics.median(row["bare_cpu_s_per_image"] for row in runs)
    result = {
        "cpu": cpu_model(), "cores": cores(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "backbone": args.backbone, "batch": BATCH, "image": [HEIGHT, WIDTH], "precision": precision,
        "shard_rows": ROWS_PER_SHARD,
        "versions": {"dmx": __version__}
        | {name: importlib.metadata.version(name) for name in ("torch", "ray", "timm")},
        "cpu_s_per_image": marginal, "bare_cpu_s_per_image": bare_cpu, "cpu_share": bare_cpu / marginal,
        "forward": ways, "runs": runs, "share": statistics.median(row["share"] for row in runs),
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
