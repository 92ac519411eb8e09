"""A step that is not finite changes nothing, is told with its images, and ends the run or is left out."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_bit_identical, prepare
from safetensors.torch import load_file

from dmx.data.loader import TrainBatch, TrainLoader
from dmx.errors import DmxError
from dmx.train.checkpoint import FOLDER, latest
from dmx.train.not_finite import MOST_IN_A_ROW
from dmx.train.runlog import EPOCHS, NOT_FINITE, STEPS, read_lines
from dmx.train.worker import train_worker

PER_EPOCH = 12
EVERY_STEP = {"checkpoint_every_steps": 1, "keep_checkpoints": 100, "epochs": 3}
# In stage one, at a step of the game, and at one of the discriminator alone.
PLACES = [(1, 5), (2, 2), (2, 4)]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes one pixel of the batches of some steps NaN."""
    batch = TrainLoader.batch

    def begin(*places: tuple[int, int]) -> None:
        def poisoned(self: TrainLoader, epoch: int, step: int) -> TrainBatch:
            found = batch(self, epoch, step)
            if (epoch, step) in places:
                found["images"][3, 0, 0, 0] = torch.nan
            return found

        monkeypatch.setattr(TrainLoader, "batch", poisoned if places else batch)

    return begin


def _state(run: Path, epoch: int, step: int) -> dict[str, torch.Tensor]:
    """All tensors as they were when so many steps of an epoch were done; labels aside."""
    folder = run / FOLDER / f"step-{epoch * PER_EPOCH + step:08d}"
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        if file.stem != "labels"
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_left_out_steps_change_nothing(
    tiny_settings: dict[str, Any], tmp_path: Path, poison: Callable[..., None], zero_stage: int
) -> None:
    """Neither parameters nor running statistics, moments or rows, of any player; the steps behind it do."""
    run = prepare(
        tmp_path / "run",
        tiny_settings | {"on_nan": "skip"},
        schedule=EVERY_STEP,
        optim={"zero_stage": zero_stage},
    )
    poison(*PLACES)
    train_worker(run)
    for epoch, step in PLACES:
        before, after, later = (_state(run, epoch, step + more) for more in range(3))
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert [name for name in before if not torch.equal(before[name], later[name])] != []
        assert all(tensor.isfinite().all() for tensor in later.values())
    lines = {(line["epoch"], line["step"]): line for line in read_lines(run / STEPS)}
    assert [place for place, line in lines.items() if "left_out" in line] == PLACES
    assert not {"loss", "domain"} & lines[PLACES[0]].keys()
    assert [line.get("left_out") for line in read_lines(run / EPOCHS)] == [None, 1, 2]
    assert [(line["epoch"], line["step"]) for line in read_lines(run / NOT_FINITE)] == PLACES


def test_a_run_stops_at_the_step_and_goes_on_from_before_it(
    tiny_settings: dict[str, Any], tmp_path: Path, poison: Callable[..., None]
) -> None:
    """The error names the step's images, the checkpoint is whole, and the run ends as if nothing had been."""
    schedule = {"checkpoint_every_steps": 2, "epochs": 3}
    run, whole = (prepare(tmp_path / name, tiny_settings, schedule=schedule) for name in ("run", "whole"))
    poison((2, 3))
    with pytest.raises(DmxError, match=r"epoch 2, step 3: loss, .* not finite .*on_nan=skip") as caught:
        train_worker(run)
    [line] = read_lines(run / NOT_FINITE)
    assert line["losses"]["loss"] == "nan"
    assert len(line["images"]) == 32
    assert {name.split(": ")[0] for name in line["images"]} == {"source", "target"}
    assert line["images"][0] in str(caught.value)
    assert str(run / NOT_FINITE) in str(caught.value)
    found = latest(run)
    assert found is not None
    assert found.name == f"step-{2 * PER_EPOCH + 2:08d}"
    poison()
    train_worker(run)
    train_worker(whole)
    assert_bit_identical(run, whole)
    assert read_lines(run / NOT_FINITE) == []


def test_leaving_out_has_an_end(
    tiny_settings: dict[str, Any], tmp_path: Path, poison: Callable[..., None]
) -> None:
    """A model that has run away is not finite at any batch."""
    run = prepare(tmp_path / "run", tiny_settings | {"on_nan": "skip"})
    poison(*((0, step) for step in range(1, PER_EPOCH)))
    with pytest.raises(DmxError, match=rf"epoch 0, step 11: .* the {MOST_IN_A_ROW} steps before it"):
        train_worker(run)


def test_a_rate_that_is_far_too_high_stops_the_run(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is poisoned here but the setting; two processes stop at the same step with one message."""
    run = prepare(tmp_path / "run", tiny_settings, optim={"lr": 1e30}, schedule={"warmup_epochs": 0})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "dmx.train.worker", str(run)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != 0
    found = re.findall(r"^error: epoch 0, step (\d+): ", done.stderr, re.MULTILINE)
    assert found, done.stderr[-3000:]
    assert len(set(found)) == 1
