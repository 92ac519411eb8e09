"""Starting workers on one host or many: by Ray Train (default), torchrun, srun, or as this very process.

A task is a function by name, `package.module:function`, and arguments that JSON can hold. Whoever starts it,
each worker calls `function(**arguments, local=...)`, with (local rank, workers on its host), or None where
the environment tells. A task finds its last checkpoint by itself, so a worker that is started again goes on
where its work stands, and nothing has to be reported or restored through the launcher. A launcher that is
told to stop passes it on by a file, and workers that are told leave word there; none of them starts again.

One worker of several, as torchrun and srun start it:  python -m dmx.launching TASK ARGUMENTS FAILURE STOP
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from dmx.config import Launcher
from dmx.cores import cores
from dmx.errors import DmxError
from dmx.loopback import gloo_on_loopback
from dmx.stopping import (
    POLL_S,
    WORKER_S,
    Stopped,
    deferred,
    end,
    found_word,
    heeding,
    leave_word,
    overdue,
    wish,
    wished,
)

MAX_FAILURES = 3
STOP = "stop"  # the file of `dmx.stopping.heeding`
PORTS = range(20_000, 30_000)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_prctl = ctypes.CDLL(None).prctl


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
        Stopped: this process was told to stop, or a worker was.
    """
    check_launch(launcher, workers)
    if launcher == "inline":
        remove_launches(folder)
        run_task(task, arguments)
        return
    with _storage(folder) as storage:
        (storage / STOP).touch()
        if launcher == "torchrun":
            _launch_torchrun(task, arguments, storage, workers, max_failures)
        elif launcher == "srun":
            _launch_srun(task, arguments, storage, workers, max_failures)
        else:
            from dmx.ray_workers import launch_ray

            launch_ray(task, arguments, storage, workers, timeout_s, max_failures, allowed)


@contextmanager
def _storage(folder: Path) -> Iterator[Path]:
    """A folder for the word between a launch and its workers; what a killed launch left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_launches(folder)
    storage = Path(tempfile.mkdtemp(prefix=".launch-", dir=folder.absolute()))
    try:
        yield storage
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def remove_launches(folder: Path) -> None:
    """Remove what launches that were killed left in a folder; not while one runs there."""
    for left in folder.glob(".launch-*"):
        shutil.rmtree(left, ignore_errors=True)


def check_launch(launcher: Launcher, workers: int) -> None:
    """Check that a launcher can start this many workers.

    Raises:
        DmxError: it cannot.
    """
    if workers < 1:
        raise DmxError(f"--workers wants at least 1, found {workers}")
    if launcher == "inline" and workers != 1:
        raise DmxError(f"--launcher inline is one process, found --workers {workers}: use ray or torchrun")
    if launcher == "srun" and "SLURM_JOB_ID" not in os.environ:
        raise DmxError(
            "--launcher srun wants an allocation of SLURM, found none: start it in sbatch or salloc"
        )


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


def run_worker(
    task: str, arguments: dict[str, Any], failure: Path, stop: Path, local: tuple[int, int] | None = None
) -> None:
    """Be one worker under a launcher that starts workers again whatever ended them.

    What a user has to change would end them the same way each time: that is written down before it is raised,
    and once it is, workers end without doing anything. So they do when all are told to stop.

    Args:
        task: `package.module:function`.
        arguments: the function's arguments by name.
        failure: the file for what the user has to change.
        stop: the file that tells all to stop.
        local: (local rank, workers on this host) where the environment does not tell.
    """
    if failure.exists() or found_word(stop) is not None:
        return
    try:
        with heeding(stop):
            run_task(task, arguments, local)
    except Stopped:
        return
    except DmxError as error:
        with suppress(OSError):  # the disk may be what is full; the error itself matters more
            failure.write_text(str(error), encoding="utf-8")
        raise


def raise_told(failure: Path) -> None:
    """Raise what a worker wrote down for the user, if one did.

    Raises:
        DmxError: one did.
    """
    if failure.exists():
        raise DmxError(failure.read_text(encoding="utf-8"))


def raise_stopped(stop: Path) -> None:
    """Raise `Stopped` if this process, or a worker, was told to stop."""
    signum = found_word(stop)
    if signum is not None:
        wish(signum)
        raise Stopped


def _worker_command(task: str, arguments: dict[str, Any], failure: Path, stop: Path) -> list[str]:
    return ["-m", "dmx.launching", task, json.dumps(arguments), str(failure), str(stop)]


def _run_workers(command: list[str], environment: dict[str, str], stop: Path) -> int:
    """Run a launcher's program; returns its status.

    It gets no signal but through the file `stop`, so that all workers end behind the same step, and it does
    not outlive this process.
    """
    with deferred(partial(leave_word, stop)):
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
        )
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(POLL_S)
                break
            if overdue(WORKER_S + 1):
                process.kill()
    raise_stopped(stop)
    return status


def _end_with_parent() -> None:
    """In a child: get SIGTERM when the parent ends, however that was. Its workers follow it."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _launch_torchrun(
    task: str, arguments: dict[str, Any], storage: Path, workers: int, max_failures: int
) -> None:
    failure, stop = storage / "failure", storage / STOP
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--log-dir={storage}"),
        *(f"--nproc-per-node={workers}", f"--max-restarts={max_failures}"),
        *_worker_command(task, arguments, failure, stop),
    ]
    # torchrun would set one thread; the worker shares out the cores itself.
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores() // workers)),
        **gloo_on_loopback(),
        **os.environ,
    }
    status = _run_workers(command, environment, stop)
    raise_told(failure)
    if status:
        raise DmxError(f"torchrun ended with status {status}: the first error above tells why")


def _launch_srun(
    task: str, arguments: dict[str, Any], storage: Path, workers: int, max_failures: int
) -> None:
    """Tasks of a SLURM step; when one ends too early all are ended, and a new step starts."""
    names = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    first = subprocess.run(names, check=True, capture_output=True, text=True).stdout.split()[0]
    for attempt in range(max_failures + 1):
        failure, stop = storage / f"failure-{attempt}", storage / STOP
        command = ["srun", f"--ntasks={workers}", "--kill-on-bad-exit=1", "--export=ALL", sys.executable]
        # Ports of jobs that share a host differ, and those of a step from those of the step before.
        port = PORTS.start + (int(os.environ["SLURM_JOB_ID"]) * (max_failures + 1) + attempt) % len(PORTS)
        environment = {**os.environ, "MASTER_ADDR": first, "MASTER_PORT": str(port)}
        command += _worker_command(task, arguments, failure, stop)
        status = _run_workers(command, environment, stop)
        raise_told(failure)
        if not status:
            return
        print(
            f"srun ended with status {status}, attempt {attempt + 1} of {max_failures + 1}", file=sys.stderr
        )
    raise DmxError(f"srun ended with status {status} for the last time: the first error above tells why")


def take_place(environment: MutableMapping[str, str]) -> None:
    """Describe a task of srun as torchrun describes a worker: RANK, WORLD_SIZE and their local kin."""
    if "SLURM_PROCID" not in environment or "RANK" in environment:
        return
    node, counts = int(environment["SLURM_NODEID"]), environment["SLURM_STEP_TASKS_PER_NODE"]
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(tasks_by_node(counts)[node])


def tasks_by_node(counts: str) -> list[int]:
    """SLURM's list of numbers of tasks, "2(x3),1", written out: 2, 2, 2, 1."""
    found = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        found += [int(count)] * int(times or 1)
    return found


def main() -> None:
    """Entry for torchrun and srun."""
    task, arguments, failure, stop = sys.argv[1:]
    take_place(os.environ)
    try:
        run_worker(task, json.loads(arguments), Path(failure), Path(stop))
    except DmxError as error:
        sys.exit(f"error: {error}")
    if wished() is not None:
        end(0)


if __name__ == "__main__":
    main()
