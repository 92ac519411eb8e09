"""Starting the workers: Ray Train (default), torchrun, or this very process. Only this module imports Ray.

Whoever starts them, each worker runs `train_worker(run)`, which finds the latest checkpoint by itself. So a
restarted worker goes on where the run stands, and nothing has to be reported or restored through Ray.
"""

from __future__ import annotations

import io
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from dmx.config import Launcher, from_tree, read_yaml
from dmx.cores import cores
from dmx.errors import DmxError
from dmx.train.runlog import CONFIG

MAX_FAILURES = 3
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Train would print each line of a worker twice, and watch itself through a dashboard that is off.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
}
FOLLOW_S = 0.2
OBJECT_STORE_BYTES = 100_000_000  # Training passes nothing through it.


def launch(run: Path, launcher: Launcher, workers: int, *, max_failures: int = MAX_FAILURES) -> None:
    """Train the run in folder `run` to its end.

    Args:
        run: a folder with `config.yaml`; on several hosts, in storage that all of them see.
        launcher: how the workers are started.
        workers: number of training processes.
        max_failures: how many times workers that died are started again (not `inline`).

    Raises:
        DmxError: the workers cannot be started like this, or failed for good.
    """
    check_launch(launcher, workers)
    if launcher == "inline":
        _launch_inline(run)
    elif launcher == "torchrun":
        _launch_torchrun(run, workers, max_failures)
    else:
        _launch_ray(run, workers, max_failures)


def check_launch(launcher: Launcher, workers: int) -> None:
    """Check that a launcher can start this many workers.

    Raises:
        DmxError: it cannot.
    """
    if workers < 1:
        raise DmxError(f"--workers wants at least 1, found {workers}")
    if launcher == "inline" and workers != 1:
        raise DmxError(f"--launcher inline is one process, found --workers {workers}: use ray or torchrun")


def _launch_inline(run: Path) -> None:
    from dmx.train.worker import train_worker

    train_worker(run)


def _launch_torchrun(run: Path, workers: int, max_failures: int) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={workers}", f"--max-restarts={max_failures}"),
        *("-m", "dmx.train.worker", str(run)),
    ]
    # torchrun would set one thread; the worker shares out the cores itself.
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // workers)), **os.environ}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise DmxError(f"torchrun ended with status {status}: the first error above tells why")


def _launch_ray(run: Path, workers: int, max_failures: int) -> None:
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise DmxError("--launcher ray wants Ray: install dmx[cpu] or dmx[gpu], or use torchrun") from error
    scratch = tempfile.mkdtemp(prefix="dmx-", dir="/tmp")  # Socket names in it must be short.
    joins_cluster = "RAY_ADDRESS" in os.environ
    cores_each = max(1, cores() // workers)
    if joins_cluster:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        ray.init(
            address="local",
            num_cpus=workers * cores_each,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=scratch,
            _node_ip_address="127.0.0.1",
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        storage = run.absolute() / "ray" if joins_cluster else Path(scratch)
        with _following(storage / "output") as output:
            _fit(run, workers, cores_each, max_failures, storage, output)
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _fit(run: Path, workers: int, cores_each: int, max_failures: int, storage: Path, output: Path) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    failure = storage / "failure"
    failure.unlink(missing_ok=True)
    timeout_s = from_tree((str(run / CONFIG), read_yaml(run / CONFIG))).timeout_s
    has_gpu = torch.cuda.is_available()
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={
            "run": str(run.absolute()),
            "output": str(output),
            "failure": str(failure),
            "is_terminal": sys.stderr.isatty(),
        },
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=has_gpu,
            resources_per_worker={"CPU": cores_each} | ({"GPU": 1} if has_gpu else {}),
        ),
        run_config=RunConfig(
            name=run.name, storage_path=str(storage), failure_config=FailureConfig(max_failures=max_failures)
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout_s=math.ceil(timeout_s)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps whatever a worker raised in types that changed between versions.
        raise DmxError(_told(failure) or f"training failed: {error}") from error
    if told := _told(failure):
        raise DmxError(told)


def _told(failure: Path) -> str | None:
    """What a worker wrote down for the user before it failed."""
    return failure.read_text(encoding="utf-8") if failure.exists() else None


class _Output(io.TextIOWrapper):
    """Where the first worker prints: a file that the launching process copies to its own terminal."""

    def __init__(self, path: str, is_terminal: bool) -> None:
        super().__init__(open(path, "ab"), encoding="utf-8", line_buffering=True)  # noqa: SIM115  # owned
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        """Whether what is printed ends on a terminal."""
        return self._is_terminal


def _ray_worker(settings: dict[str, Any]) -> None:
    """What Ray runs in each worker.

    Ray starts workers again whatever ended them. What a user has to change would end them the same way each
    time: that is written down before it is raised, and once it is, workers end without doing anything.
    """
    failure = Path(settings["failure"])
    if failure.exists():
        return
    try:
        _train_in_ray(settings)
    except DmxError as error:
        failure.write_text(str(error), encoding="utf-8")
        raise


def _train_in_ray(settings: dict[str, Any]) -> None:
    from ray.train import get_context

    from dmx.train.worker import train_worker

    context = get_context()
    local = (context.get_local_rank(), context.get_local_world_size())
    if context.get_world_rank() != 0:
        train_worker(settings["run"], local=local)
        return
    with (
        _Output(settings["output"], settings["is_terminal"]) as output,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        train_worker(settings["run"], local=local)


@contextmanager
def _following(output: Path) -> Iterator[Path]:
    """Copy what is written to the file `output` to this process's stderr, as it comes."""
    output.parent.mkdir(parents=True, exist_ok=True)
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
        output.unlink(missing_ok=True)
