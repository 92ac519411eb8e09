"""Train a model on a labelled source and an unlabelled target.

A run lives in one folder: config.yaml, metrics.jsonl (a line a step), epochs.jsonl (a line an epoch),
tensorboard/, checkpoints/ and, once it is finished, result.json. The same command goes on where an
interrupted run stands; `dmx train --run RUN --resume` does so without repeating the settings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dmx.errors import DmxError

if TYPE_CHECKING:
    from dmx.config import Config

SUMMARY = "train a model on a labelled source and an unlabelled target"
LAUNCHERS = ("ray", "torchrun", "inline")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--run", dest="folder", required=True, metavar="RUN", help="run folder; made if it does not exist"
    )
    parser.add_argument("--recipe", help="recipe that comes with DMX, or a YAML file of differences")
    parser.add_argument("--source", help="labelled data set (data.source)")
    parser.add_argument("--target", help="unlabelled data set (data.target); none trains on the source alone")
    parser.add_argument("--test", action="append", help="data set to report on (data.tests); repeatable")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, e.g. schedule.epochs=3"
    )
    parser.add_argument("--workers", type=int, default=1, help="training processes (default: 1)")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="ray", help="who starts the processes (default: ray)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the settings saved in the run folder"
    )


def run(args: argparse.Namespace) -> int:
    """Train, or go on training, or say that the run is finished."""
    from dmx.train.data import TrainingData
    from dmx.train.launch import launch
    from dmx.train.runlog import describe_run
    from dmx.train.worker import RESULT

    folder = Path(args.folder)
    config = _resolve(args, folder)
    if (folder / RESULT).exists():
        print(f"{folder} is finished; choose another --run to train again")
    else:
        TrainingData.open(config)  # An error in the data sets is better known before workers start.
        describe_run(folder, config)
        launch(folder, args.launcher, args.workers)
    print(_table(json.loads((folder / RESULT).read_text(encoding="utf-8"))))
    print(f"to test it elsewhere: dmx evaluate {folder} DATASET")
    return 0


def _resolve(args: argparse.Namespace, folder: Path) -> Config:
    """The run's configuration: from the arguments, or from the run folder when it goes on."""
    from dmx import config
    from dmx.train.runlog import CONFIG

    saved = folder / CONFIG
    given = [
        *([config.recipe(args.recipe)] if args.recipe else []),
        ("arguments", {"data": _data_arguments(args)}),
        config.overrides(args.set),
    ]
    if args.resume:
        if not saved.exists():
            raise DmxError(f"{folder}: wanted a run folder with {CONFIG} to resume, found none")
        given = [(str(saved), config.read_yaml(saved)), *given]
    resolved = config.from_tree(*given)
    if resolved.data.source is None:
        raise DmxError("--source is missing: a labelled data set, for instance one rendered by `dmx synth`")
    if saved.exists() and not args.resume:
        _require_same(resolved, config.from_tree((str(saved), config.read_yaml(saved))), folder)
    return resolved


def _data_arguments(args: argparse.Namespace) -> dict[str, object]:
    """Data sets by absolute path: workers may run in another folder."""
    values: dict[str, object] = {}
    for name in ("source", "target"):
        if getattr(args, name):
            values[name] = _absolute(getattr(args, name))
    if args.test:
        values["tests"] = [_absolute(path) for path in args.test]
    return values


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _require_same(wanted: Config, saved: Config, folder: Path) -> None:
    from dmx.config import differences

    changed = differences(saved, wanted)
    if changed:
        shown = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise DmxError(
            f"{folder} holds a run with other settings ({shown}): choose another --run, or change settings "
            "of this one with --resume --set"
        )


def _table(result: dict[str, object]) -> str:
    """The final results on the test sets."""
    tests = result["tests"]
    assert isinstance(tests, dict)
    if not tests:
        return f"{result['steps']} steps; no test set was given"
    width = max(map(len, tests))
    lines = [f"{'test set':<{width}}     mAP  rank-1  rank-5 rank-10    mINP  queries"]
    for name, m in tests.items():
        values = "".join(f"{m[key]:8.1%}" for key in ("map", "rank1", "rank5", "rank10", "minp"))
        lines.append(f"{name:<{width}}{values}{m['valid_queries']:9d}")
    return "\n".join(lines)
