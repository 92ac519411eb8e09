"""Workers under Ray start again, whichever of Ray's own processes was lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

# Its first worker would wait for longer than anybody does.
TASK = """
import time
from pathlib import Path

def work(folder, local):
    if Path(folder, "killed").exists():
        Path(folder, "done").touch()
    else:
        time.sleep(3600)
"""
LAUNCH = """
import sys
from pathlib import Path
from dmx.launching import launch
folder = Path(sys.argv[1])
task = ("waiting_task:work", {"folder": str(folder)})
launch(*task, folder=folder / "launch", launcher="ray", workers=1, timeout_s=60)
"""
START_S = 60  # that Ray waits for the cores of a crew


def test_cores_of_a_lost_crew_are_free_for_the_next(tmp_path: Path) -> None:
    """Killed is who led it, as its worker comes up: nobody would give its cores back."""
    (tmp_path / "waiting_task.py").write_text(TASK)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", LAUNCH, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (named := _named(process.pid)).get("RayTrainWorker"):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, named
            time.sleep(0.01)
        (tmp_path / "killed").touch()
        os.kill(named["TrainController"], signal.SIGKILL)
        start = time.monotonic()
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert (tmp_path / "done").exists()
    assert "start again from where they stood (1 of 3 times)" in said
    assert "(2 of 3 times)" not in said
    assert time.monotonic() - start < START_S


def _named(pid: int) -> dict[str, int]:
    """The actors of a process's Ray, by the name of their class."""
    found: dict[str, int] = {}
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # many come and go as Ray starts
            name = child.name()
            found |= {kind: child.pid for kind in ("RayTrainWorker", "TrainController") if kind in name}
    return found
