"""The three jobs that run across hosts, small: what they work on, how far they are, and what they give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import torch
from runs import losses_of, tensors_of

from dmx.config import from_tree, read_yaml
from dmx.train.runlog import CONFIG, STEPS, describe_run
from dmx.train.worker import RESULT, train_worker

WORKERS = 2
EMBED_SHARDS, PEOPLE_A_SHARD = 12, 12
FEATURES, PEOPLE = 24_000, 800


@dataclass(frozen=True)
class Job:
    """A command, how far it has come, and which processes do its work.

    Attributes:
        name: what it is called.
        words: the command.
        progress: how far it has come, a number that grows.
        strike_at: the progress at which it is struck.
        workers: what stands in the command line of the processes that do its work.
        word: what the command says when it has noticed a fault; None when it says nothing.
        may_end: whether a fault may end the command with an error, so that it has to be given again.
        difference: what is not as in another folder of results; empty when all is equal.
        results: where its results are.
    """

    name: str
    words: list[str]
    progress: Callable[[], int]
    strike_at: int
    workers: str
    word: str | None
    may_end: bool
    difference: Callable[[Path], str]
    results: Path


def begin_run(folder: Path) -> Path:
    """A tiny run in `folder`, as if interrupted after its first of two epochs; its data lie beside it."""
    settings = tiny.tiny_settings(folder.parent / "data")
    settings["schedule"] |= {"epochs": 1, "stage_two_epoch": 1}
    describe_run(folder, from_tree(("test", settings)))
    train_worker(folder)
    (folder / RESULT).unlink()
    describe_run(
        folder, from_tree(("test", read_yaml(folder / CONFIG)), ("test", {"schedule": {"epochs": 2}}))
    )
    return folder


def train_job(begun: Path, run: Path) -> Job:
    """Go on with a copy of a run."""
    shutil.copytree(begun, run)
    return Job(
        "train",
        ["dmx", "train", "--run", str(run), "--resume", "--workers", str(WORKERS)],
        progress=lambda: _lines(run / STEPS),
        strike_at=_lines(begun / STEPS) + 5,
        workers="RayTrainWorker",
        word="start again",
        may_end=False,
        difference=lambda other: run_difference(run, other),
        results=run,
    )


def embed_job(run: Path, folder: Path, out: Path) -> Job:
    """Embed many shards with a run's model; images are enlarged, so that it takes some seconds."""
    data = folder / "shards"
    if not data.exists():
        people = EMBED_SHARDS * PEOPLE_A_SHARD
        tiny.write_set(data, 4, {"train": people}, PEOPLE_A_SHARD * tiny.CAMERAS * tiny.PER_CAMERA)
    size = ["--height", "256", "--width", "128", "--timeout", "60"]
    return Job(
        "embed",
        ["dmx", "embed", str(run), str(data), "--out", str(out), *size],
        progress=lambda: len(list(out.glob("*.parquet"))),
        strike_at=4,
        workers="Forward",
        word=None,
        may_end=True,
        difference=lambda other: embedding_difference(out, other),
        results=out,
    )


def cluster_job(folder: Path, out: Path) -> Job:
    """Cluster drawn features, many enough that it takes some seconds."""
    features = folder / "features.parquet"
    if not features.exists():
        rng = np.random.default_rng(5)
        rows = rng.normal(size=(PEOPLE, 1, 128)) + 0.5 * rng.normal(size=(PEOPLE, FEATURES // PEOPLE, 128))
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(np.float32).ravel()), 128)
        pq.write_table(pa.table({"embedding": lists}), features)
    return Job(
        "cluster",
        ["dmx", "cluster", str(features), "--out", str(out), "--workers", str(WORKERS)],
        # Its first worker says so when it has read its rows, and searches neighbours from then on.
        progress=lambda: sum(b"read:" in file.read_bytes() for file in out.glob(".launch-*/output")),
        strike_at=1,
        workers="RayTrainWorker",
        word="start again",
        may_end=False,
        difference=lambda other: label_difference(out, other),
        results=out,
    )


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def run_difference(run: Path, other: Path) -> str:
    """Tensors of the last checkpoint and losses of all steps, to the bit."""
    a, b = tensors_of(run), tensors_of(other)
    if a.keys() != b.keys():
        return f"tensors {sorted(a.keys() ^ b.keys())}"
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    if differing:
        return f"tensors {differing}"
    losses, others = losses_of(run), losses_of(other)
    tests, other_tests = (json.loads((x / RESULT).read_text())["tests"] for x in (run, other))
    return "" if (losses, tests) == (others, other_tests) else f"losses {losses} and {others}"


def embedding_difference(out: Path, other: Path) -> str:
    """Rows, keys and embeddings of all parts, to the bit."""
    names = sorted(path.name for path in out.glob("*.parquet"))
    if names != sorted(path.name for path in other.glob("*.parquet")):
        return "other parts"
    differing = [name for name in names if not pq.read_table(out / name).equals(pq.read_table(other / name))]
    return f"parts {differing}" if differing else ""


def label_difference(out: Path, other: Path) -> str:
    a, b = (pq.read_table(folder / "labels.parquet") for folder in (out, other))
    return "" if a.equals(b) else "other labels"
