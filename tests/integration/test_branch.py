"""A branch of a run ends as a run of its settings that was trained from the start."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_bit_identical, prepare

from dmx.cli import main
from dmx.train.branch import ORIGIN
from dmx.train.checkpoint import FOLDER, read_state
from dmx.train.runlog import CONFIG, EPOCHS, read_lines
from dmx.train.worker import RESULT, train_worker

KEEP = 100  # every checkpoint


@pytest.fixture(scope="module")
def trunk(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source alone, stage one, twice stage two."""
    torch.set_num_threads(1)  # as every test of this folder, whose bits these are
    os.environ["OMP_NUM_THREADS"] = "1"
    run = tmp_path_factory.mktemp("trunk") / "run"
    train_worker(prepare(run, tiny_settings, schedule={"keep_checkpoints": KEEP}))
    return run


def branch(trunk: Path, run: Path, after: int, *settings: str) -> int:
    given = [word for setting in settings for word in ("--set", setting)]
    return main(
        [
            "train",
            "--launcher",
            "inline",
            "--run",
            str(run),
            "--branch",
            str(trunk),
            "--after",
            str(after),
            *given,
        ]
    )


@pytest.mark.parametrize(
    ("after", "settings", "sections"),
    [
        (2, ("loss.balance_weight=0",), {"loss": {"balance_weight": 0.0}}),
        (1, ("cluster.labels=identities",), {"cluster": {"labels": "identities"}}),
        (1, ("batch.norm_by_domain=true",), {"batch": {"norm_by_domain": True}}),
        (1, ("data.target=null",), {"data": {"target": None}}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_what_begins_to_matter_later_is_trained_from_there(
    trunk: Path,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    after: int,
    settings: tuple[str, ...],
    sections: dict[str, dict[str, Any]],
) -> None:
    """The ways of training that the claim compares, each to the bit; the trunk stays as it is."""
    before = {str(path): path.read_bytes() for path in trunk.rglob("*") if path.is_file()}
    assert branch(trunk, tmp_path / "branch", after, *settings) == 0
    whole = prepare(tmp_path / "whole", tiny_settings, **sections)
    train_worker(whole)
    assert_bit_identical(tmp_path / "branch", whole)
    assert [line["epoch"] for line in read_lines(tmp_path / "branch" / EPOCHS)] == [0, 1, 2, 3]
    found, wanted = (json.loads((run / RESULT).read_text()) for run in (tmp_path / "branch", whole))
    assert found == wanted
    origin = json.loads((tmp_path / "branch" / ORIGIN).read_text())
    assert (origin["run"], origin["epochs"]) == (str(trunk), after)
    assert list(origin["changed"]) == [settings[0].partition("=")[0]]
    assert {str(path): path.read_bytes() for path in trunk.rglob("*") if path.is_file()} == before


def test_a_branch_that_was_interrupted_goes_on(trunk: Path, tmp_path: Path) -> None:
    """Before it began, when only its files lie there, and by itself; finished, it does nothing."""
    run = tmp_path / "branch"
    assert branch(trunk, run, 3) == 0
    assert_bit_identical(run, trunk)
    written = (run / RESULT).stat().st_mtime_ns
    assert branch(trunk, run, 3) == 0
    assert (run / RESULT).stat().st_mtime_ns == written
    for name in (RESULT, CONFIG):  # as if it had ended before its configuration was written
        (run / name).unlink()
    shutil.rmtree(next((run / FOLDER).glob("step-*")))
    assert branch(trunk, run, 3) == 0
    assert_bit_identical(run, trunk)


def test_another_target_finds_its_own_threshold(
    trunk: Path, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmx import launching

    monkeypatch.setattr(
        launching,
        "launch",
        lambda *_, **__: (tmp_path / "b" / RESULT).write_text(json.dumps({"steps": 0, "tests": {}})),
    )
    shutil.copytree(tiny_settings["data"]["target"], tmp_path / "other")
    assert branch(trunk, tmp_path / "b", 2, f"data.target={tmp_path / 'other'}") == 0
    (begun,) = (tmp_path / "b" / FOLDER).glob("step-*")
    (left,) = (trunk / FOLDER).glob(begun.name)
    assert read_state(begun)[0].independence_threshold is None
    assert read_state(left)[0].independence_threshold is not None


def test_what_cannot_be_branched_is_said_before_anything_is_written(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "branch"

    def refused(*words: str) -> str:
        assert main(["train", "--launcher", "inline", "--run", str(run), *words]) == 2
        assert not run.exists()
        return capsys.readouterr().err

    here = ("--branch", str(trunk))
    assert "--branch wants --after" in refused(*here)
    assert "--branch wants --after" in refused("--after", "1")
    assert "--branch wants --after" in refused(*here, "--after", "1", "--resume")
    assert "wanted a run folder with config.yaml to branch from" in refused(
        "--branch", "none", "--after", "1"
    )
    assert "end of epoch 9, found those of epochs 1, 2, 3, 4;" in refused(*here, "--after", "9")
    assert "seed 0 -> 3), which cannot change any more" in refused(*here, "--after", "1", "--set", "seed=3")
    few = ("--set", "schedule.epochs=2", "--set", "schedule.stage_two_epoch=1")
    assert "wanted more than the 2 epochs" in refused(*here, "--after", "2", *few)


def test_checkpoints_of_no_branch_are_not_written_over(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose configuration was lost is a run."""
    run = tmp_path / "run"
    shutil.copytree(trunk / FOLDER, run / FOLDER)
    assert branch(trunk, run, 1) == 2
    assert "choose another --run" in capsys.readouterr().err
    assert len(list((run / FOLDER).glob("step-*"))) == len(list((trunk / FOLDER).glob("step-*")))
