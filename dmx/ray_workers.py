"""Workers of a task on Ray Train: started again when they end, their words brought to this process."""

from __future__ import annotations

import io
import math
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dmx.cores import cores
from dmx.errors import DmxError
from dmx.launching import STOP, raise_stopped, raise_told, run_worker
from dmx.progress import columns_of
from dmx.ray_cluster import host_resources, ray_cluster
from dmx.stopping import WORKER_S, Stopped, deferred, leave_word, overdue

FOLLOW_S = 0.2
SHOWN = 400  # characters of what Ray says
POLL_S = 0.5
ROOM_S = 30.0
OBJECT_STORE_BYTES = 100_000_000  # Workers pass nothing through it.


@dataclass(frozen=True)
class Crew:
    """The workers of one attempt: how many, and what each of them gets."""

    workers: int
    cores_each: int
    has_gpu: bool


class _WorkersEndedError(Exception):
    """Workers ended before their task did."""


def launch_ray(
    task: str,
    arguments: dict[str, Any],
    storage: Path,
    workers: int,
    timeout_s: float,
    max_failures: int,
    allowed: Callable[[int], bool],
) -> None:
    """Run a task on Ray Train.

    Workers that end are started again, on the hosts that are there then. Where fewer have room, fewer start.

    Args:
        storage: an empty folder that all hosts see.
        task, arguments, workers, timeout_s, max_failures, allowed: as for `dmx.launching.launch`.

    Raises:
        DmxError: there is no Ray or no room, or the workers failed for good.
    """
    settings = {
        "task": task,
        "arguments": arguments,
        "stop": str(storage / STOP),
        "output": str(storage / "output"),
        "is_terminal": sys.stderr.isatty(),
        "columns": columns_of(sys.stderr),
    }
    cpus = workers * max(1, cores() // workers)
    with ray_cluster(cpus, OBJECT_STORE_BYTES), _following(storage / "output"):
        _run_crews(settings, workers, storage, timeout_s, max_failures, allowed)


def _run_crews(
    settings: dict[str, Any],
    workers: int,
    storage: Path,
    timeout_s: float,
    max_failures: int,
    allowed: Callable[[int], bool],
) -> None:
    """One crew after the other, until the task is done."""
    for attempt in range(max_failures + 1):
        crew = _await_room(workers, allowed)
        try:
            _fit(settings, crew, storage / str(attempt), timeout_s)
        except _WorkersEndedError as error:
            if attempt == max_failures:
                raise DmxError(f"workers ended {attempt + 1} times, the last time so: {error}") from error
            print(
                f"workers ended, and start again from where they stood ({attempt + 1} of {max_failures} "
                f"times): {error}",
                file=sys.stderr,
                flush=True,
            )
            _free_cores()
        else:
            return


def _free_cores() -> None:
    """Give back what a crew held that was lost: the placement groups of this job.

    Ray's own cleaner asks its dashboard whether a crew's controller lives, which a private cluster has not,
    and does not know of a crew that was not complete yet.
    """
    import ray
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        # Names of what is a job's end with the job's.
        if name.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _await_room(workers: int, allowed: Callable[[int], bool]) -> Crew:
    """The largest allowed crew that the hosts have room for; `workers` of them if they come within ROOM_S.

    Raises:
        DmxError: there is room for none.
    """
    deadline = time.monotonic() + ROOM_S
    while True:
        hosts = host_resources()
        crew = crew_of(hosts, workers)
        if crew is not None:
            return crew
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    for fewer in range(workers - 1, 0, -1):
        crew = crew_of(hosts, fewer) if allowed(fewer) else None
        if crew is not None:
            print(
                f"{workers} workers have no room on {_shown(hosts)}: going on with {fewer}",
                file=sys.stderr,
                flush=True,
            )
            return crew
    raise DmxError(
        f"{os.uname().nodename} waited {ROOM_S:.0f} s for room for {workers} workers, found {_shown(hosts)}: "
        "add hosts, or start fewer workers"
    )


def crew_of(hosts: Mapping[str, Mapping[str, float]], workers: int) -> Crew | None:
    """Share the hosts out among this many workers.

    Args:
        hosts: what each has by its name: CPU and GPU, in numbers of them.
        workers: how many there shall be, each with a GPU if there is any.

    Returns:
        The crew with the most cores a worker; None when there is no room for it.
    """
    has_gpu = any(host.get("GPU", 0) > 0 for host in hosts.values())
    most = int(max((host.get("CPU", 0) for host in hosts.values()), default=0))
    for each in range(most, 0, -1):
        room = 0
        for host in hosts.values():
            fit = host.get("CPU", 0) // each
            room += int(min(fit, host.get("GPU", 0)) if has_gpu else fit)
        if room >= workers:
            return Crew(workers, each, has_gpu)
    return None


def _shown(hosts: Mapping[str, Mapping[str, float]]) -> str:
    parts = []
    for name, host in hosts.items():
        gpus = f" and {host['GPU']:.0f} GPUs" if host.get("GPU") else ""
        parts.append(f"{name} with {host.get('CPU', 0):.0f} cores{gpus}")
    return ", ".join(parts)


def _fit(settings: dict[str, Any], crew: Crew, storage: Path, timeout_s: float) -> None:
    """One crew, to the end of its task.

    Args:
        settings: what the workers do, and the file that the first one prints to.
        crew: how many workers, and what each gets.
        storage: a folder that does not exist yet, seen by all hosts: Ray's notes, and the workers' word.
        timeout_s: how long the workers wait for each other, in seconds.

    Raises:
        DmxError: what a worker told the user.
        _WorkersEndedError: anything else that ended them.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    storage.mkdir()
    failure = storage / "failure"
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=settings | {"failure": str(failure)},
        scaling_config=ScalingConfig(
            num_workers=crew.workers,
            use_gpu=crew.has_gpu,
            resources_per_worker={"CPU": crew.cores_each} | ({"GPU": 1} if crew.has_gpu else {}),
        ),
        # A crew that failed is not started again by Ray, which would wait for hosts that are gone.
        run_config=RunConfig(
            name="workers",
            storage_path=str(storage),
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if crew.has_gpu else "gloo", timeout_s=math.ceil(timeout_s)
        ),
    )
    stop = Path(settings["stop"])
    try:
        _fit_in_thread(trainer.fit, stop)
    except Exception as error:  # Ray wraps whatever a worker raised in types that changed between versions.
        raise_stopped(stop)
        raise_told(failure)
        raise _WorkersEndedError(_reasons(error)) from error
    raise_stopped(stop)
    raise_told(failure)


def _fit_in_thread(fit: Callable[[], object], stop: Path) -> None:
    """Call `fit` in a thread, so that this one hears signals, which Ray would answer itself.

    Raises:
        Stopped: the workers did not end in time after a signal.
    """
    ended: Future[object] = Future()

    def call() -> None:
        try:
            ended.set_result(fit())
        except BaseException as error:  # for the thread that waits
            ended.set_exception(error)

    with deferred(partial(leave_word, stop)):
        threading.Thread(target=call, name="fit", daemon=True).start()
        while not wait([ended], POLL_S).done:
            if overdue(WORKER_S + 1):
                raise Stopped
    ended.result()


def _reasons(error: Exception) -> str:
    """What ended which worker, a line each; the whole traceback is the error's cause."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return f"{type(error).__name__}: {error}"
    return "".join(f"\n  worker {rank}: {_reason(cause)}" for rank, cause in sorted(failures.items()))


def _reason(error: Exception) -> str:
    """The line that says it: the last of a traceback; of what Ray says itself, the beginning."""
    text = str(error).strip()
    if "Traceback" in text:
        return text.splitlines()[-1].strip()
    return textwrap.shorten(text, SHOWN, placeholder=" ...")


class _Output(io.TextIOWrapper):
    """Where the first worker prints: a file that the launching process copies to its own terminal."""

    def __init__(self, path: str, is_terminal: bool, columns: int) -> None:
        super().__init__(open(path, "ab"), encoding="utf-8", line_buffering=True)  # noqa: SIM115  # owned
        self._is_terminal, self.columns = is_terminal, columns

    def isatty(self) -> bool:
        """Whether what is printed ends on a terminal."""
        return self._is_terminal


def _ray_worker(settings: dict[str, Any]) -> None:
    """What Ray runs in each worker."""
    from ray.train import get_context

    context = get_context()
    task, arguments = settings["task"], settings["arguments"]
    failure, stop = Path(settings["failure"]), Path(settings["stop"])
    local = (context.get_local_rank(), context.get_local_world_size())
    if context.get_world_rank() != 0:
        run_worker(task, arguments, failure, stop, local)
        return
    with (
        _Output(settings["output"], settings["is_terminal"], settings["columns"]) as output,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        run_worker(task, arguments, failure, stop, local)


@contextmanager
def _following(output: Path) -> Iterator[Path]:
    """Copy what is written to the file `output` to this process's stderr, as it comes."""
    output.write_bytes(b"")
    done = threading.Event()

    def follow() -> None:
        with open(output, encoding="utf-8", errors="replace", newline="") as file:
            while True:
                is_done = done.is_set()
                sys.stderr.write(file.read())
                sys.stderr.flush()
                if is_done:
                    return
                done.wait(FOLLOW_S)

    thread = threading.Thread(target=follow, name="follow-worker", daemon=True)
    thread.start()
    try:
        yield output
    finally:
        done.set()
        thread.join()
