"""The benchmarks of load and soak, small: they measure, go on where they were, and training does not grow."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dmx.features import Features

FOLDER = Path(__file__).parents[2] / "benchmarks"
IMAGES, STEPS = 300, ["pictures", "ingest", "embed", "cluster"]
# Memory of the two processes that watch others, and of the head, after every pass over a split by Ray Data.
PASSES = """
import os, sys
from pathlib import Path
from dmx.data.dataset import open_dataset
from dmx.distributed import world
from dmx.extraction.feed import RayFeed
from dmx.ray_cluster import ray_cluster
from processes import family, own_bytes

def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it has just ended

def watchers():
    names = {pid: cmdline(pid) for pid in family(os.getpid())}
    watch = (b"ray::_StatsActor", b"ray::DashboardAgent", b"gcs_server")
    programs = {pid: name.split(bytes(1))[0] for pid, name in names.items()}
    return [own_bytes(pid) for kind in watch for pid, name in programs.items() if kind in name]

with ray_cluster(cpus=2), world(120.0) as place:
    # Of two images a batch: so many tasks that their records would be seen.
    feed = RayFeed(place, open_dataset(sys.argv[1]).split("train"), 32, 16, 2)
    for _ in range(30):
        for batch in feed.batches("test"):
            pass
        print(*watchers(), flush=True)
"""


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("soak")
    for name in ("soak", "processes"):
        sys.modules.pop(name, None)


def load(tmp_path: Path, *words: str) -> list[str]:
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "load.json")]
    return [sys.executable, str(FOLDER / "load.py"), "--images", str(IMAGES), *places, *words]


def test_a_load_that_is_killed_goes_on(tmp_path: Path) -> None:
    """What is done stays, what the killed attempt took counts, and nothing is missing in the end."""
    state, work = tmp_path / "work" / str(IMAGES) / "measured.json", tmp_path / "work" / str(IMAGES)
    with subprocess.Popen(load(tmp_path)) as process:
        while not (state.exists() and "embed" in json.loads(state.read_text())):
            assert process.poll() is None
            time.sleep(0.1)
        (command,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    command.wait(30)  # is ended with it
    before = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))["rows"]
    assert [row["step"] for row in before] == STEPS[:2]
    written = (work / "data" / "manifest.json").stat().st_mtime_ns

    again = load(tmp_path, "--launcher", "inline")
    subprocess.run(again, check=True, timeout=300)
    result = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    rows = {row["step"]: row for row in result["rows"]}
    assert list(rows) == STEPS
    assert result["rows"][:2] == before
    assert (work / "data" / "manifest.json").stat().st_mtime_ns == written
    assert [rows[step]["attempts"] for step in STEPS] == [1, 1, 2, 1]
    assert len(Features(work / "features")) == IMAGES
    for row in rows.values():
        assert row["seconds"] > 0
        assert row["disk_bytes"] > 0
        assert 10e6 < row["peak"]["held_bytes"] < 8e9, row["step"]
        assert row["peak"]["handles"] > 2
    assert rows["embed"]["peak"]["processes"] > 3  # Ray's are among them
    assert rows["cluster"]["found"]["purity"] > 0.9

    subprocess.run(again, check=True, timeout=60)  # finished: nothing is measured again
    assert json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))["rows"] == result["rows"]


@pytest.mark.parametrize("launcher", ["inline", "ray"])
def test_training_does_not_grow(
    soak: Any, tmp_path: Path, tiny_settings: dict[str, Any], launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over epochs of every stage; `python benchmarks/soak.py` looks longer, and closer at memory."""
    data = tiny_settings["data"]
    words = ["--source", data["source"], "--target", data["target"], "--test", data["tests"][0]]
    rows = soak.train(words, tmp_path / "run", launcher, 31, ("schedule.stage_two_epoch=3",))
    assert [row["epoch"] for row in rows][:30] == list(range(1, 31))
    # The allocator's pieces come and go by 8 MiB, which twenty epochs do not average out; nor their number.
    monkeypatch.setattr(soak, "MOST_BYTES", 2**19)
    monkeypatch.setattr(soak, "THINGS", tuple(name for name in soak.THINGS if name != "maps"))
    assert soak.growing(soak.slopes(rows, 10)) == []


def test_ray_keeps_nothing_of_every_pass(tiny_settings: dict[str, Any]) -> None:
    """A pass left a megabyte of metrics, once they were reported: here five times a second; a task 2 kB."""
    command = [sys.executable, "-c", PASSES, tiny_settings["data"]["target"]]
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "RAY_metrics_report_interval_ms": "200"}
    done = subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True, text=True)
    held = [[int(size) for size in line.split()] for line in done.stdout.splitlines()]
    assert [len(sizes) for sizes in held] == [3] * 30  # one of each
    grown = [last - first for first, last in zip(held[9], held[-1], strict=True)]
    assert grown[0] + grown[1] < 4 * 2**20, held
    assert grown[2] < 2**20, held


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_hundreds_of_epochs_do_not_grow(soak: Any, tmp_path: Path) -> None:
    """The whole benchmark, under both launchers: it fails by itself where something grows."""
    out = tmp_path / "soak.json"
    command = [sys.executable, str(FOLDER / "soak.py"), "--out", str(out), "--work", str(tmp_path)]
    subprocess.run(command, check=True)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [run["launcher"] for run in result["runs"]] == ["inline", "ray"]
    assert all(len(run["rows"]) >= 299 for run in result["runs"])
