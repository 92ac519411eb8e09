"""What a run folder tells, of a finished run and of one that is still training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmx.config import Config, from_tree, read_yaml
from dmx.errors import DmxError
from dmx.train.branch import ORIGIN
from dmx.train.clusters import cluster_files
from dmx.train.provenance import STARTS, code_told
from dmx.train.runlog import CONFIG, EPOCHS, STEPS
from dmx.train.worker import RESULT

_PLACES = ("epoch", "step", "global_step")

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class RunRecord:
    """A run.

    Attributes:
        folder: where it is.
        config: its settings.
        steps: name of what was logged (a loss, lr, step_s) to (place in epochs, value), both (n,).
        num_steps: steps logged.
        epochs: one record of each epoch that is done.
        clusters: epoch to file, of the clusters that were kept.
        versions: of Python and packages, by name.
        result: None while it is not finished.
        origin: the run that it branched from; None for one from the start.
    """

    folder: Path
    config: Config
    steps: dict[str, Curve]
    num_steps: int
    epochs: list[dict[str, Any]]
    clusters: dict[int, Path]
    versions: dict[str, str]
    result: dict[str, Any] | None
    origin: dict[str, Any] | None

    @staticmethod
    def read(folder: Path) -> RunRecord:
        """All of it but what clusters, checkpoints and data sets hold.

        Raises:
            DmxError: it is no run folder, or its configuration cannot be read.
        """
        file = folder / CONFIG
        if not file.is_file():
            raise DmxError(
                f"{folder}: wanted a run folder of `dmx train` with {CONFIG}, found none; give the folder "
                "that --run named"
            )
        config = from_tree((str(file), read_yaml(file)))
        steps, count = _read_steps(folder / STEPS, config.schedule.steps_per_epoch)
        return RunRecord(
            folder,
            config,
            steps,
            count,
            list(_lines(folder / EPOCHS)),
            cluster_files(folder),
            _versions(folder / STARTS),
            _tree(folder / RESULT),
            _tree(folder / ORIGIN),
        )

    def of_epochs(self, *names: str) -> Curve:
        """The epochs (from 1) whose record has a value of that name, nested as told, and the values."""
        found = []
        for record in self.epochs:
            value: Any = record
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                found.append((record["epoch"] + 1, value))
        places, values = zip(*found, strict=True) if found else ((), ())
        return np.array(places, np.float64), np.array(values, np.float64)


def _read_steps(file: Path, steps_per_epoch: int) -> tuple[dict[str, Curve], int]:
    found: dict[str, tuple[list[float], list[float]]] = {}
    count = 0
    for line in _lines(file):
        count += 1
        # The number of steps may have changed with a resume.
        place = line["epoch"] + min((line["step"] + 1) / steps_per_epoch, 1)
        for name, value in line.items():
            if name not in _PLACES and isinstance(value, int | float):
                places, values = found.setdefault(name, ([], []))
                places.append(place)
                values.append(value)
    return {name: (np.array(places), np.array(values)) for name, (places, values) in found.items()}, count


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a log; a running run may be writing the last one just now."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as log:
        for line in log:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def _versions(file: Path) -> dict[str, str]:
    """Of packages, machine and code when the run was last started."""
    starts = list(_lines(file))
    if not starts:
        return {}
    code = {f"code of {name}": code_told(state) for name, state in starts[-1]["code"].items()}
    return {**starts[-1]["versions"], **code}


def _tree(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DmxError(f"{file}: wanted JSON as `dmx train` writes it, found {error}; remove it") from error
    return found
