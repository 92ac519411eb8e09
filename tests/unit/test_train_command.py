"""`dmx train` before anything trains: paths, what may change when a run goes on, what is refused."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dmx.checksums import write_sums
from dmx.cli import main
from dmx.commands import train
from dmx.commands.options import _as_words, given_settings, settings_text
from dmx.config import (
    LAUNCHERS,
    Config,
    from_tree,
    leaves,
    overrides,
    read_yaml,
    recipe,
    recipe_names,
    to_tree,
    with_absolute_paths,
)
from dmx.errors import DmxError
from dmx.model import build_model
from dmx.train.checkpoint import FOLDER, FORMAT, LATEST, Progress
from dmx.train.runlog import CONFIG, describe_run
from dmx.train.worker import RESULT

EPOCHS, STEPS = 4, 10


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(arguments)


def _saved(run: Path) -> Config:
    return from_tree(("saved", read_yaml(run / CONFIG)))


def _files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs whose workers would have started; starting one finishes it. Data sets open, whatever they are."""
    from dmx import launching
    from dmx.train import data

    launches: list[Path] = []

    def finish(task: str, arguments: dict[str, Any], **how: Any) -> None:
        run = Path(arguments["run"])
        launches.append(run)
        assert not (run / RESULT).exists()
        (run / RESULT).write_text(json.dumps({"steps": 1, "tests": {}}))

    monkeypatch.setattr(launching, "launch", finish)

    def open_nothing(config: Config, processes: int = 1) -> data.TrainingData:
        data._require_settings(config, processes)
        nobody: Any = None
        return data.TrainingData(config, nobody, np.empty(0, np.int64), None, {})

    monkeypatch.setattr(data.TrainingData, "open", open_nothing)
    monkeypatch.chdir(tmp_path)
    return launches


def _run_folder(folder: Path, *, epoch: int = 2, step: int = 5, is_finished: bool = False) -> Path:
    """A run with a checkpoint, as far as its settings and its place go."""
    settings = ["data.source=/data/a", f"schedule.epochs={EPOCHS}", f"schedule.steps_per_epoch={STEPS}"]
    config = from_tree(overrides(settings))
    describe_run(folder, config)
    checkpoint = folder / FOLDER / "step-00000025"
    checkpoint.mkdir(parents=True)
    state = {"format": FORMAT, **asdict(Progress(seed=0, epoch=epoch, step=step))}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    write_sums(checkpoint)
    (folder / FOLDER / LATEST).write_text(checkpoint.name)
    if is_finished:
        (folder / RESULT).write_text(json.dumps({"steps": EPOCHS * STEPS, "tests": {}}))
    return folder


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    return _run_folder(tmp_path / "begun")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return _run_folder(tmp_path / "finished", epoch=EPOCHS, step=0, is_finished=True)


def _resume(run: Path, *settings: str, more: tuple[str, ...] = ()) -> int:
    given = [word for setting in settings for word in ("--set", setting)]
    return train.run(_parse("--run", str(run), "--resume", *given, *more))


def test_saved_paths_are_absolute(tmp_path: Path, started: list[Path]) -> None:
    """Wherever they were given: workers run in folders of their own."""
    (tmp_path / "recipe.yaml").write_text("model: {weights: w.pth}\ndata: {target: sets/b}")
    torch.save(build_model(Config().model).state_dict(), tmp_path / "w.pth")
    given = ["--set", "data.source=./sets/a", "--set", "data.tests=[sets/t, 's3://bucket/t', /sets/u]"]
    command = ["--recipe", "recipe.yaml", "--run", "run", *given]
    assert train.run(_parse(*command)) == 0
    saved = _saved(tmp_path / "run")
    assert (saved.data.source, saved.data.target) == (f"{tmp_path}/sets/a", f"{tmp_path}/sets/b")
    assert saved.data.tests == (f"{tmp_path}/sets/t", "s3://bucket/t", "/sets/u")
    assert saved.model.weights == f"{tmp_path}/w.pth"
    same = ["--recipe", "recipe.yaml", "--run", "run", "--source", "sets/a", *given[2:]]
    assert train.run(_parse(*same)) == 0, "the same paths, written otherwise, are the same run"


def test_missing_weights_are_known_at_once(tmp_path: Path, started: list[Path]) -> None:
    command = ["--run", "run", "--source", "a", "--set", "model.weights=none.pth"]
    with pytest.raises(DmxError, match=f"weights {tmp_path}/none.pth: wanted .* found no such file"):
        train.run(_parse(*command))
    assert not (tmp_path / "run").exists()
    assert not started


@pytest.mark.parametrize(
    "setting",
    [
        "seed=1",
        "compat=official",
        "model.backbone=resnet18",
        "model.discriminator_widths=[8]",
        "data.height=128",
        "data.source=/data/b",
        "data.target=/data/c",
        "batch.identities=8",
        "augment.flip=0",
    ],
)
def test_what_a_checkpoint_depends_on_cannot_change(begun: Path, started: list[Path], setting: str) -> None:
    """Refused by name, and the run folder stays as it is."""
    before = _files(begun)
    more = ("--set", "batch.source_share=null") if setting.startswith("compat") else ()
    with pytest.raises(DmxError, match=rf"{setting.partition('=')[0]} .* cannot change any more"):
        _resume(begun, setting, more=more)
    assert _files(begun) == before
    assert not started


def test_a_schedule_cannot_end_before_the_checkpoint(begun: Path, started: list[Path]) -> None:
    before = _files(begun)
    with pytest.raises(DmxError, match=r"schedule.epochs: wanted more than the 2 .* found 2"):
        _resume(begun, "schedule.epochs=2")
    with pytest.raises(DmxError, match=r"schedule.steps_per_epoch: wanted at least the 5 .* found 4"):
        _resume(begun, "schedule.steps_per_epoch=4")
    assert _files(begun) == before


def test_a_damaged_configuration_is_found_by_the_checkpoint(begun: Path, started: list[Path]) -> None:
    """What counts is what the checkpoint was trained with."""
    describe_run(begun, from_tree(("saved", read_yaml(begun / CONFIG)), overrides(["seed=9"])))
    with pytest.raises(DmxError, match="seed 0 -> 9"):
        _resume(begun)


def test_the_rest_can_change(begun: Path, started: list[Path]) -> None:
    changes = {
        "schedule.epochs": 3,
        "optim.lr": 1e-3,
        "optim.zero_stage": 2,
        "loss.balance_weight": 0.5,
        "cluster.eps": 0.5,
        "data.workers": 0,
        "data.tests": ["/data/t"],
        "batch.accumulation": 2,
        "timeout_s": 60,
    }
    assert _resume(begun, *(f"{name}={value}" for name, value in changes.items())) == 0
    assert started == [begun]
    saved = _saved(begun)
    assert (saved.schedule.epochs, saved.cluster.eps, saved.timeout_s) == (3, 0.5, 60)
    assert saved.schedule.steps_per_epoch == STEPS, "what was not given stays"


def test_a_run_without_a_checkpoint_can_change_anything(tmp_path: Path, started: list[Path]) -> None:
    describe_run(tmp_path / "run", from_tree(overrides(["data.source=/data/a"])))
    assert _resume(tmp_path / "run", "seed=4", "model.backbone=resnet18") == 0
    assert _saved(tmp_path / "run").seed == 4


def test_a_finished_run_goes_further(
    finished: Path, started: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _resume(finished) == 0
    assert "--resume --schedule.epochs N" in capsys.readouterr().out
    assert not started
    assert _resume(finished, "schedule.epochs=6", "optim.lr=1e-4") == 0
    assert started == [finished]
    assert (_saved(finished).schedule.epochs, _saved(finished).optim.lr) == (6, 1e-4)


@pytest.mark.parametrize("setting", ["schedule.epochs=3", "optim.lr=1", "data.tests=[/data/t]", "seed=3"])
def test_settings_that_would_do_nothing_are_refused(
    finished: Path, started: list[Path], setting: str
) -> None:
    before = _files(finished)
    with pytest.raises(DmxError, match=rf"finished after 4 epochs.*{setting.partition('=')[0]}"):
        _resume(finished, setting)
    assert _files(finished) == before
    assert not started


def test_a_finished_run_keeps_its_result_until_all_is_checked(finished: Path, started: list[Path]) -> None:
    before = _files(finished)
    with pytest.raises(DmxError, match="seed 0 -> 1"):
        _resume(finished, "schedule.epochs=6", "seed=1")
    with pytest.raises(DmxError, match="inline is one process"):
        _resume(finished, "schedule.epochs=6", more=("--launcher", "inline", "--workers", "2"))
    shutil.rmtree(finished / FOLDER)
    with pytest.raises(DmxError, match="no checkpoint"):
        _resume(finished, "schedule.epochs=6")
    assert _files(finished) == {name: file for name, file in before.items() if not name.startswith(FOLDER)}


def test_a_batch_that_cannot_be_dealt_out_stops_at_once(tmp_path: Path, started: list[Path]) -> None:
    command = ["--run", "run", "--source", "a", "--workers", "2", "--set", "batch.accumulation=3"]
    with pytest.raises(DmxError, match=r"batch.identities"):
        train.run(_parse(*command))
    assert not (tmp_path / "run").exists()


def test_help_names_recipes_and_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("--help", "--settings"):
        with pytest.raises(SystemExit) as exit:
            _parse(argument)
        assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in "".join(printed.split()) for name in recipe_names())  # Lines break at hyphens.
    rows = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    for name, (_, item) in leaves().items():
        assert f"--{name}" in rows
        assert " ".join(item.metadata["help"].split()) in " ".join(printed.split())
    text = " ".join(printed.split())
    assert "--schedule.epochs 60 epochs in all (a whole number, at least 1)" in text
    assert "--schedule.milestones 40 70 epochs" in text
    assert "--optim.precision fp32 arithmetic" in text
    assert "(fp32 or bf16 or auto)" in text


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_settings_fit_the_terminal(columns: int) -> None:
    assert max(map(len, settings_text(columns).splitlines())) <= columns


def test_every_setting_is_an_option() -> None:
    """Words stand for what a recipe would hold: text as it is, lists a word each, mappings in YAML."""
    given = shlex.split(
        "--data.source 2024 --data.target null --data.tests a b --schedule.milestones 3 4 --optim.lr 1e-4 "
        "--batch.source_share null --model.pretrained --batch.norm_by_domain false --log.trackers [] "
        "--optim.precision bf16"
    )
    name, tree = given_settings(_parse(*given, "--model.backbone_args", "{channels: [8, 16]}"))
    config = from_tree((name, tree))
    assert (config.data.source, config.data.target, config.data.tests) == ("2024", None, ("a", "b"))
    assert (config.schedule.milestones, config.optim.lr, config.batch.source_share) == ((3, 4), 1e-4, None)
    assert (config.model.pretrained, config.batch.norm_by_domain, config.log.trackers) == (True, False, ())
    assert config.optim.precision == "bf16"
    assert config.model.backbone_args == {"channels": [8, 16]}
    for name, (_, item) in leaves().items():  # each takes its own default as --settings shows it
        words = _as_words(item).split()
        assert from_tree(given_settings(_parse(f"--{name}", *words))) == Config(), name


@pytest.mark.parametrize(
    ("given", "epochs"),
    [
        ("", 12),
        ("--schedule.epochs 3", 3),
        ("--schedule.epochs 3 --set schedule.epochs=4", 4),
        ("--set schedule.epochs=4 --schedule.epochs 3", 3),
        ("--set schedule.epochs=4 --seed 1 --set schedule.epochs=5", 5),
    ],
)
def test_the_later_option_wins_and_any_wins_over_the_recipe(
    given: str, epochs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *given.split(), "--recipe", "demo", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["schedule"]["epochs"] == epochs


def test_short_names_are_options_like_others(capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split("--source a --test b --set data.source=c --test d --target e")
    assert main(["train", *words, "--data.target", "/f", "--print-config", "differences"]) == 0
    here = Path.cwd()
    assert yaml.safe_load(capsys.readouterr().out) == {
        "data": {"source": f"{here}/c", "target": "/f", "tests": [f"{here}/b", f"{here}/d"]}
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--schedule.epoch 3", "there is no option --schedule.epoch; did you mean --schedule.epochs?"),
        ("--schedule.epoch=3", "there is no option --schedule.epoch; did you mean --schedule.epochs?"),
        ("--sourc a", "there is no option --sourc; did you mean --source?"),  # and it is no abbreviation
        ("--optim.learning_rate 1", "there is no option --optim.learning_rate"),
        ("--set schedule.epoch=3", "there is no setting schedule.epoch; did you mean schedule.epochs?"),
        ("--optim.lr fast", "optim.lr wants a number, found 'fast'"),
        ("--schedule.epochs 0", "schedule.epochs must be at least 1, found 0"),
        ("--schedule.epochs [", "--schedule.epochs: '[' is no YAML value"),
        ("--seed 1 --set seed.x=1", "gives seed the value 1"),
        ("data/a", "wanted no further argument, found data/a"),
    ],
)
def test_what_is_no_option_is_an_error_with_the_nearest(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--run", "x", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dmx train: error: ")
    assert said in error


@pytest.mark.parametrize("which", ["all", "differences"])
@pytest.mark.parametrize("name", recipe_names())
def test_the_printed_configuration_is_a_recipe(
    name: str, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it was made from, and without data sets or a run folder."""
    given = ["--recipe", name, "--seed", "7"]
    assert main(["train", *given, "--print-config", which]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert main(["train", "--recipe", str(tmp_path / "again.yaml"), "--print-config", which]) == 0
    assert capsys.readouterr().out == printed
    resolved = with_absolute_paths(from_tree(recipe(name), overrides(["seed=7"])))
    assert from_tree(("printed", yaml.safe_load(printed))) == resolved


def test_the_printed_configuration_of_a_run_is_its_own(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--run", str(begun), "--resume", "--optim.lr", "1", "--print-config", "differences"]
    assert main(words) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {
        "data": {"source": "/data/a"},
        "schedule": {"epochs": EPOCHS, "steps_per_epoch": STEPS},
        "optim": {"lr": 1.0},
    }


def test_launchers_are_named_once() -> None:
    from dmx import launching

    assert LAUNCHERS == ("ray", "torchrun", "srun", "inline")
    assert not hasattr(launching, "LAUNCHERS")


def test_a_wrong_setting_needs_no_torch(tmp_path: Path) -> None:
    """A typing error is answered at once, before anything heavy is imported."""
    code = (
        "import sys; from dmx.cli import main; "
        "status = main(['train', '--run', 'x', '--set', 'optim.lrr=1']); "
        "sys.exit(10 * status + ('torch' in sys.modules))"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 20, done.stderr
