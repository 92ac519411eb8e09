"""Starting workers on one host or many: by Ray Train (default), torchrun, srun, or as this very process.

A task is a function by name, `package.module:function`, and arguments that JSON can hold. Whoever starts it,
each worker calls `function(**arguments, local=...)`, with (local rank, workers on its host), or None where
the environment tells. A task finds its last checkpoint by itself, so a worker that is started again goes on
where its work stands, and nothing has to be reported or restored through the launcher.

One worker of several, as torchrun and srun start it:  python -m dmx.launching TASK ARGUMENTS
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmx.config import Launcher
from dmx.cores import cores
from dmx.errors import DmxError

MAX_FAILURES = 3


def launch(
    task: str,
    arguments: dict[str, Any],
    *,
    folder: Path,
    launcher: Launcher,
    workers: int,
    timeout_s: float,
    max_failures: int = MAX_FAILURES,
    allowed: Callable[[int], bool] = lambda workers: True,
) -> None:
    """Run a task on several workers to its end.

    Args:
        task: `package.module:function`, importable on every host.
        arguments: the function's arguments by name, as JSON can hold them.
        folder: where the workers leave word for this process; seen by all hosts.
        launcher: how the workers are started.
        workers: number of processes.
        timeout_s: how long the processes wait for each other, in seconds.
        max_failures: how many times workers that ended are started again (not `inline`).
        allowed: whether the task can do with this number of workers, when hosts are lost (only `ray`).

    Raises:
        DmxError: the workers cannot be started like this, or failed for good.
    """
    check_launch(launcher, workers)
    if launcher == "inline":
        run_task(task, arguments)
    elif launcher == "torchrun":
        _launch_torchrun(task, arguments, workers, max_failures)
    else:
        from dmx.ray_workers import launch_ray

        launch_ray(task, arguments, folder, workers, timeout_s, max_failures, allowed)


def check_launch(launcher: Launcher, workers: int) -> None:
    """Check that a launcher can start this many workers.

    Raises:
        DmxError: it cannot.
    """
    if workers < 1:
        raise DmxError(f"--workers wants at least 1, found {workers}")
    if launcher == "inline" and workers != 1:
        raise DmxError(f"--launcher inline is one process, found --workers {workers}: use ray or torchrun")


def run_task(task: str, arguments: dict[str, Any], local: tuple[int, int] | None = None) -> None:
    """Be one worker: call the task's function.

    Args:
        task: `package.module:function`.
        arguments: the function's arguments by name.
        local: (local rank, workers on this host) where the environment does not tell.
    """
    module, _, name = task.partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), name)
    function(**arguments, local=local)


def _launch_torchrun(task: str, arguments: dict[str, Any], workers: int, max_failures: int) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={workers}", f"--max-restarts={max_failures}"),
        *("-m", "dmx.launching", task, json.dumps(arguments)),
    ]
    # torchrun would set one thread; the worker shares out the cores itself.
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // workers)), **os.environ}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise DmxError(f"torchrun ended with status {status}: the first error above tells why")


def main() -> None:
    """Entry for torchrun and srun."""
    task, arguments = sys.argv[1:]
    try:
        run_task(task, json.loads(arguments))
    except DmxError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
