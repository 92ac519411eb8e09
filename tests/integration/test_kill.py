"""Commands that are killed come to the same result, leave nothing behind, and say one line when they can."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
from runs import tensors_of

from dmx.train.checkpoint import latest, read_state
from dmx.train.runlog import STEPS, read_lines

# Numbers of kills, which say how: 0 SIGKILL to the group, 1 SIGTERM, 2 the kernel for want of memory, ...
FEW = {"ingest": (1, 2, 3), "synth": (1, 2), "cluster": (0, 5), "train": (2,), "export": (1,), "embed": (0,)}
MANY = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all commands work on."""
    return tmp_path_factory.mktemp("kill")


def strike(name: str, folder: Path, numbers: tuple[int, ...]) -> None:
    job = kills.JOBS[name](folder)
    whole = kills.undisturbed(job)
    for number in numbers:
        outcome = kills.strike(job, whole, number, random.Random(f"{name}/{number}"))
        assert outcome.faults == [], outcome


@pytest.mark.parametrize("name", FEW)
def test_a_killed_command_comes_to_the_same(name: str, folder: Path) -> None:
    strike(name, folder, FEW[name])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", kills.JOBS)
def test_a_command_that_is_killed_fifty_times_comes_to_the_same(name: str, folder: Path) -> None:
    strike(name, folder, tuple(range(MANY)))


def test_what_does_not_come_to_the_same_is_found(tmp_path: Path) -> None:
    """The harness itself: a file that is cut short, one that is missing, and a process that stays."""
    job = kills.JOBS["ingest"](tmp_path)
    undisturbed = kills.undisturbed(job)
    whole = undisturbed.out
    out = tmp_path / "ingest-cut"
    command = kills.Command(job, out)
    command.await_end()
    shard = out / "train-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    (out / "skipped.jsonl").unlink()
    (out / ".train-00001.arrow.tmp").touch()
    assert job.partial(out, whole) == ["train-00001.arrow"]
    assert job.differences(out, whole) == ["other train-00001.arrow", "no skipped.jsonl"]
    assert job.left(out) == [str(out / ".train-00001.arrow.tmp")]
    assert command.leaks(undisturbed.keeps) == []


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("ray", marks=pytest.mark.slow)])
def test_all_processes_stop_behind_the_same_step(launcher: str, folder: Path) -> None:
    """The command alone gets the signal; its checkpoint holds every step that was logged."""
    job = kills.JOBS[f"train-{launcher}"](folder)
    run = folder / launcher
    process = subprocess.Popen(
        [sys.executable, "-m", "dmx", *job.words, *job.place(run)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while len(lines := _steps(run)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert process.returncode == 143
    checkpoint, lines = latest(run), _steps(run)
    assert checkpoint is not None
    assert read_state(checkpoint)[0].global_step == len(lines)
    told = f"stopped by SIGTERM at step {len(lines)} of 20, saved {checkpoint}; the same command goes on"
    assert said.splitlines()[-1] == f"dmx train: {told}"
    assert tensors_of(run)
    assert not list(run.glob(".launch-*"))


def _steps(run: Path) -> list[dict[str, object]]:
    return read_lines(run / STEPS)
