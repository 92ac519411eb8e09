"""Workers of a task on Ray Train: started again when they die, their words brought to this process."""

from __future__ import annotations

import io
import math
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from dmx.cores import cores
from dmx.errors import DmxError
from dmx.launching import run_task
from dmx.ray_cluster import ray_cluster

FOLLOW_S = 0.2
OBJECT_STORE_BYTES = 100_000_000  # Workers pass nothing through it.


def launch_ray(
    task: str, arguments: dict[str, Any], folder: Path, workers: int, timeout_s: float, max_failures: int
) -> None:
    """Run a task on Ray Train; arguments as for `dmx.launching.launch`.

    Raises:
        DmxError: there is no Ray, or the workers failed for good.
    """
    cores_each = max(1, cores() // workers)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".launch-*"):  # by a launch that was killed
        shutil.rmtree(left, ignore_errors=True)
    storage = Path(tempfile.mkdtemp(prefix=".launch-", dir=folder.absolute()))
    try:
        with ray_cluster(workers * cores_each, OBJECT_STORE_BYTES), _following(storage / "output") as output:
            settings = {
                "task": task,
                "arguments": arguments,
                "output": str(output),
                "failure": str(storage / "failure"),
                "is_terminal": sys.stderr.isatty(),
            }
            _fit(settings, workers, cores_each, storage, timeout_s, max_failures)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _fit(
    settings: dict[str, Any],
    workers: int,
    cores_each: int,
    storage: Path,
    timeout_s: float,
    max_failures: int,
) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    failure = Path(settings["failure"])
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=has_gpu,
            resources_per_worker={"CPU": cores_each} | ({"GPU": 1} if has_gpu else {}),
        ),
        run_config=RunConfig(
            name="workers", storage_path=str(storage), failure_config=FailureConfig(max_failures=max_failures)
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout_s=math.ceil(timeout_s)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps whatever a worker raised in types that changed between versions.
        raise DmxError(_told(failure) or f"the workers failed: {error}") from error
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
        _work(settings)
    except DmxError as error:
        failure.write_text(str(error), encoding="utf-8")
        raise


def _work(settings: dict[str, Any]) -> None:
    from ray.train import get_context

    context = get_context()
    local = (context.get_local_rank(), context.get_local_world_size())
    if context.get_world_rank() != 0:
        run_task(settings["task"], settings["arguments"], local)
        return
    with (
        _Output(settings["output"], settings["is_terminal"]) as output,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        run_task(settings["task"], settings["arguments"], local)


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
