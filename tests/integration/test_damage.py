"""Checkpoints that the disk has damaged, or has no room for: named, and never gone on from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import Disk, small_disk
from runs import assert_bit_identical, prepare

from dmx.checksums import SUMS
from dmx.errors import DmxError
from dmx.train.checkpoint import FOLDER, LATEST, latest, load_model
from dmx.train.runlog import STEPS, read_lines
from dmx.train.worker import RESULT, train_worker

SCHEDULE = {"checkpoint_every_steps": 4, "keep_checkpoints": 3, "epochs": 3}


@pytest.fixture(scope="module")
def whole(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs that keeps its checkpoints of the steps 28, 32 and 36."""
    os.environ["OMP_NUM_THREADS"] = "1"
    run = prepare(tmp_path_factory.mktemp("whole") / "run", tiny_settings, schedule=SCHEDULE)
    train_worker(run)
    return run


def _flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


FILES = ["classifier.safetensors", "optimizer.safetensors", "state.json", "config.yaml", SUMS]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [_flip, _cut, _empty, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, harm: Callable[[Path], None]
) -> None:
    """The run ends as it ended; the damaged checkpoint is kept aside for whoever wants to look at it."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / RESULT).unlink()
    harm(run / FOLDER / "step-00000036" / file)
    train_worker(run)
    told = capfd.readouterr().err
    # A bit of the checksums themselves may as well be that of the file that it names.
    named = "" if (file, harm) == (SUMS, _flip) else f"{file}: "
    assert f"damaged checkpoint: {run / FOLDER / 'step-00000036'}/{named}" in told
    assert "going on from step-00000032" in told
    assert_bit_identical(run, whole)
    assert [line["global_step"] for line in read_lines(run / STEPS)] == list(range(36))
    assert (run / FOLDER / "damaged-step-00000036").is_dir()


def _garble(file: Path) -> None:
    """No UTF-8."""
    file.write_bytes(b"\xff" * 14)


@pytest.mark.parametrize("harm", [_flip, _empty, _garble, Path.unlink])
def test_a_run_goes_on_although_it_is_lost_which_checkpoint_is_the_latest(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    """By the newest that is whole; nothing is trained again, and nothing removed."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / RESULT).unlink()
    harm(run / FOLDER / LATEST)
    _flip(run / FOLDER / "step-00000036" / "model.safetensors")
    before = sorted(path.name for path in (run / FOLDER).glob("step-*"))
    train_worker(run)
    told = capfd.readouterr().err
    assert f"{run / FOLDER / LATEST} names no checkpoint: going on from step-00000036, the newest" in told
    assert "going on from step-00000032, the last whole one" in told
    assert_bit_identical(run, whole)
    assert set(before) <= {path.name for path in (run / FOLDER).iterdir()}


def test_several_damaged_ones(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The last whole one is used; where there is none, the error names them all and nothing is moved."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in (36, 32):
        _flip(run / FOLDER / f"step-{step:08d}" / "model.safetensors")
    train_worker(run)
    assert "going on from step-00000028" in capfd.readouterr().err
    assert_bit_identical(run, whole)
    before = sorted(path for path in (run / FOLDER).iterdir() if path.name.startswith("step-"))
    for path in before:
        _flip(path / "model.safetensors")
    with pytest.raises(DmxError, match="found only damaged ones: ") as caught:
        train_worker(run)
    assert all(str(path) in str(caught.value) for path in before)
    assert sorted(path for path in (run / FOLDER).iterdir() if path.name.startswith("step-")) == before


def test_a_damaged_model_is_not_taken_for_a_model(whole: Path, tmp_path: Path) -> None:
    """By whoever evaluates, embeds or exports it; other files of the checkpoint do not matter to them."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    folder = latest(run)
    assert folder is not None
    _flip(folder / "optimizer.safetensors")
    load_model(run)
    _flip(folder / "model.safetensors")
    with pytest.raises(DmxError, match=r"model\.safetensors: wanted a file with the SHA-256 .* is damaged"):
        load_model(run)


def test_the_command_goes_on_although_the_description_is_damaged(whole: Path, tmp_path: Path) -> None:
    """`dmx train` reads it before any worker does."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / RESULT).unlink()
    _empty(run / FOLDER / "step-00000036" / "state.json")
    done = _train(run)
    assert done.returncode == 0, done.stderr
    assert "damaged checkpoint" in done.stderr
    assert_bit_identical(run, whole)


def test_sha256sum_agrees(whole: Path) -> None:
    """The file of checksums is one that other tools read."""
    folder = latest(whole)
    assert folder is not None
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(list(folder.iterdir())) - 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", "1536k") as disk:
        yield disk


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    whole: Path, tiny_settings: dict[str, Any], disk: Disk
) -> None:
    """The error says so once; with room again the same command goes on and ends as if nothing had been."""
    run = prepare(disk.path / "run", tiny_settings, schedule=SCHEDULE | {"keep_checkpoints": 100})
    done = _train(run)
    assert done.returncode == 2
    assert "wanted to write the checkpoint step-" in done.stderr
    assert "No space left on device" in done.stderr
    assert "is whole" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((run / FOLDER).glob(".*"))
    before = json.loads(
        (run / FOLDER / (run / FOLDER / LATEST).read_text().strip() / "state.json").read_text()
    )
    assert 0 < before["global_step"] < 36
    disk.remount("size=64m")
    done = _train(run)
    assert done.returncode == 0, done.stderr
    assert_bit_identical(run, whole)


def _train(run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dmx", "train", "--run", str(run), "--resume", "--launcher", "inline"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
