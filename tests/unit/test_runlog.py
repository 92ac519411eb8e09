"""The logs of a run: complete, and never with a step twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmx.config import Config, differences, from_tree, read_yaml
from dmx.errors import DmxError
from dmx.train.runlog import CONFIG, EPOCHS, STEPS, RunLog, describe_run, read_lines
from dmx.train.trackers import TensorBoard


def _write(run: Path, steps: range, epochs: range) -> None:
    log = RunLog(run, global_step=steps.start, epoch=epochs.start)
    for step in steps:
        log.step({"global_step": step, "loss": step / 7})
    for epoch in epochs:
        log.epoch({"epoch": epoch}, global_step=steps.stop)
    log.close()


def test_resume_drops_later_lines_and_goes_on(tmp_path: Path) -> None:
    """What was logged after the checkpoint is logged anew, once."""
    _write(tmp_path, range(10), range(2))
    _write(tmp_path, range(6, 12), range(1, 3))
    assert [line["global_step"] for line in read_lines(tmp_path / STEPS)] == list(range(12))
    assert [line["epoch"] for line in read_lines(tmp_path / EPOCHS)] == [0, 1, 2]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    """Half a line must not join the next one."""
    _write(tmp_path, range(3), range(0))
    with open(tmp_path / STEPS, "a", encoding="utf-8") as file:
        file.write('{"global_step": 3, "lo')
    _write(tmp_path, range(3, 5), range(0))
    assert [line["global_step"] for line in read_lines(tmp_path / STEPS)] == list(range(5))


def test_every_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    """A killed run keeps what it logged."""
    log = RunLog(tmp_path, global_step=0, epoch=0)
    log.step({"global_step": 0})
    assert len(read_lines(tmp_path / STEPS)) == 1
    log.close()


def test_tensorboard_gets_steps_and_nested_results(tmp_path: Path) -> None:
    """Losses by step, and results by test set."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, global_step=0, epoch=0, trackers=[TensorBoard(tmp_path, 0)])
    log.step({"global_step": 4, "epoch": 0, "loss": 2.5})
    log.epoch({"epoch": 0, "tests": {"unseen": {"map": 0.25}}, "stage": "one"}, global_step=5)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "epoch/tests/unseen/map"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(4, 2.5)]


def test_tensorboard_keeps_the_last_epoch_when_a_run_goes_on(tmp_path: Path) -> None:
    """What TensorBoard drops on resume begins after the epoch's own numbers."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (0, 2):
        board = TensorBoard(tmp_path, first)
        log = RunLog(tmp_path, global_step=first, epoch=first // 2, trackers=[board])
        for step in (first, first + 1):
            log.step({"global_step": step, "loss": 1.0})
        log.epoch({"epoch": first // 2, "lr": 0.5}, global_step=first + 2)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("epoch/lr")] == [1, 3]
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]


def test_a_reader_never_finds_half_a_configuration(tmp_path: Path) -> None:
    """A configuration written again takes the place of the old file, which whoever opened it still reads."""
    describe_run(tmp_path, Config(seed=1))
    with open(tmp_path / CONFIG, encoding="utf-8") as file:
        describe_run(tmp_path, Config(seed=2))
        assert "seed: 1" in file.read()
    assert from_tree(("saved", read_yaml(tmp_path / CONFIG))) == Config(seed=2)


def test_the_configuration_is_saved(tmp_path: Path) -> None:
    """The saved configuration reads back as it was."""
    config = from_tree(("test", {"seed": 5, "data": {"tests": ["a", "b"]}}))
    describe_run(tmp_path / "run", config)
    saved = from_tree(("saved", read_yaml(tmp_path / "run" / CONFIG)))
    assert saved == config
    assert differences(Config(), saved) == {"seed": (0, 5), "data.tests": ([], ["a", "b"])}


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    """Whoever was given up and runs on all the same finds another's name, and stops."""
    first = RunLog(tmp_path, global_step=0, epoch=0)
    first.require_writer()
    second = RunLog(tmp_path, global_step=0, epoch=0)
    second.require_writer()
    with pytest.raises(DmxError, match=r"another process .* has taken this run over"):
        first.require_writer()
    first.close()
    second.close()
