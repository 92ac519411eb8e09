"""Commands on a disk that is full or read-only: an error that says so, nothing half, and the same again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disks import Disk, small_disk
from runs import prepare, write_run
from tiny import write_set

from dmx.cli import main
from dmx.data.dataset import open_dataset
from dmx.extraction.plan import Output, Part
from dmx.extraction.stages import FEATURES
from dmx.extraction.writing import write_part
from dmx.features import Features
from dmx.train.runlog import STEPS, read_lines
from dmx.train.worker import train_worker

SYNTH = ["synth", "{disk}/people", "--identities", "3", "--images", "4", "--height", "64", "--jobs", "1"]
SHEET = ["synth", "--sheet", "{disk}/s.png", "--style", "street", "--identities", "1", "--images", "2"]
SEARCH = ["search", "{unseen}", "{unseen}", "--model", "{model}", "--split", "gallery"]
# Kilobytes of the disk: enough to begin with, not for all.
COMMANDS = {
    "ingest": (16, ["ingest", "{raw}", "{disk}/set"]),
    "synth": (16, SYNTH),
    "sheet": (4, [*SHEET, "--height", "64"]),
    "cluster": (24, ["cluster", "{features}", "--out", "{disk}/c", "--launcher", "inline", "--k1", "8"]),
    "export": (64, ["export", "{model}", "{disk}/export", "--formats", "safetensors"]),
    "index": (24, [*SEARCH, "--index", "{disk}/index"]),
    "html": (16, [*SEARCH, "--out", "{disk}/ranking.html"]),
    "json": (16, [*SEARCH, "--out", "{disk}/ranking.json"]),
    "report": (16, ["report", "{run}", "--out", "{disk}/report.html", "--no-tests"]),
    "train": (12, ["train", "--run", "{disk}/run", "--source", "{source}", "--launcher", "inline"]),
}
# What is there, and whole, after the failure; the rest leaves nothing.
KEPT = {
    "synth": (".jpg", ".json"),
    "cluster": ("job.json",),
    "train": (".yaml", ".jsonl", ".diff", ".writer"),
}
TINY = [
    *("--data.height", "32", "--data.width", "16", "--model.backbone", "resnet10t"),
    *("--schedule.epochs", "1", "--schedule.steps_per_epoch", "2", "--batch.identities", "4"),
    *("--set", "model.backbone_args={channels: [8, 16, 32, 64], stem_width: 8}"),
]


@pytest.fixture(scope="module")
def places(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands read."""
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = tmp_path_factory.mktemp("places")
    split = open_dataset(tiny_settings["data"]["source"]).split("train")
    for row in range(len(split)):
        place = folder / "raw" / f"{split.identities[row]:03d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row}.jpg").write_bytes(split.image_bytes(row))
    rng = np.random.default_rng(0)
    people = np.repeat(rng.normal(size=(20, 16)), 12, 0) + 0.3 * rng.normal(size=(240, 16))
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(people.astype(np.float32).ravel()), 16)
    pq.write_table(pa.table({"embedding": embeddings}), folder / "features.parquet")
    run = prepare(folder / "run", tiny_settings, schedule={"epochs": 1})
    train_worker(run)
    return {
        "raw": str(folder / "raw"),
        "features": str(folder / "features.parquet"),
        "model": str(write_run(folder / "model", tiny_settings, 0)),
        "run": str(run),
        "source": tiny_settings["data"]["source"],
        "unseen": tiny_settings["data"]["tests"][0],
    }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", "16k") as disk:
        yield disk


def _words(name: str, disk: Disk, places: dict[str, str]) -> list[str]:
    words = [word.format(disk=disk.path, **places) for word in COMMANDS[name][1]]
    return words + TINY if name == "train" else words


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(
    name: str, disk: Disk, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the output and the reason, nothing half is left, and with room the command succeeds."""
    disk.remount(f"size={COMMANDS[name][0]}k")
    words = _words(name, disk, places)
    assert main(words) == 2
    told = capsys.readouterr().err
    [error] = [line for line in told.splitlines() if ": error: " in line]
    assert f"error: {disk.path}/" in error
    assert "wanted to write" in error
    assert "No space left on device" in error
    assert "give the same command again" in error
    left = [path for path in disk.path.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    assert [path for path in left if not path.name.endswith(KEPT.get(name, ()))] == []
    assert all(path.stat().st_size for path in left if path.suffix in (".jpg", ".json", ".yaml"))
    disk.remount("size=64m")
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", [*COMMANDS, "embed", "evaluate"])
def test_a_read_only_disk(
    name: str, disk: Disk, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before anything is computed."""
    others = {
        "embed": ["embed", places["model"], places["source"], "--out", f"{disk.path}/features"],
        "evaluate": ["evaluate", places["model"], places["unseen"], "--json", f"{disk.path}/r.json"],
    }
    disk.remount("ro")
    assert main(others.get(name) or _words(name, disk, places)) == 2
    told = capsys.readouterr().err
    assert str(disk.path) in told
    assert "Read-only file system" in told or "cannot" in told or "may not write" in told
    assert "images/s" not in told


def test_a_part_of_features_is_there_whole_or_not_at_all(disk: Disk, places: dict[str, str]) -> None:
    """What a task of `dmx embed` writes; its list of images left out comes first."""
    split = open_dataset(places["source"]).split("train")
    rows = np.arange(len(split))
    features = np.random.default_rng(0).normal(size=(len(rows), 64)).astype(np.float32)
    batch = pa.table([[0], [0], [rows.tobytes()], [features.tobytes()], ["[]"]], schema=FEATURES)
    output, part = Output(str(disk.path)), Part(0, 0, len(rows))
    with pytest.raises(ValueError, match=r"wanted to write part-00000\.parquet, found: No space left"):
        write_part(output, part, split, 64, [batch])
    assert list(disk.path.iterdir()) == []
    disk.remount("size=1m")
    write_part(output, part, split, 64, [batch])
    assert [path.name for path in disk.path.iterdir()] == [part.name]


@pytest.mark.timeout(580)
def test_a_full_disk_while_embedding(disk: Disk, places: dict[str, str], tmp_path: Path) -> None:
    """The whole command, which fails at its start, in a task that writes a part, and at its end."""
    images, parts, out = 180, 4, disk.path / "features"
    write_set(tmp_path / "set", 1, {"train": 20}, rows_per_shard=images // parts)
    words = ["embed", places["model"], str(tmp_path / "set"), "--out", str(out)]

    def embed() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dmx", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)

    def whole_parts() -> dict[str, int]:
        found = sorted(out.glob("part-*"))
        assert [pq.read_metadata(path).num_rows for path in found] == [images // parts] * len(found)
        return {path.name: path.stat().st_mtime_ns for path in found}

    def fails_at(what: str) -> dict[str, int]:
        """The parts that it leaves."""
        done = embed()
        assert done.returncode == 2, done.stderr
        [error] = [line for line in done.stderr.splitlines() if ": error: " in line]
        assert error.startswith(f"dmx embed: error: {out}: wanted to write {what}")
        assert "found: No space left on device" in error
        assert "give the same command again" in error
        assert "Traceback" not in done.stderr
        return whole_parts()

    others = disk.path / "others"
    others.write_bytes(bytes(16 * 1024))
    assert fails_at("features") == {}
    assert list(out.iterdir()) == []
    others.unlink()
    # The manifest takes a page of 4 KiB, each of the parts four.
    disk.remount("size=48k")
    first = fails_at("part-")
    assert len(first) < parts
    assert not json.loads((out / "embeddings.json").read_text())["finished"]
    disk.remount(f"size={4 + parts * 16}k")
    second = fails_at("the end of the job")
    assert len(second) == parts
    assert first.items() <= second.items()
    assert not json.loads((out / "embeddings.json").read_text())["finished"]
    disk.remount("size=64m")
    done = embed()
    assert done.returncode == 0, done.stderr
    assert f"{images} images embedded" in done.stdout
    assert whole_parts() == second
    assert len(Features(out)) == images


def test_a_line_that_was_cut_off_is_no_line(tmp_path: Path) -> None:
    """As a full disk leaves it behind; the lines before it are read."""
    (tmp_path / STEPS).write_text('{"global_step": 0}\n{"global_s')
    assert read_lines(tmp_path / STEPS) == [{"global_step": 0}]
