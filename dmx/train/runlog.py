"""What a run tells: metrics.jsonl (a line a step), epochs.jsonl (a line an epoch), and its trackers.

not_finite.jsonl has the steps that were not finite, if there were any, with their images.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from dmx.config import Config, to_tree
from dmx.errors import DmxError
from dmx.train.following import CLOSE_S, Follower
from dmx.train.trackers import Point, Tracker
from dmx.writing import write_whole, writing

STEPS = "metrics.jsonl"
EPOCHS = "epochs.jsonl"
NOT_FINITE = "not_finite.jsonl"
CONFIG = "config.yaml"
WRITER = ".writer"
PACKAGES = ("dmx", "torch", "torchvision", "timm", "deepspeed", "ray", "numpy", "numba", "safetensors")


class RunLog:
    """Appends to a run folder's logs. After a resume no step and no epoch stands there twice.

    Whoever opens it is the run's writer from then on. A process that was given up, because its host was out
    of reach, and runs on all the same, finds another's name in the folder and stops.
    """

    def __init__(self, run: Path, *, global_step: int, epoch: int, trackers: Sequence[Tracker] = ()) -> None:
        """Open the logs of a run that goes on at `global_step` and `epoch`; later lines are dropped.

        Args:
            run: the run folder.
            global_step: the next step of the run, from 0.
            epoch: the epoch it lies in, from 0.
            trackers: who else is told.
        """
        self._run, self._name = run, f"{os.uname().nodename}/{os.getpid()}/{secrets.token_hex(8)}"
        write_whole(run / WRITER, self._name)
        _truncate(run / STEPS, lambda line: line["global_step"] < global_step)
        _truncate(run / NOT_FINITE, lambda line: line["global_step"] < global_step)
        _truncate(run / EPOCHS, lambda line: line["epoch"] < epoch)
        self._steps: TextIO = open(run / STEPS, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()
        self._epochs: TextIO = open(run / EPOCHS, "a", encoding="utf-8")  # noqa: SIM115
        self._followers = [Follower(tracker) for tracker in trackers]

    def require_writer(self) -> None:
        """Check that no other process has taken the run over, before something is written that stays.

        Raises:
            DmxError: one has.
        """
        found = (self._run / WRITER).read_text(encoding="utf-8")
        if found != self._name:
            raise DmxError(
                f"{self._run}: another process ({found}) has taken this run over from {self._name}, which "
                "writes nothing more: train a run with one command at a time"
            )

    def step(self, values: Mapping[str, Any]) -> None:
        """Log one step; `values` has its `global_step`."""
        self._append(self._steps, values)
        self._show("train", values, values["global_step"])

    def not_finite(self, values: Mapping[str, Any]) -> None:
        """Log a step that was not finite; `values` has its `global_step`."""
        with open(self._run / NOT_FINITE, "a", encoding="utf-8") as file:
            self._append(file, values)

    def epoch(self, values: Mapping[str, Any], global_step: int) -> None:
        """Log one epoch; `values` has its `epoch`, and `global_step` is the first step after it."""
        self._append(self._epochs, values)
        # At its last step: whoever goes on after the epoch drops what TensorBoard has from `global_step` on.
        self._show("epoch", values, global_step - 1)

    def _append(self, file: TextIO, values: Mapping[str, Any]) -> None:
        with writing(self._run, "its logs", stays="checkpoints that are there are whole"):
            file.write(json.dumps(values) + "\n")
            file.flush()

    def _show(self, group: str, values: Mapping[str, Any], global_step: int) -> None:
        point = Point(global_step, time.time(), dict(_numbers(group, values)))
        for follower in self._followers:
            follower.put(point)

    def close(self, *, failed: bool = False) -> None:
        """Flush and close all logs; `failed` if the run did not end as it should."""
        self._steps.close()
        self._epochs.close()
        deadline = time.monotonic() + CLOSE_S
        for follower in self._followers:
            follower.end(failed)
        for follower in self._followers:
            follower.join(deadline)


def _numbers(group: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers by the names that trackers show them under."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{group}/{name}", value)
        elif isinstance(value, int | float) and name not in ("epoch", "step", "global_step"):
            yield f"{group}/{name}", value


def _truncate(file: Path, keeps: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the lines for which `keeps` holds; a line cut off by a crash goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if keeps(values):
            kept.append(line + "\n")
    write_whole(file, "".join(kept))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; none when it does not exist. A last one that was cut off by a crash is left out."""
    if not file.exists():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_run(run: Path, config: Config) -> None:
    """Save the resolved configuration into the run folder."""
    with writing(run, "the run"):
        run.mkdir(parents=True, exist_ok=True)
    write_whole(run / CONFIG, yaml.safe_dump(to_tree(config), sort_keys=False))
