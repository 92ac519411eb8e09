"""Train a model on a labelled source and an unlabelled target.

A run lives in one folder: config.yaml, metrics.jsonl (a line a step), epochs.jsonl (a line an epoch),
tensorboard/, checkpoints/ and, once it is finished, result.json. The same command goes on where an
interrupted run stands; `dmx train --run RUN --resume` does so without repeating the settings, and with
changes to those that a checkpoint does not depend on (--set). A finished run is trained further with
`--resume --set schedule.epochs=N`.

`dmx train --run RUN --branch TRUNK --after E` begins RUN where the run TRUNK stood after E epochs, with its
settings and changes to them. So ways of training that differ only later share their beginning.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

from dmx.config import (
    LAUNCHERS,
    Config,
    differences,
    field_types,
    from_tree,
    leaves,
    overrides,
    read_yaml,
    recipe,
    recipe_names,
    with_absolute_paths,
)
from dmx.errors import DmxError
from dmx.settings import limits, wanted

SUMMARY = "train a model on a labelled source and an unlabelled target"
TASK = "dmx.train.worker:train_worker"
HELP_WIDTH = 84


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--run", dest="folder", required=True, metavar="RUN", help="run folder; made if it does not exist"
    )
    parser.add_argument(
        "--recipe",
        help=f"one that comes with DMX ({', '.join(recipe_names())}), or a YAML file of differences from the "
        "defaults; relative paths in it start from the current folder",
    )
    parser.add_argument("--source", help="labelled data set (data.source)")
    parser.add_argument("--target", help="unlabelled data set (data.target); none trains on the source alone")
    parser.add_argument("--test", action="append", help="data set to report on (data.tests); repeatable")
    parser.add_argument(
        "--init",
        metavar="FILE",
        help="weights to start from (model.weights): of DMX, torchreid, FastReID, OpenUnReID, timm, ...",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting, e.g. schedule.epochs=3"
    )
    parser.add_argument(
        "--settings", action=_ShowSettings, help="show every setting with its default, and exit"
    )
    parser.add_argument("--workers", type=int, default=1, help="training processes (default: 1)")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="ray", help="who starts the processes (default: ray)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the settings saved in the run folder; --set changes those that still can change",
    )
    parser.add_argument(
        "--branch", type=Path, metavar="TRUNK", help="another run: begin where it stood, with its settings"
    )
    parser.add_argument(
        "--after",
        type=int,
        metavar="E",
        help="with --branch: after so many of its epochs, whose checkpoint it must have kept "
        "(schedule.keep_checkpoints)",
    )


class _ShowSettings(argparse.Action):
    """Prints the settings and ends, as --help does, whatever else is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(_settings_table())
        parser.exit()


def _settings_table() -> str:
    """Every setting with its default, what it takes, its limits and its meaning, by section."""
    known = leaves()
    widths = [max(map(len, known)), max(len(_yaml(item)) for _, item in known.values())]
    lines, section = ["Of the run as a whole."], ""
    for name, (kind, item) in known.items():
        parent = name.rpartition(".")[0]
        if parent != section:
            section = parent
            lines += ["", f"{section}: {field_types(Config)[section].__doc__}"]
        takes = ", ".join(filter(None, (wanted(kind), limits(item))))
        lines.append(f"  {name:<{widths[0]}}  {_yaml(item):<{widths[1]}}  {takes}")
        lines.append(textwrap.indent(textwrap.fill(item.metadata["help"], HELP_WIDTH), " " * 6))
    return "\n".join(lines)


def _yaml(item: dataclasses.Field[Any]) -> str:
    """A setting's default as one would write it."""
    value = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return value if isinstance(value, str) else json.dumps(value)


def run(args: argparse.Namespace) -> int:
    """Train, or go on training, or say that the run is finished."""
    folder = Path(args.folder)
    config = _resolve(args, folder)

    from dmx.launching import check_launch, launch
    from dmx.train.branch import begin_branch, branch_point, check_branch
    from dmx.train.data import TrainingData, shares_batches
    from dmx.train.resume import check_changes, goes_further, starting_point
    from dmx.train.runlog import CONFIG, describe_run
    from dmx.train.worker import RESULT

    result = folder / RESULT
    if result.exists() and not goes_further(folder, config):
        print(
            f"{folder} is finished; train it further with --resume --set schedule.epochs=N, or choose "
            "another --run to train again"
        )
    else:
        # Nothing is written, and no worker starts, before all that can be known to be wrong is known.
        check_launch(args.launcher, args.workers)
        trunk = None
        if args.branch and not (folder / CONFIG).exists():  # otherwise it has begun, and goes on
            trunk = branch_point(args.branch, args.after)
            check_branch(trunk, config)
        else:
            check_changes(folder, config)
            if told := starting_point(folder, config):
                print(told, flush=True)
        TrainingData.open(config, args.workers)
        result.unlink(missing_ok=True)
        if trunk is not None:
            begin_branch(folder, trunk, config)
        describe_run(folder, config)
        launch(
            TASK,
            {"run": str(folder.absolute())},
            folder=folder,
            launcher=args.launcher,
            workers=args.workers,
            timeout_s=config.timeout_s,
            allowed=lambda workers: shares_batches(config, workers),
        )
    print(_table(json.loads(result.read_text(encoding="utf-8"))))
    print("to test it elsewhere:")
    print(f"dmx evaluate {folder} DATASET")
    return 0


def _resolve(args: argparse.Namespace, folder: Path) -> Config:
    """The run's configuration: from the arguments, or from the run folder when it goes on."""
    from dmx.train.runlog import CONFIG

    if (args.branch is None) != (args.after is None) or (args.branch and args.resume):
        raise DmxError(
            "--branch wants --after, the number of epochs of the other run to begin behind, and no --resume: "
            "the same command goes on where an interrupted branch stands"
        )
    saved = folder / CONFIG
    given = [
        *([recipe(args.recipe)] if args.recipe else []),
        ("arguments", {"data": _data_arguments(args), "model": {"weights": args.init} if args.init else {}}),
        overrides(args.set),
    ]
    if args.resume:
        if not saved.exists():
            raise DmxError(f"{folder}: wanted a run folder with {CONFIG} to resume, found none")
        given = [(str(saved), read_yaml(saved)), *given]
    if args.branch:
        trunk = args.branch / CONFIG
        if not trunk.exists():
            raise DmxError(f"{args.branch}: wanted a run folder with {CONFIG} to branch from, found none")
        given = [(str(trunk), read_yaml(trunk)), *given]
    resolved = with_absolute_paths(from_tree(*given))
    if resolved.data.source is None:
        raise DmxError("--source is missing: a labelled data set, for instance one rendered by `dmx synth`")
    if saved.exists() and not args.resume:
        _require_same(resolved, with_absolute_paths(from_tree((str(saved), read_yaml(saved)))), folder)
    return resolved


def _data_arguments(args: argparse.Namespace) -> dict[str, object]:
    given = {"source": args.source, "target": args.target, "tests": args.test}
    return {name: value for name, value in given.items() if value}


def _require_same(wanted: Config, saved: Config, folder: Path) -> None:
    changed = differences(saved, wanted)
    if changed:
        shown = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise DmxError(
            f"{folder} holds a run with other settings ({shown}): choose another --run, or change settings "
            "of this one with --resume --set"
        )


def _table(result: dict[str, Any]) -> str:
    """The final results on the test sets."""
    tests = result["tests"]
    if not tests:
        return f"{result['steps']} steps; no test set was given"
    width = max(map(len, tests))
    lines = [f"{'test set':<{width}}     mAP  rank-1  rank-5 rank-10    mINP  queries"]
    for name, m in tests.items():
        values = "".join(f"{m[key]:8.1%}" for key in ("map", "rank1", "rank5", "rank10", "minp"))
        lines.append(f"{name:<{width}}{values}{m['valid_queries']:9d}")
    if result.get("chosen_on_tests"):
        lines.append(
            f"of epoch {result['epoch'] + 1} of {result['epochs']}, the best on the first test set, as the "
            "published code chooses; `dmx evaluate --best` takes its checkpoint, without --best the last one"
        )
    return "\n".join(lines)
