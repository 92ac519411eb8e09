"""Checkpoints: complete, atomic, and the same whatever the number of processes or the ZeRO stage.

A checkpoint is a folder of safetensors and JSON, without pickles:

    model.safetensors          whole float32 parameters and buffers of the embedding model
    discriminator.safetensors  the same of the discriminator
    optimizer.safetensors      Adam's moments of both
    classifier.safetensors     all rows of the identity classifier and their moments
    labels.safetensors         pseudo-labels of the epoch it stands in; only in the middle of an epoch
    state.json                 where training stands: epoch, step, Adam's steps, threshold, epochs so far
    config.yaml                the resolved configuration
    SHA256SUMS                 checksums of all these

It is written beside its place, flushed to the disk, renamed, and only then does the file `latest` name it:
a crash at any moment leaves the previous checkpoint in force. Where that file is lost or damaged itself, the
newest checkpoint is in force.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmx.checksums import SUMS, damage, write_sums
from dmx.config import Config, from_tree, read_yaml, to_tree
from dmx.errors import DmxError

if TYPE_CHECKING:
    from dmx.model import EmbeddingModel

FORMAT = 1
FOLDER = "checkpoints"
LATEST = "latest"
BEST = "best"
# Ends the name of one behind an epoch's last step whose tests and record are still to come.
OPEN = "-open"
MODEL = "model"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"


@dataclass
class Progress:
    """Where training stands. Sampling and augmentation follow from (seed, epoch, step) alone.

    Attributes:
        seed, epoch, step: the sampler's state: the next step to do, both from 0.
        global_step: steps done in the whole run.
        independence_threshold: of the first clustering; None before it.
        adam_steps: updates each optimiser has made, by name.
        epochs: one record of each epoch that is done.
        record: what is known so far of the epoch it stands in.
    """

    seed: int
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    independence_threshold: float | None = None
    adam_steps: dict[str, int] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def best_epoch(self) -> dict[str, Any] | None:
        """The record of the epoch with the highest mAP on the first test set, the first among equals.

        This is how the published code chooses its result. None when no epoch was tested.
        """
        tested = [record for record in self.epochs if record.get("tests")]
        return max(tested, key=lambda record: next(iter(record["tests"].values()))["map"], default=None)


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a checkpoint folder."""

    path: Path
    progress: Progress
    config: Config
    tensors: dict[str, dict[str, Tensor]]


def write_checkpoint(
    run: Path,
    progress: Progress,
    config: Config,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    keep: int,
    best: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint into a run folder and make it the latest. One process calls this.

    Args:
        run: the run folder.
        progress: where training stands.
        config: the resolved configuration.
        tensors: contents by file name, without suffix; an empty one is left out.
        keep: how many of the last checkpoints stay (the best one stays too).
        best: also make it the best.
        facts: further entries of state.json, for people: versions, processes.

    Returns:
        The checkpoint's folder.

    Raises:
        DmxError: the disk is full, or the folder cannot be written.
    """
    folder = run / FOLDER
    is_open = progress.step == config.schedule.steps_per_epoch
    name = _unused_name(run, f"step-{progress.global_step:08d}{OPEN * is_open}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.tmp"):  # by a crash
            shutil.rmtree(left)
        state = {"format": FORMAT, **asdict(progress), **(facts or {})}
        _write_beside(folder / name, tensors, state, config)
        if best:
            # Before `latest`: after a crash in between, the run comes to this checkpoint, and to this, again.
            point(run, BEST, name)
        point(run, LATEST, name)
    except (OSError, SafetensorError) as error:
        raise _not_written(run, name, error) from error
    _forget_old(run, keep)
    return folder / name


def _write_beside(
    final: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], config: Config
) -> None:
    """All files under a temporary name, on the disk, and then at their place."""
    temporary = final.with_name(f".{final.name}.tmp")
    temporary.mkdir()
    for part, content in tensors.items():
        if content:
            save_file(
                {key: value.contiguous() for key, value in content.items()}, temporary / f"{part}.safetensors"
            )
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    (temporary / CONFIG_FILE).write_text(yaml.safe_dump(to_tree(config), sort_keys=False), encoding="utf-8")
    write_sums(temporary)
    for path in [*temporary.iterdir(), temporary]:
        _flush(path)
    temporary.rename(final)
    _flush(final.parent)


def _not_written(run: Path, name: str, error: Exception) -> DmxError:
    """What cannot be written makes room; what was written before it stays."""
    shutil.rmtree(run / FOLDER / f".{name}.tmp", ignore_errors=True)
    before = latest(run)
    stays = (
        "no checkpoint has been written before" if before is None else f"the one before, {before}, is whole"
    )
    return DmxError(
        f"{run / FOLDER}: wanted to write the checkpoint {name}, found: {error}; {stays}. Make room or the "
        "folder writable, and give the same command again: it goes on from there"
    )


def _unused_name(run: Path, wanted: str) -> str:
    """The checkpoint's name; a folder that nothing points to (left by a crash) makes way."""
    name, again = wanted, 0
    while (run / FOLDER / name) in _in_force(run):
        again += 1
        name = f"{wanted}-{again}"
    shutil.rmtree(run / FOLDER / name, ignore_errors=True)
    return name


def point(run: Path, pointer: str, name: str) -> None:
    """Make the file `pointer` name a checkpoint."""
    folder = run / FOLDER
    temporary = folder / f".{pointer}.tmp"
    temporary.write_text(name + "\n", encoding="utf-8")
    _flush(temporary)
    temporary.rename(folder / pointer)
    _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _forget_old(run: Path, keep: int) -> None:
    in_force, found = _in_force(run), _checkpoints(run)
    names = {path.name for path in found}
    closed = [path for path in found if path.name.endswith(OPEN) and path.name.removesuffix(OPEN) in names]
    others = [path for path in found if path not in closed]
    for path in closed + others[: max(0, len(others) - keep)]:
        if path not in in_force:
            shutil.rmtree(path)


def _in_force(run: Path) -> set[Path | None]:
    return {latest(run, pointer) for pointer in (LATEST, BEST)}


def _checkpoints(run: Path) -> list[Path]:
    """All of a run, the newest last."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if path.is_dir())


def latest(run: Path, pointer: str = LATEST) -> Path | None:
    """The checkpoint a run folder's pointer names; None when there is none yet.

    Where `latest` is lost or damaged, the newest one.
    """
    named = pointed(run, pointer)
    if named is not None or pointer != LATEST:
        return named
    return next(reversed(_checkpoints(run)), None)


def pointed(run: Path, pointer: str = LATEST) -> Path | None:
    """The checkpoint that a pointer names; None where there is no such file, or it names none."""
    try:
        name = (run / FOLDER / pointer).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    path = run / FOLDER / name
    return path if path in _checkpoints(run) else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder, whose files `dmx.train.recovery` has found to be whole.

    Raises:
        DmxError: naming the file that is missing or broken.
    """
    progress = _read_progress(path / STATE_FILE)
    tensors = {file.stem: _read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    if MODEL not in tensors:
        raise DmxError(f"{path}: wanted {MODEL}.safetensors, found {sorted(os.listdir(path))}")
    return Checkpoint(path, progress, _read_config(path), tensors)


def read_state(path: Path) -> tuple[Progress, Config]:
    """Where a checkpoint folder stands and how it was trained, without its tensors.

    Raises:
        DmxError: naming the file that is missing or broken.
    """
    return _read_progress(path / STATE_FILE), _read_config(path)


def _read_progress(file: Path) -> Progress:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DmxError(f"{file}: wanted a checkpoint's state, found: {error}") from error
    if state.get("format") != FORMAT:
        raise DmxError(f"{file}: wanted checkpoint format {FORMAT}, found {state.get('format')!r}")
    return Progress(**{name: state[name] for name in Progress.__dataclass_fields__})


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DmxError(f"{file}: wanted a safetensors file, found: {error}") from error


def _read_config(folder: Path) -> Config:
    file = folder / CONFIG_FILE
    return from_tree((str(file), read_yaml(file)))


def checkpoint_folder(path: str | Path, pointer: str = LATEST) -> Path:
    """The folder that holds a model's weights.

    Args:
        path: a run folder, or a checkpoint folder, or what `dmx export` wrote, or the name of such an export
            on the Hugging Face hub.
        pointer: which checkpoint of a run folder: `latest`, or `best` where it is recorded.

    Raises:
        DmxError: there is no checkpoint at `path`.
    """
    from dmx.deployment.hub import local_folder

    folder = local_folder(path)
    if (folder / f"{MODEL}.safetensors").exists():
        return folder
    found = latest(folder, pointer)
    if found is None and pointer == BEST and latest(folder) is not None:
        raise DmxError(
            f"{folder}: wanted the best checkpoint of this run, found none recorded: only `compat: "
            "official` records one, as the published code does; leave --best out to take the last"
        )
    if found is None:
        raise DmxError(
            f"{folder}: wanted a run folder with {FOLDER}/{pointer}, or a checkpoint folder with "
            f"{MODEL}.safetensors; train one with `dmx train --run {folder}`"
        )
    return found


def load_model(path: str | Path, pointer: str = LATEST) -> tuple[EmbeddingModel, Config]:
    """The embedding model of a run or of one of its checkpoints, in evaluation mode on the CPU.

    Args:
        path, pointer: as `checkpoint_folder` takes them.

    Raises:
        DmxError: there is no checkpoint at `path`, or it is broken.
    """
    from dmx.model import build_model

    folder = checkpoint_folder(path, pointer)
    weights = f"{MODEL}.safetensors"
    if (folder / SUMS).exists():  # an exported model, or anyone's own folder, has none
        fault = damage(folder, (weights, CONFIG_FILE))
        if fault is not None:
            raise DmxError(
                f"{fault}: this checkpoint is damaged; take another in {folder.parent}, or go on with the "
                "run (dmx train --resume), which takes the last whole one"
            )
    config = _read_config(folder)
    # The weights come from the checkpoint: nothing to download, nothing else to read.
    model = build_model(replace(config.model, pretrained=False, weights=None))
    model.load_state_dict(_read_tensors(folder / weights))
    return model.eval(), config
