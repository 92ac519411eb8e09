"""A run that is killed and goes on ends as one that never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_bit_identical, clusters_of, losses_of, prepare, tensors_of

from dmx import stopping
from dmx.config import from_tree, read_yaml
from dmx.train import loop
from dmx.train.checkpoint import FOLDER, latest, load_model
from dmx.train.resume import standing
from dmx.train.runlog import CONFIG, EPOCHS, STEPS, describe_run, read_lines
from dmx.train.trainer import Trainer
from dmx.train.worker import RESULT, train_worker

STEPS_PER_EPOCH, EPOCH_COUNT = 12, 4
KILL_AT = 2 * STEPS_PER_EPOCH + 5
# The losses of this run on the machine that recorded them. A different processor or torch rounds differently,
# which training amplifies: loosely bound, they catch a method that has changed.
GOLDEN = {0: 33.1094, 12: 33.2449, 25: 5.5907, 35: 5.0623}


@pytest.fixture(scope="module")
def whole(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never stops."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    run = prepare(tmp_path_factory.mktemp("whole") / "run", tiny_settings)
    train_worker(run)
    return run


@pytest.fixture(scope="module")
def killed(whole: Path, tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed in the middle of its first adversarial epoch."""
    run = prepare(tmp_path_factory.mktemp("killed") / "run", tiny_settings)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "dmx.train.worker", str(run)], env=environment)
    deadline = time.monotonic() + 240
    while _lines_so_far(run / STEPS) < KILL_AT:
        assert process.poll() is None, "the worker ended before it could be killed"
        assert time.monotonic() < deadline, "the worker did not come far enough to be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return run


def _lines_so_far(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _copy(run: Path, to: Path, classifier: dict[str, Any] | None = None, **optim: Any) -> Path:
    """The killed run elsewhere, going on with other settings."""
    shutil.copytree(run, to)
    tree = {"optim": optim, "classifier": classifier or {}}
    describe_run(to, from_tree(("saved", read_yaml(to / CONFIG)), ("test", tree)))
    return to


def test_golden_losses(whole: Path) -> None:
    """The method computes what it computed."""
    losses = losses_of(whole)
    assert {step: losses[step] for step in GOLDEN} == pytest.approx(GOLDEN, rel=0.02)


def test_a_run_goes_through_its_stages_and_reports(whole: Path) -> None:
    """One line a step and an epoch, test results, a model that loads, a mark that it is finished."""
    epochs = read_lines(whole / EPOCHS)
    assert [epoch["stage"] for epoch in epochs] == ["source", "one", "two", "two"]
    assert "clusters" not in epochs[0]
    assert epochs[2]["clusters"]["clusters"] >= 4
    assert 0 < epochs[2]["clusters"]["purity"] <= 1
    steps = read_lines(whole / STEPS)
    assert [line["global_step"] for line in steps] == list(range(STEPS_PER_EPOCH * EPOCH_COUNT))
    assert [line["step"] for line in steps if "domain" in line] == [0, 4, 8] * 2
    assert all(("balance" in line) != ("domain" in line) for line in steps if line["epoch"] >= 2)
    result = json.loads((whole / RESULT).read_text())
    assert result["tests"]["unseen"]["valid_queries"] == 24
    model, config = load_model(whole)
    assert config.schedule.epochs == EPOCH_COUNT
    assert model.embed(torch.zeros(2, 3, 32, 16)).shape == (2, model.width)


def test_killed_run_goes_on_bit_identically(whole: Path, killed: Path, tmp_path: Path) -> None:
    """Parameters, buffers, moments, classifier rows and every logged loss, after kill -9 within an epoch."""
    run = _copy(killed, tmp_path / "run")
    checkpoint = latest(run)
    assert checkpoint is not None
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["epoch"], 0 < state["step"] < STEPS_PER_EPOCH) == (2, True)
    assert (checkpoint / "labels.safetensors").exists()
    train_worker(run)
    assert_bit_identical(run, whole)
    assert [line["epoch"] for line in read_lines(run / EPOCHS)] == [0, 1, 2, 3]
    assert list(clusters_of(run)) == [f"epoch-0000{epoch}.safetensors" for epoch in (1, 2, 3)]


def test_a_run_that_is_told_to_stop_saves_behind_its_step_and_goes_on_bit_identically(
    whole: Path, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times: within an epoch, behind its last step, and behind the first of the next one."""
    run = _copy(killed, tmp_path / "run")
    step_seed = loop._step_seed
    for stop_at in ((2, 9), (2, STEPS_PER_EPOCH - 1), (3, 0)):

        def told(seed: int, epoch: int, step: int, rank: int, last: tuple[int, int] = stop_at) -> int:
            if (epoch, step) == last:
                stopping.wish(signal.SIGTERM)
            return step_seed(seed, epoch, step, rank)

        with monkeypatch.context() as patch:
            patch.setattr(stopping, "_state", stopping._State())
            patch.setattr(loop, "_step_seed", told)
            with pytest.raises(stopping.Stopped):
                train_worker(run)
        done = stop_at[0] * STEPS_PER_EPOCH + stop_at[1] + 1
        assert len(losses_of(run)) == done
        config = from_tree(("saved", read_yaml(run / CONFIG)))
        assert standing(run, config).startswith(f" at step {done} of {STEPS_PER_EPOCH * EPOCH_COUNT}, saved ")
    train_worker(run)
    assert_bit_identical(run, whole)


def test_a_run_that_is_told_to_stop_while_it_is_tested_has_saved_its_epoch(
    whole: Path, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may be long; no step is done again because of them. One checkpoint stays of the epoch."""
    run, test = _copy(killed, tmp_path / "run"), loop._test

    def told(trainer: Trainer, epoch: int) -> dict[str, dict[str, float]]:
        if epoch + 1 < EPOCH_COUNT:
            return test(trainer, epoch)
        stopping.wish(signal.SIGTERM)
        raise stopping.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(stopping, "_state", stopping._State())
        patch.setattr(loop, "_test", told)
        with pytest.raises(stopping.Stopped):
            train_worker(run)
    steps = STEPS_PER_EPOCH * EPOCH_COUNT
    config = from_tree(("saved", read_yaml(run / CONFIG)))
    assert standing(run, config).startswith(f" at step {steps} of {steps}, saved ")
    monkeypatch.setattr(loop, "_log_step", None)  # nothing is trained any more
    train_worker(run)
    assert_bit_identical(run, whole)
    assert [path.name for path in (run / FOLDER).glob(f"step-{steps:08d}*")] == [f"step-{steps:08d}"]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_killed_run_goes_on_at_another_zero_stage(
    whole: Path, killed: Path, tmp_path: Path, zero_stage: int
) -> None:
    """The first step computes the same from the same state; later ones differ by rounding alone."""
    run = _copy(killed, tmp_path / "run", zero_stage=zero_stage)
    train_worker(run)
    _assert_close(run, whole)


def test_killed_run_goes_on_with_two_workers(whole: Path, killed: Path, tmp_path: Path) -> None:
    """At another ZeRO stage too."""
    run = _copy(killed, tmp_path / "run", zero_stage=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, "-m", "dmx.train.worker", str(run)], check=False, timeout=300)
    assert done.returncode == 0
    _assert_close(run, whole)


def test_bfloat16_rows_go_on_bit_identically(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs with rows in bfloat16 and blocks of a few classes, one of which stops within an epoch."""
    classifier = {"precision": "bf16", "block_mb": 0.01}
    straight, stopped = (_copy(killed, tmp_path / name, classifier) for name in ("straight", "stopped"))
    train_worker(straight)
    log_step = loop._log_step

    def stop_at_a_step(trainer: Trainer, epoch: int, step: int, values: dict[str, float]) -> None:
        if (epoch, step) == (3, 7):
            raise KeyboardInterrupt
        log_step(trainer, epoch, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_log_step", stop_at_a_step)
        with pytest.raises(KeyboardInterrupt):
            train_worker(stopped)
    train_worker(stopped)
    assert_bit_identical(stopped, straight)
    moved = tensors_of(straight)["classifier/source"]
    assert not torch.equal(moved.bfloat16().float(), moved), "the rows hold more than bfloat16"


def _assert_close(run: Path, whole: Path) -> None:
    """Every loss until the next clustering within what Adam makes of float32's rounding: a thousandth.

    Clustering may turn a rounding into another label, after which nothing has to be near any more.
    """
    until = 3 * STEPS_PER_EPOCH
    assert losses_of(run)[:until] == pytest.approx(losses_of(whole)[:until], rel=1e-3)
    assert tensors_of(run).keys() == tensors_of(whole).keys()
