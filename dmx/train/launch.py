"""Starting the workers: Ray Train (default), torchrun, or this very process. Only this module imports Ray.

Whoever starts them, each worker runs `train_worker(run)`, which finds the latest checkpoint by itself. So a
restarted worker goes on where the run stands, and nothing has to be reported or restored through Ray.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from dmx.errors import DmxError

Launcher = Literal["ray", "torchrun", "inline"]
LAUNCHERS: tuple[Launcher, ...] = ("ray", "torchrun", "inline")

MAX_FAILURES = 3
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
    if workers < 1:
        raise DmxError(f"--workers wants at least 1, found {workers}")
    if launcher == "inline":
        _launch_inline(run, workers)
    elif launcher == "torchrun":
        _launch_torchrun(run, workers, max_failures)
    else:
        _launch_ray(run, workers, max_failures)


def _launch_inline(run: Path, workers: int) -> None:
    if workers != 1:
        raise DmxError(f"--launcher inline is one process, found --workers {workers}: use ray or torchrun")
    from dmx.train.worker import train_worker

    train_worker(run)


def _launch_torchrun(run: Path, workers: int, max_failures: int) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={workers}", f"--max-restarts={max_failures}"),
        *("-m", "dmx.train.worker", "--run", str(run)),
    ]
    # torchrun would set one thread; the worker shares out the cores itself.
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // workers)), **os.environ}
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise DmxError(f"torchrun ended with status {status}: the first error above tells why")


def _launch_ray(run: Path, workers: int, max_failures: int) -> None:
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError as error:
        raise DmxError("--launcher ray wants Ray: install dmx[cpu] or dmx[gpu], or use torchrun") from error
    scratch = tempfile.mkdtemp(prefix="dmx-", dir="/tmp")  # Socket names in it must be short.
    joins_cluster = "RAY_ADDRESS" in os.environ
    cores = max(1, _cores() // workers)
    if joins_cluster:
        ray.init()
    else:
        ray.init(
            address="local",
            num_cpus=workers * cores,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=scratch,
            _node_ip_address="127.0.0.1",
        )
    try:
        _fit(run, workers, cores, max_failures, str(run / "ray") if joins_cluster else scratch)
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _fit(run: Path, workers: int, cores: int, max_failures: int, storage: str) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    has_gpu = torch.cuda.is_available()
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"run": str(run.absolute())},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=has_gpu,
            resources_per_worker={"CPU": cores} | ({"GPU": 1} if has_gpu else {}),
        ),
        run_config=RunConfig(
            name=run.name, storage_path=storage, failure_config=FailureConfig(max_failures=max_failures)
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo"),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps whatever a worker raised in types that changed between versions.
        raise DmxError(f"training failed: {error}") from error


def _ray_worker(settings: dict[str, Any]) -> None:
    """What Ray runs in each worker."""
    from ray.train import get_context

    from dmx.train.worker import train_worker

    context = get_context()
    train_worker(settings["run"], local=(context.get_local_rank(), context.get_local_world_size()))


def _cores() -> int:
    return len(os.sched_getaffinity(0))
