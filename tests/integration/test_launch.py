"""Every launcher trains the same run, and Ray starts a killed worker again."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dmx import ray_workers
from dmx.commands import train
from dmx.config import from_tree
from dmx.distributed import world
from dmx.errors import DmxError
from dmx.train.checkpoint import latest
from dmx.train.engines import forget_process_group
from dmx.train.runlog import EPOCHS as EPOCHS_LOG
from dmx.train.runlog import STEPS, describe_run, read_lines
from dmx.train.schedule import Stage
from dmx.train.step import train_discriminator, train_model
from dmx.train.trainer import build_trainer
from dmx.train.worker import RESULT, train_worker

EPOCHS, STEPS_PER_EPOCH = 2, 12
KILL_AT = STEPS_PER_EPOCH + 4


@pytest.fixture
def recipe(tiny_settings: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe of two epochs, without data sets."""
    tree = {name: dict(section) for name, section in tiny_settings.items() if name != "data"}
    tree["data"] = {"height": tiny_settings["data"]["height"], "width": tiny_settings["data"]["width"]}
    tree["schedule"] |= {"epochs": EPOCHS, "stage_two_epoch": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _arguments(recipe: Path, run: Path, settings: dict[str, Any], *more: str) -> list[str]:
    data = settings["data"]
    places = ["--source", data["source"], "--target", data["target"], "--test", data["tests"][0]]
    return ["--recipe", str(recipe), *places, "--run", str(run), *more]


def _train(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.run(parser.parse_args(arguments))


def _losses(run: Path) -> list[float]:
    return [line.get("loss", line.get("domain")) for line in read_lines(run / STEPS)]


@pytest.fixture
def inline(recipe: Path, tmp_path: Path, tiny_settings: dict[str, Any]) -> Path:
    """The run in this process."""
    run = tmp_path / "inline"
    assert _train(*_arguments(recipe, run, tiny_settings, "--launcher", "inline")) == 0
    return run


def test_launchers_train_the_same(
    inline: Path, recipe: Path, tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    """Ray with a worker killed on the way, to the bit; torchrun with two workers, within rounding."""
    ray_run, torchrun_run = tmp_path / "ray", tmp_path / "torchrun"
    _train_with_ray_and_kill(_arguments(recipe, ray_run, tiny_settings))
    assert _losses(ray_run) == _losses(inline)
    expected, found = latest(inline), latest(ray_run)
    assert expected is not None
    assert found is not None
    for name in ("model", "discriminator", "optimizer", "classifier"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (expected, found))
        assert all((a[key] == b[key]).all() for key in a | b)
    more = ("--launcher", "torchrun", "--workers", "2")
    assert _train(*_arguments(recipe, torchrun_run, tiny_settings, *more)) == 0
    # A dozen Adam steps make a thousandth of float32's rounding. Clustering may turn it into other labels,
    # of which the losses after it bear a trace.
    found_losses, expected_losses = _losses(torchrun_run), _losses(inline)
    assert found_losses[:STEPS_PER_EPOCH] == pytest.approx(expected_losses[:STEPS_PER_EPOCH], rel=1e-3)
    assert found_losses == pytest.approx(expected_losses, rel=0.2)


def test_domains_apart_and_cameras_centred_by_two_processes(
    recipe: Path, tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    """Two forward passes a step, with sharded parameters; what cameras share; as one process does it."""
    switches = (
        "batch.norm_by_domain=true",
        "cluster.centre_cameras=true",
        "cluster.same_camera_share=0.25",
    )
    chosen = [word for switch in switches for word in ("--set", switch)]
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert _train(*_arguments(recipe, alone, tiny_settings, *chosen, "--launcher", "inline")) == 0
    sharded = ("--set", "optim.zero_stage=3", "--launcher", "torchrun", "--workers", "2")
    assert _train(*_arguments(recipe, both, tiny_settings, *chosen, *sharded)) == 0
    assert [line["stage"] for line in read_lines(both / EPOCHS_LOG)] == ["source", "two"]
    assert {"balance", "domain"} <= {name for line in read_lines(both / STEPS) for name in line}
    assert _losses(both)[:STEPS_PER_EPOCH] == pytest.approx(_losses(alone)[:STEPS_PER_EPOCH], rel=1e-3)
    assert _losses(both) == pytest.approx(_losses(alone), rel=0.2)


def _train_with_ray_and_kill(arguments: list[str]) -> None:
    """Ray in a process of its own, as a user starts it; its worker is killed once, within an epoch."""
    call = "import sys; from dmx.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", call, "train", *arguments])
    log = Path(arguments[arguments.index("--run") + 1]) / STEPS
    deadline = time.monotonic() + 200
    while not log.exists() or log.read_bytes().count(b"\n") < KILL_AT:
        assert process.poll() is None, "training ended before its worker could be killed"
        assert time.monotonic() < deadline, "training did not come far enough for its worker to be killed"
        time.sleep(0.005)
    workers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in p.name()
    ]
    assert len(workers) == 1
    os.kill(workers[0].pid, signal.SIGKILL)
    assert process.wait(timeout=300) == 0


def test_a_finished_run_says_so(
    inline: Path, recipe: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command shows the results again, trains nothing, and removes what one left that was killed."""
    (inline / ".launch-1/0").mkdir(parents=True)
    before = (inline / STEPS).stat().st_mtime_ns
    capsys.readouterr()
    assert _train(*_arguments(recipe, inline, tiny_settings, "--launcher", "inline")) == 0
    printed = capsys.readouterr().out
    assert "is finished" in printed
    assert f"{json.loads((inline / RESULT).read_text())['tests']['unseen']['map']:.1%}" in printed
    assert (inline / STEPS).stat().st_mtime_ns == before
    assert not (inline / ".launch-1").exists()


def test_a_finished_run_goes_further(inline: Path) -> None:
    """One epoch more, after those that are done."""
    before = _losses(inline)
    more = ("--resume", "--launcher", "inline", "--set", f"schedule.epochs={EPOCHS + 1}")
    assert _train("--run", str(inline), *more) == 0
    assert _losses(inline)[: len(before)] == before
    assert len(_losses(inline)) == len(before) + STEPS_PER_EPOCH
    result = json.loads((inline / RESULT).read_text())
    assert (result["epochs"], result["steps"]) == (EPOCHS + 1, (EPOCHS + 1) * STEPS_PER_EPOCH)


def test_other_settings_in_the_same_folder_are_refused(
    recipe: Path, tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    """Named one by one; `--resume` alone takes the saved ones."""
    run = tmp_path / "run"
    describe_run(run, from_tree(("test", {"data": {"source": tiny_settings["data"]["source"]}, "seed": 4})))
    with pytest.raises(DmxError, match=r"other settings \(seed 4 -> 0"):
        _train(*_arguments(recipe, run, tiny_settings, "--launcher", "inline"))
    with pytest.raises(DmxError, match="--source is missing"):
        _train("--run", str(tmp_path / "new"), "--launcher", "inline")
    with pytest.raises(DmxError, match="to resume, found none"):
        _train("--run", str(tmp_path / "new"), "--launcher", "inline", "--resume")
    with pytest.raises(DmxError, match="inline is one process"):
        _train(*_arguments(recipe, tmp_path / "two", tiny_settings, "--launcher", "inline", "--workers", "2"))


def test_ray_waits_as_long_as_the_settings_say_and_tells_what_a_worker_wrote_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user has to change comes through as it was said, also when Ray raises an error of its own."""
    storage, stop = tmp_path / "attempt", tmp_path / "stop"
    stop.touch()
    timeouts = []

    class FailingTrainer:
        def __init__(self, *_: Any, torch_config: Any, **__: Any) -> None:
            timeouts.append(torch_config.timeout_s)

        def fit(self) -> None:
            (storage / "failure").write_text("optim.lr is too high")
            raise RuntimeError("a worker ended")

    monkeypatch.setattr("ray.train.torch.TorchTrainer", FailingTrainer)
    crew = ray_workers.Crew(workers=1, cores_each=1, has_gpu=False)
    with pytest.raises(DmxError, match=r"^optim\.lr is too high$"):
        ray_workers._fit({"stop": str(stop)}, crew, storage, timeout_s=76.5)
    assert timeouts == [77]


def test_every_setting_of_optim_works_in_the_loop(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """bf16, ZeRO 2, accumulation and clipping together, through all stages."""
    schedule = tiny_settings["schedule"] | {"steps_per_epoch": 5, "discriminator_every": 2}
    optim = {"precision": "bf16", "zero_stage": 2, "clip_norm": 5.0}
    batch = tiny_settings["batch"] | {"accumulation": 2}
    tree = tiny_settings | {"schedule": schedule, "optim": optim, "batch": batch}
    describe_run(tmp_path / "run", from_tree(("test", tree)))
    train_worker(tmp_path / "run")
    steps = read_lines(tmp_path / "run" / STEPS)
    assert len(steps) == 20
    assert [line["step"] for line in steps if "domain" in line] == [0, 2, 4] * 2
    checkpoint = latest(tmp_path / "run")
    assert checkpoint is not None
    assert json.loads((checkpoint / "state.json").read_text())["precision"] == "bf16"


def test_a_diverged_run_says_what_to_do(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """A loss that is no number stops the run with the step and the settings to change."""
    tree = tiny_settings | {"optim": {"lr": 1e30}}
    describe_run(tmp_path / "run", from_tree(("test", tree)))
    with pytest.raises(DmxError, match=r"epoch 0, step \d+: loss.* not finite.*optim\.lr"):
        train_worker(tmp_path / "run")


def test_a_step_of_the_game_is_that_of_its_mode(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """To `official` the first pseudo-identity is synthetic, and its balance loss is higher by 1 - log 2."""
    balance, first, second = {}, {}, {}
    for compat in ("fixed", "official"):
        config = from_tree(("test", tiny_settings | {"compat": compat}))
        run = tmp_path / compat
        describe_run(run, config)
        with world() as place:
            with build_trainer(config, run, place, None) as begun:
                people = begun.data.num_source
                images = torch.randn(8, 3, 16, 8, generator=torch.Generator().manual_seed(0))
                batches = [(images, torch.arange(8) // 2)]
                step = (begun.players, config, people)
                balance[compat] = train_model(*step, Stage.TWO, 1.0, batches, place)["balance"]
                for guessed, label in ((second, people + 1), (first, people)):
                    batches = [(images, torch.full((8,), label))]
                    guessed[compat] = train_discriminator(*step, batches, place)["domain_accuracy"]
            forget_process_group()
    assert balance["official"] - balance["fixed"] == pytest.approx(1 - math.log(2), abs=1e-5)
    assert second["fixed"] == second["official"]
    # Of the same guesses, those that are right to one are wrong to the other.
    assert first["fixed"] + first["official"] == pytest.approx(1)


def test_official_trains_on_the_source_alone_without_a_target(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    """The baseline is the same loop; `official` keeps the best checkpoint besides the last."""
    data = {name: value for name, value in tiny_settings["data"].items() if name != "target"}
    schedule = tiny_settings["schedule"] | {"epochs": 2, "steps_per_epoch": 3, "checkpoint_every_steps": 0}
    tree = tiny_settings | {"data": data, "schedule": schedule, "compat": "official"}
    describe_run(tmp_path / "run", from_tree(("test", tree)))
    train_worker(tmp_path / "run")
    result = json.loads((tmp_path / "run" / RESULT).read_text())
    assert result["clusters"] is None
    assert result["chosen_on_tests"]
    assert result["steps"] == 6
    assert latest(tmp_path / "run", "best") is not None
