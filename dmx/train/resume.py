"""Going on with other settings: what of them may change, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmx.config import Config, differences, from_tree, read_yaml, with_absolute_paths
from dmx.errors import DmxError
from dmx.model import build_model
from dmx.model.backbone import require_weights
from dmx.model.weights import load_weights
from dmx.train.checkpoint import Progress, latest, read_state
from dmx.train.runlog import CONFIG, STEPS, read_lines

# What a checkpoint does not depend on. The model's shape, the data it was trained on and what makes its
# batches stay; accumulation deals the same batch out in other parts, for other numbers of workers.
CHANGEABLE = (
    "timeout_s",
    "on_nan",
    "deterministic",
    "data.workers",
    "data.tests",
    "batch.accumulation",
    "cluster.",
    "schedule.",
    "optim.",
    "classifier.",
    "loss.",
    "log.",
)


def check_changes(run: Path, config: Config) -> None:
    """Check that `config`, with absolute paths, goes with what the run folder holds, if it holds anything.

    Raises:
        DmxError: naming the settings that cannot change any more.
    """
    checkpoint = latest(run)
    if checkpoint is None:
        return
    progress, trained_with = read_state(checkpoint)
    changed = differences(with_absolute_paths(trained_with), config)
    require_changeable(checkpoint, changed, CHANGEABLE, "leave them as they are, or choose another --run")
    _check_schedule(checkpoint, progress, config, changed)


def starting_point(run: Path, config: Config) -> str | None:
    """What a run without a checkpoint takes from its file of weights, in a line; None where it takes none.

    Raises:
        DmxError: the file cannot be read or does not fit the backbone, or there is none where one is needed.
    """
    weights = config.model.weights
    if latest(run) is not None:
        return None
    require_weights(config.model)
    if weights is None:
        return None
    model = build_model(replace(config.model, pretrained=False, weights=None))
    return load_weights(model, weights, config.model.backbone).told(weights)


def require_changeable(
    checkpoint: Path, changed: Mapping[str, Any], allowed: tuple[str, ...], advice: str
) -> None:
    """Check that only settings differ that may.

    Args:
        checkpoint: what is gone on from.
        changed: setting to (old, new).
        allowed: settings that may differ, and beginnings of their names.
        advice: what to do if others do.

    Raises:
        DmxError: naming them.
    """
    settled = {name: values for name, values in changed.items() if not name.startswith(allowed)}
    if settled:
        raise DmxError(
            f"{checkpoint} was trained with other settings ({_shown(settled)}), which cannot change any "
            f"more: {advice}. What can change: " + ", ".join(name.rstrip(".") for name in allowed)
        )


def require_epochs_left(checkpoint: Path, progress: Progress, config: Config) -> None:
    """Check that the schedule does not end before the checkpoint.

    Raises:
        DmxError: it does.
    """
    if config.schedule.epochs <= progress.epoch:
        raise DmxError(
            f"schedule.epochs: wanted more than the {progress.epoch} epochs that {checkpoint} has done, "
            f"found {config.schedule.epochs}"
        )


def _check_schedule(checkpoint: Path, progress: Progress, config: Config, changed: dict[str, Any]) -> None:
    """A changed schedule must not end before the checkpoint."""
    schedule = config.schedule
    if "schedule.epochs" in changed:
        require_epochs_left(checkpoint, progress, config)
    if "schedule.steps_per_epoch" in changed and schedule.steps_per_epoch < progress.step:
        raise DmxError(
            f"schedule.steps_per_epoch: wanted at least the {progress.step} steps that {checkpoint} has done "
            f"of its epoch, found {schedule.steps_per_epoch}"
        )


def first_step(run: Path) -> int:
    """The step, from 0, at which training goes on from the run's latest checkpoint."""
    checkpoint = latest(run)
    return 0 if checkpoint is None else read_state(checkpoint)[0].global_step


def standing(run: Path, config: Config) -> str:
    """Where a run that was stopped stands, and what of it is saved: the end of a sentence."""
    steps = config.schedule.epochs * config.schedule.steps_per_epoch
    lines = read_lines(run / STEPS)
    done = lines[-1]["global_step"] + 1 if lines else 0
    at = f" at step {done} of {steps}"
    checkpoint = latest(run)
    if checkpoint is None:
        return f"{at}, before its first checkpoint; the same command begins again, and comes to the same"
    saved = read_state(checkpoint)[0].global_step
    if saved == done:
        return f"{at}, saved {checkpoint}; the same command goes on"
    return (
        f"{at}, where there was no time to save; the same command goes on from step {saved}, "
        f"{checkpoint}, and comes to the same"
    )


def goes_further(run: Path, config: Config) -> bool:
    """Whether a finished run has epochs left to do under `config`, with absolute paths.

    Raises:
        DmxError: other settings change, which would do nothing; or there is no checkpoint to go on from.
    """
    saved = with_absolute_paths(from_tree((str(run / CONFIG), read_yaml(run / CONFIG))))
    changed = differences(saved, config)
    if not changed:
        return False
    done = saved.schedule.epochs
    if config.schedule.epochs <= done:
        raise DmxError(
            f"{run} is finished after {done} epochs, so that other settings ({_shown(changed)}) would change "
            f"nothing: train it further with schedule.epochs above {done}, choose another --run, or test it "
            f"elsewhere with `dmx evaluate {run} DATASET`"
        )
    if latest(run) is None:
        raise DmxError(f"{run} is finished and holds no checkpoint to go on from: choose another --run")
    return True


def _shown(changed: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
