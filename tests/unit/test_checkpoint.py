"""Checkpoint folders: whole, atomic, kept in bounds, with clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmx.config import Config
from dmx.errors import DmxError
from dmx.train import checkpoint
from dmx.train.checkpoint import (
    BEST,
    FOLDER,
    LATEST,
    MODEL,
    Progress,
    latest,
    load_model,
    point,
    read_checkpoint,
    write_checkpoint,
)

TENSORS = {MODEL: {"weight": torch.arange(3.0)}, "labels": {"pseudo": torch.tensor([-1, 0])}, "empty": {}}


def _write(run: Path, step: int, best: bool = False) -> Path:
    progress = Progress(seed=3, epoch=1, global_step=step)
    return write_checkpoint(run, progress, Config(), TENSORS, keep=2, best=best)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """Tensors, progress and configuration."""
    progress = Progress(3, 2, 7, 47, 0.125, {"generator": 40}, [{"epoch": 0, "lr": 0.1}], {"embed_s": 1.5})
    path = write_checkpoint(tmp_path, progress, Config(seed=3), TENSORS, keep=1, facts={"processes": 2})
    found = read_checkpoint(path)
    assert found.progress == progress
    assert found.config == Config(seed=3)
    assert torch.equal(found.tensors[MODEL]["weight"], torch.arange(3.0))
    assert sorted(found.tensors) == ["labels", MODEL]
    assert latest(tmp_path) == path


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    """The last `keep` and whatever a pointer names."""
    best = _write(tmp_path, 1)
    point(tmp_path, BEST, best.name)
    for step in (2, 3, 4):
        _write(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / FOLDER).glob("step-*"))
    assert names == ["step-00000001", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("crashing", ["save_file", "_flush", "point"])
def test_a_crash_while_writing_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashing: str
) -> None:
    """At whatever moment it comes; and the next attempt succeeds."""
    first = _write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, crashing, _crash)
        with pytest.raises(KeyboardInterrupt):
            _write(tmp_path, 2)
    assert latest(tmp_path) == first
    read_checkpoint(first)
    second = _write(tmp_path, 3)
    assert latest(tmp_path) == second
    assert not list((tmp_path / FOLDER).glob(".*"))


def test_a_crash_between_its_pointers_loses_no_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a checkpoint is the latest, a run never comes back to say that it is the best."""
    _write(tmp_path, 1)
    crashes = [LATEST]

    def point_or_crash(run: Path, pointer: str, name: str) -> None:
        if pointer in crashes:
            raise KeyboardInterrupt
        point(run, pointer, name)

    monkeypatch.setattr(checkpoint, "point", point_or_crash)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path, 2, best=True)
    best = latest(tmp_path, BEST)
    assert best is not None
    read_checkpoint(best)
    crashes.clear()
    again = _write(tmp_path, 2, best=True)
    assert latest(tmp_path, BEST) == latest(tmp_path) == again


def test_the_best_epoch_is_the_first_with_the_highest_score() -> None:
    """On the first test set; epochs that were not tested do not count."""
    scores = (0.25, None, 0.5, 0.5, 0.375)
    epochs = [
        {"epoch": epoch, **({} if score is None else {"tests": {"a": {"map": score}, "b": {"map": epoch}}})}
        for epoch, score in enumerate(scores)
    ]
    best = Progress(0, epochs=epochs).best_epoch()
    assert best is not None
    assert best["epoch"] == 2
    assert Progress(0, epochs=[{"epoch": 0}, {"epoch": 1, "tests": {}}]).best_epoch() is None


def _crash(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_same_step_again_never_removes_the_latest_first(tmp_path: Path) -> None:
    """A second checkpoint of a step stands beside the first until `latest` has moved."""
    first, second = _write(tmp_path, 5), _write(tmp_path, 5)
    assert first != second
    assert latest(tmp_path) == second


def test_errors_name_the_file(tmp_path: Path) -> None:
    """Missing, cut short, of another format."""
    with pytest.raises(DmxError, match="wanted a run folder with checkpoints/latest"):
        load_model(tmp_path)
    path = _write(tmp_path, 1)
    weights = path / f"{MODEL}.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(DmxError, match=r"model\.safetensors: wanted a safetensors file"):
        read_checkpoint(path)
    (path / "state.json").write_text('{"format": 0}')
    with pytest.raises(DmxError, match="wanted checkpoint format 1, found 0"):
        read_checkpoint(path)
