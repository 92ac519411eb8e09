"""`dmx synth` killed in the middle: no process stays, and the next run completes the same data set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmx.synth.dataset import PARAMETERS_FILE, Request, write_dataset

REQUEST = Request(style="campus", identities=8, cameras=2, images=6, height=64)
PATIENCE_S = 180


def command(folder: Path, jobs: int) -> list[str]:
    program = (
        "import argparse, sys; from dmx.commands import synth; parser = argparse.ArgumentParser(); "
        "synth.add_arguments(parser); sys.exit(synth.run(parser.parse_args()))"
    )
    size = ["--identities", "8", "--cameras", "2", "--images", "6", "--height", "64", "--jobs", str(jobs)]
    return [sys.executable, "-c", program, str(folder), "--style", "campus", *size]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {PATIENCE_S} s for {what}")
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the process table from /proc")
def test_kill_and_resume_give_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write_dataset(whole, REQUEST, jobs=1)

    run = subprocess.Popen(command(killed, jobs=2), stderr=subprocess.DEVNULL)
    wait_until(lambda: run.poll() is not None or len(list(killed.glob("*.jpg"))) >= 5, "some images")
    workers = children(run.pid)
    # A named semaphore stays there when all processes that know of it are killed at once.
    assert "/dev/shm/" not in Path(f"/proc/{run.pid}/maps").read_text()
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    wait_until(lambda: not any(alive(pid) for pid in workers), "the workers to end with their parent")

    left = contents(killed)
    assert 5 <= sum(name.endswith(".jpg") for name in left) < REQUEST.identities * REQUEST.images
    assert PARAMETERS_FILE in left
    for name, data in left.items():
        if name.endswith(".jpg"):
            assert data == (whole / name).read_bytes()
    again = subprocess.run(command(killed, jobs=1), capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 0, again.stderr
    assert contents(killed) == contents(whole)
