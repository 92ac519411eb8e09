"""Trackers of runs: TensorBoard, Weights & Biases and MLflow, each told the same.

They get settings, losses and results under the run folder's name; of data sets and weights the last part of
the path; no images, no host, no user. `trackers.json` keeps the names that they give a run, so that it goes
on under them when it is resumed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dmx.config import Config, leaves, to_tree
from dmx.errors import DmxError
from dmx.progress import say
from dmx.sections import LogConfig
from dmx.settings import flatten

IDS = "trackers.json"
PATHS = ("data.source", "data.target", "data.tests", "model.weights")
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
INSTALL = {"tensorboard": "tensorboard", "wandb": "dmx[track]", "mlflow": "dmx[track]"}
MLFLOW_FILE = "mlflow.db"
_MLFLOW_METRICS = 1000  # that a call takes
_MLFLOW_NAME = re.compile(r"[^\w\-. :/]")


@dataclass(frozen=True)
class Point:
    """Numbers by name, such as `train/loss`, at a step of the run; `time_s` since the epoch of Unix."""

    global_step: int
    time_s: float
    values: Mapping[str, float]


class Tracker(Protocol):
    """Someone who is told of a run. Every method may fail and may take long: see `dmx.train.following`."""

    @property
    def name(self) -> str:
        """As `log.trackers` has it."""

    def open(self) -> None:
        """Begin, or go on with what was begun for this run folder before."""

    def send(self, points: Sequence[Point]) -> None:
        """Tell of some steps, in their order."""

    def close(self, failed: bool) -> None:
        """Tell that this process ends, and whether by an error."""


def check_trackers(log: LogConfig) -> None:
    """Check that the trackers that are wanted are installed.

    Raises:
        DmxError: naming the one that is not, and what installs it.
    """
    for name in log.trackers:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise DmxError(
                f'log.trackers: wanted {name}, found that it is not installed: pip install "{INSTALL[name]}"'
            )
    if "mlflow" in log.trackers and "MLFLOW_TRACKING_URI" not in os.environ:
        missing = [name for name in ("sqlalchemy", "alembic") if importlib.util.find_spec(name) is None]
        if missing:
            raise DmxError(
                f"log.trackers: mlflow keeps runs in {MLFLOW_FILE} beside the run folder unless "
                f"MLFLOW_TRACKING_URI names a server, and wants {' and '.join(missing)} for that: "
                'pip install "dmx[track]"'
            )


def make_trackers(config: Config, run: Path, global_step: int) -> list[Tracker]:
    """The trackers of a run that goes on at `global_step`."""
    made: list[Tracker] = []
    for name in dict.fromkeys(config.log.trackers):
        if name == "tensorboard":
            made.append(TensorBoard(run, global_step))
        elif name == "wandb":
            made.append(WandB(run, config))
        else:
            made.append(MLflow(run, config))
    return made


def shown_settings(config: Config) -> dict[str, Any]:
    """Settings by dotted name as trackers get them: of paths the last part."""
    flat = flatten(to_tree(config), leaves(), "configuration")
    for name in PATHS:
        value = flat[name]
        flat[name] = (
            [Path(path).name for path in value] if isinstance(value, list) else value and Path(value).name
        )
    return {name: value for name, value in flat.items() if not name.startswith("log.")}


def _known(run: Path) -> dict[str, str]:
    file = run / IDS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _keep(run: Path, name: str, value: str) -> None:
    """Remember what a tracker calls the run."""
    temporary = run / f".{IDS}.{name}"
    temporary.write_text(json.dumps(_known(run) | {name: value}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(run / IDS)


class TensorBoard:
    """Events in the run folder's `tensorboard/`."""

    name = "tensorboard"

    def __init__(self, run: Path, global_step: int) -> None:
        self._folder, self._global_step = run / self.name, global_step

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=self._global_step or None, flush_secs=10)

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.global_step, point.time_s)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the run folder, for `wandb sync`."""

    name = "wandb"

    def __init__(self, run: Path, config: Config) -> None:
        self._folder, self._config = run, config

    def open(self) -> None:
        """Begin the run there, or go on with it."""
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True,
            x_disable_machine_info=True, x_save_requirements=False, host="",
        )  # fmt: skip
        if _asks_for_login(wandb):
            raise RuntimeError("no login: run `wandb login`, or set WANDB_MODE=offline")
        known = _known(self._folder).get(self.name)
        number = known or secrets.token_hex(4)
        _keep(self._folder, self.name, number)
        project = self._config.log.project or os.environ.get("WANDB_PROJECT", "dmx")
        self._run = wandb.init(
            project=project, id=number, name=self._folder.name, resume="allow", dir=str(self._folder),
            settings=settings,
        )  # fmt: skip
        self._run.config.update(shown_settings(self._config), allow_val_change=True)
        # Steps that are trained again after an interruption take their own place: W&B's own count only grows.
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")
        if not self._run.offline:
            say(f"wandb: {self._run.url}")

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, "global_step": point.global_step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _asks_for_login(wandb: Any) -> bool:
    """Whether W&B would ask whoever sits at the terminal, if anybody does, for a key."""
    is_online = os.environ.get("WANDB_MODE", "online") in ("online", "run")
    if not is_online:
        return False
    try:
        return not wandb.login(prompt=False)
    except TypeError:  # before `prompt` came, there was no word for it
        return not wandb.api.api_key


class MLflow:
    """A run of MLflow: on the server that MLFLOW_TRACKING_URI names, or in a file beside the run folder."""

    name = "mlflow"

    def __init__(self, run: Path, config: Config) -> None:
        self._folder, self._config = run, config

    def open(self) -> None:
        """Begin the run there, or go on with it."""
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
        local = f"sqlite:///{self._folder.absolute().parent / MLFLOW_FILE}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
        known = _known(self._folder).get(self.name)
        if known is None:
            begun = self._client.create_run(self._experiment(), run_name=self._folder.name)
            _keep(self._folder, self.name, begun.info.run_id)
        else:
            begun = self._client.get_run(known)
            self._client.update_run(known, status="RUNNING")
        self._number = begun.info.run_id
        self._tell_settings(begun.data.params)

    def _experiment(self) -> str:
        name = self._config.log.project or os.environ.get("MLFLOW_EXPERIMENT_NAME", "dmx")
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _tell_settings(self, told: Mapping[str, str]) -> None:
        """Settings as parameters; those that changed since, which parameters cannot, as tags."""
        from mlflow.entities import Param, RunTag

        settings = {name: str(value) for name, value in shown_settings(self._config).items()}
        new = [Param(name, value) for name, value in settings.items() if name not in told]
        changed = [
            RunTag(f"changed.{name}", value)
            for name, value in settings.items()
            if told.get(name, value) != value
        ]
        self._client.log_batch(self._number, params=new, tags=changed)

    def send(self, points: Sequence[Point]) -> None:
        """Add values; MLflow takes a thousand at a time."""
        from mlflow.entities import Metric

        metrics = [
            Metric(_MLFLOW_NAME.sub("_", name), value, int(1000 * point.time_s), point.global_step)
            for point in points
            for name, value in point.values.items()
        ]
        for begin in range(0, len(metrics), _MLFLOW_METRICS):
            self._client.log_batch(self._number, metrics=metrics[begin : begin + _MLFLOW_METRICS])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._number, status="FAILED" if failed else "FINISHED")
