"""Branching: a run that begins where another stood after one of its epochs, with some settings changed.

What both share is trained once, and what differs between them is what was changed and nothing else: batches
and augmentation follow from (seed, epoch, step), so an unchanged branch ends as its trunk, to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import yaml

from dmx.checksums import SUMS, damage, write_sums
from dmx.config import Config, differences, to_tree, with_absolute_paths
from dmx.errors import DmxError
from dmx.train.checkpoint import FOLDER, LATEST, point, read_state
from dmx.train.clusters import copy_clusters
from dmx.train.recovery import DESCRIPTION
from dmx.train.resume import CHANGEABLE, require_changeable, require_epochs_left
from dmx.train.runlog import EPOCHS, NOT_FINITE, STEPS
from dmx.writing import write_whole

ORIGIN = "origin.json"
# No epoch has begun where a branch leaves its trunk, so what makes batches may change, and so may the target.
BRANCHES = (*CHANGEABLE, "batch.", "augment.", "data.target")


def branch_point(trunk: Path, after: int) -> Path:
    """The checkpoint that `trunk` wrote at the end of its first `after` epochs.

    Raises:
        DmxError: it has none (any more); names the epochs that it has.
    """
    found = {}
    for folder in sorted((trunk / FOLDER).glob("step-*")):
        if damage(folder, DESCRIPTION):
            continue  # it may be another's place
        progress, _ = read_state(folder)
        if progress.step == 0 and progress.epoch > 0:
            found[progress.epoch] = folder
    if after not in found:
        raise DmxError(
            f"{trunk}: wanted a checkpoint at the end of epoch {after}, found those of epochs "
            f"{', '.join(map(str, sorted(found))) or 'none'}; a run keeps schedule.keep_checkpoints of them"
        )
    return found[after]


def check_branch(checkpoint: Path, config: Config) -> None:
    """Check that a run of `config`, with absolute paths, can begin at another's checkpoint.

    Raises:
        DmxError: naming the settings that cannot differ, or an end that does not lie behind the checkpoint,
            or a file of it that is damaged.
    """
    fault = damage(checkpoint)
    if fault is not None:
        raise DmxError(f"{fault}: this checkpoint is damaged; branch after another epoch")
    progress, trained_with = read_state(checkpoint)
    changed = differences(with_absolute_paths(trained_with), config)
    require_changeable(checkpoint, changed, BRANCHES, "leave them as they are, or train from the start")
    require_epochs_left(checkpoint, progress, config)


def begin_branch(run: Path, checkpoint: Path, config: Config) -> None:
    """Put another run's checkpoint, and its logs so far, into the new folder `run`, as training finds them.

    The folder's own `config.yaml` is left to the caller, who writes it last: without it the next call begins
    again. The trunk may go on meanwhile, or be removed afterwards.

    Args:
        run: the new run's folder; what an interrupted call left in it makes way.
        checkpoint: of the trunk, from `branch_point`.
        config: of the new run, with absolute paths; see `check_branch`.

    Raises:
        DmxError: the folder holds checkpoints of a run that is no branch.
    """
    if (run / FOLDER).exists() and not (run / ORIGIN).exists():
        raise DmxError(
            f"{run}: wanted a new folder for a branch, found checkpoints of a run without its configuration: "
            "choose another --run"
        )
    trunk = checkpoint.parent.parent
    progress, trained_with = read_state(checkpoint)
    changed = differences(with_absolute_paths(trained_with), config)
    run.mkdir(parents=True, exist_ok=True)
    origin = {"run": str(trunk.absolute()), "epochs": progress.epoch, "changed": changed}
    write_whole(run / ORIGIN, json.dumps(origin, indent=1) + "\n")
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    place = run / FOLDER / checkpoint.name
    shutil.copytree(checkpoint, place, copy_function=_link)
    (place / "config.yaml").unlink()
    (place / "config.yaml").write_text(yaml.safe_dump(to_tree(config), sort_keys=False), encoding="utf-8")
    if "data.target" in changed:
        # The threshold was that of the other target's first clusters.
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        (place / "state.json").unlink()
        write_whole(place / "state.json", json.dumps(state | {"independence_threshold": None}, indent=1))
    for log in (
        STEPS,
        EPOCHS,
        NOT_FINITE,
    ):  # the run drops the lines behind the checkpoint when it opens them
        if (trunk / log).exists():
            shutil.copyfile(trunk / log, run / log)
    (place / SUMS).unlink()
    write_sums(place)
    # Another target's rows are other images.
    copy_clusters(trunk, run, 0 if "data.target" in changed else progress.epoch)
    point(run, LATEST, place.name)


def _link(source: str, target: str) -> None:
    """The same file under another name, since a checkpoint's files never change; a copy on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
