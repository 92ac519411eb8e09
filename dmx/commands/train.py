"""Train a model on a labelled source and an unlabelled target.

A run lives in one folder: config.yaml, starts.jsonl (code, versions and data of every start),
metrics.jsonl (a line a step), epochs.jsonl (a line an epoch), tensorboard/, checkpoints/, clusters/ and, once
it is finished, result.json. The same command goes on where an interrupted run stands; `dmx train --run RUN
--resume` does so without repeating the settings, and with changes to those that a checkpoint does not
depend on. A finished run is trained further with `--resume --schedule.epochs N`.

Settings come from the defaults, over them --recipe (or, with --resume and --branch, the run's own and then
--recipe), over them the options. Every setting is an option; `dmx train --settings` tells them all.

`dmx train --run RUN --branch TRUNK --after E` begins RUN where the run TRUNK stood after E epochs, with its
settings and changes to them. So ways of training that differ only later share their beginning.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from dmx.commands.options import GIVEN, Give, add_setting_options, given_settings
from dmx.config import (
    LAUNCHERS,
    Config,
    differences,
    from_tree,
    read_yaml,
    recipe,
    recipe_names,
    to_tree,
    with_absolute_paths,
)
from dmx.errors import DmxError
from dmx.settings import unflatten

SUMMARY = "train a model on a labelled source and an unlabelled target"
TASK = "dmx.train.worker:train_worker"
CONFIG = "config.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--run", dest="folder", metavar="RUN", help="run folder; made if it does not exist")
    parser.add_argument(
        "--recipe",
        help=f"one that comes with DMX ({', '.join(recipe_names())}), or a YAML file of differences from the "
        "defaults; relative paths in it start from the current folder",
    )
    for option, text in (
        ("--source", "labelled data set (data.source)"),
        ("--target", "unlabelled data set (data.target); none trains on the source alone"),
        ("--test", "data set to report on (data.tests); repeatable"),
    ):
        parser.add_argument(option, dest=GIVEN, action=Give, metavar="DATASET", help=text)
    parser.add_argument(
        "--init",
        dest=GIVEN,
        action=Give,
        metavar="FILE",
        help="weights to start from (model.weights): of DMX, torchreid, FastReID, OpenUnReID, timm, ...",
    )
    add_setting_options(parser)
    parser.add_argument(
        "--print-config",
        nargs="?",
        const="all",
        choices=("all", "differences"),
        help="print the settings that would be trained with as YAML, which is a recipe again, and exit; "
        "differences: only those that are not the defaults",
    )
    parser.add_argument("--workers", type=int, default=1, help="training processes (default: 1)")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="ray", help="who starts the processes (default: ray)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the settings saved in the run folder; settings that still can change may be given",
    )
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="go on although a data set is not what the run was begun with; recorded in starts.jsonl",
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


def run(args: argparse.Namespace) -> int:
    """Train, or go on training, or say that the run is finished."""
    from dmx.writing import writing

    with writing(args.folder or ".", "the run", stays="checkpoints that are there are whole"):
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    if args.print_config:
        config = _resolve(args)
        changed = differences(Config(), config)
        less = unflatten((name, new) for name, (_, new) in changed.items())
        tree = to_tree(config) if args.print_config == "all" else less
        print(yaml.safe_dump(tree, sort_keys=False), end="")
        return 0
    if args.folder is None:
        raise DmxError("--run is missing: a folder for the run, for instance runs/first")
    folder = Path(args.folder)
    config = _resolve(args)
    if config.data.source is None:
        raise DmxError("--source is missing: a labelled data set, for instance one rendered by `dmx synth`")
    if (folder / CONFIG).exists() and not args.resume:
        saved = from_tree((str(folder / CONFIG), read_yaml(folder / CONFIG)))
        _require_same(config, with_absolute_paths(saved), folder)

    from dmx import stopping
    from dmx.launching import launch, remove_launches
    from dmx.train.data import shares_batches
    from dmx.train.recovery import DESCRIPTION, recover
    from dmx.train.resume import goes_further, standing
    from dmx.train.worker import RESULT

    recover(folder, DESCRIPTION)
    result = folder / RESULT
    if result.exists() and not goes_further(folder, config):
        remove_launches(folder)
        print(
            f"{folder} is finished; train it further with --resume --schedule.epochs N, or choose "
            "another --run to train again"
        )
    else:
        _begin(args, folder, config)
        stopping.say_at_the_end(lambda: standing(folder, config))
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


def _begin(args: argparse.Namespace, folder: Path, config: Config) -> None:
    """Describe the run in its folder, or how it goes on.

    Nothing is written, and no worker starts, before all that can be known to be wrong is known.
    """
    from dmx.launching import check_launch
    from dmx.train.branch import begin_branch, branch_point, check_branch
    from dmx.train.data import TrainingData
    from dmx.train.provenance import check_data, record_start
    from dmx.train.resume import check_changes, first_step, starting_point
    from dmx.train.runlog import describe_run
    from dmx.train.trackers import check_trackers
    from dmx.train.worker import RESULT

    check_launch(args.launcher, args.workers)
    trunk = None
    if args.branch and not (folder / CONFIG).exists():  # otherwise it has begun, and goes on
        trunk = branch_point(args.branch, args.after)
        check_branch(trunk, config)
    else:
        check_changes(folder, config)
        if told := starting_point(folder, config):
            print(told, flush=True)
    check_trackers(config.log)
    data = TrainingData.open(config, args.workers).describe()
    if not args.allow_changed_data:
        check_data(folder if trunk is None else args.branch, data)
    (folder / RESULT).unlink(missing_ok=True)
    if trunk is not None:
        begin_branch(folder, trunk, config)
    changed = _changed(folder, config)
    describe_run(folder, config)
    if differs := record_start(folder, data, changed, first_step(folder)):
        print(f"the run goes on under other code or versions: {differs}", file=sys.stderr, flush=True)


def _changed(folder: Path, config: Config) -> dict[str, Any]:
    """Setting to (old, new) of what a run folder holds and what it is about to hold."""
    if not (folder / CONFIG).exists():
        return {}
    saved = from_tree((str(folder / CONFIG), read_yaml(folder / CONFIG)))
    return differences(with_absolute_paths(saved), config)


def _resolve(args: argparse.Namespace) -> Config:
    """The run's configuration: from the arguments, or from the run folder when it goes on."""
    if (args.branch is None) != (args.after is None) or (args.branch and args.resume):
        raise DmxError(
            "--branch wants --after, the number of epochs of the other run to begin behind, and no --resume: "
            "the same command goes on where an interrupted branch stands"
        )
    layers = [recipe(args.recipe)] if args.recipe else []
    layers.append(given_settings(args))
    if args.resume:
        layers.insert(0, _saved(Path(args.folder or "."), "resume"))
    if args.branch:
        layers.insert(0, _saved(args.branch, "branch from"))
    return with_absolute_paths(from_tree(*layers))


def _saved(folder: Path, what_for: str) -> tuple[str, dict[str, Any]]:
    """The settings of a run that there is."""
    if not (folder / CONFIG).exists():
        raise DmxError(f"{folder}: wanted a run folder with {CONFIG} to {what_for}, found none")
    return str(folder / CONFIG), read_yaml(folder / CONFIG)


def _require_same(wanted: Config, saved: Config, folder: Path) -> None:
    changed = differences(saved, wanted)
    if changed:
        shown = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise DmxError(
            f"{folder} holds a run with other settings ({shown}): choose another --run, or change settings "
            "of this one with --resume"
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
