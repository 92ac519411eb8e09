"""Following a run: the real trackers, told of its steps and results, and of what goes on or wrong."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from dmx.cli import main
from dmx.train.provenance import STARTS
from dmx.train.runlog import EPOCHS, STEPS, read_lines
from dmx.train.trackers import IDS, MLFLOW_FILE

BLOCK = 32768  # bytes of a block of LevelDB's log


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`dmx train` of a run of an epoch, as short as can be."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login would be
    settings = tiny.tiny_settings(tmp_path)
    settings["schedule"] |= {"epochs": 1, "steps_per_epoch": 3, "checkpoint_every_steps": 0}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    command = ["train", "--launcher", "inline", "--run", str(tmp_path / "runs" / "first")]

    def run(*more: str) -> int:
        begins = [] if "--resume" in more else ["--recipe", str(tmp_path / "tiny.yaml")]
        return main([*command, *begins, *more])

    return run


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, as W&B keeps a run, behind 7 bytes of its own.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    at, whole = 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # no room for a header: the block ends in zeros
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def wandb_records(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings of the run that W&B keeps in its file, and what it was told, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    config: dict[str, Any] = {"files": []}
    history = []
    for data in leveldb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = record.run
            config |= {"id": run.run_id, "name": run.display_name, "project": run.project, "host": run.host}
            config |= {item.key: json.loads(item.value_json) for item in run.config.update}
        if record.HasField("config"):
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        if record.HasField("files"):
            config["files"] += [item.path for item in record.files.files]
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return config, history


@pytest.mark.timeout(300)
def test_trackers_are_told_of_a_run_and_of_its_continuation(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings, steps and results, under the folder's name; a resumed run is the same run for them."""
    pytest.importorskip("wandb", reason="wants wandb: pip install 'dmx[track]'")
    pytest.importorskip("mlflow", reason="wants mlflow-skinny: pip install 'dmx[track]'")
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "runs" / "first"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train("--log.trackers", "tensorboard", "wandb", "mlflow", "--log.project", "people") == 0
    assert train("--resume", "--schedule.epochs", "2", "--optim.lr", "1e-3") == 0
    steps, epochs = read_lines(run / STEPS), read_lines(run / EPOCHS)
    assert [line["global_step"] for line in steps] == list(range(6))
    map_ = epochs[1]["tests"]["unseen"]["map"]

    ids = json.loads((run / IDS).read_text())
    number = ids["wandb"]
    folders = sorted((run / "wandb").glob(f"offline-run-*-{number}"), key=lambda path: path.stat().st_ctime)
    told = [wandb_records(folder) for folder in folders]
    assert len(told) == 2
    for config, _ in told:
        assert (config["id"], config["name"], config["project"]) == (number, "first", "people")
        assert config["data.source"] == "source", "no more of the path than its name"
        assert config["data.tests"] == ["unseen"]
        assert not config["host"]
    assert told[1][0]["optim.lr"] == 1e-3
    history = [line for _, lines in told for line in lines]
    losses = {line["global_step"]: line["train/loss"] for line in history if "train/loss" in line}
    assert losses == {line["global_step"]: line["loss"] for line in steps if "loss" in line}
    assert [line["epoch/tests/unseen/map"] for line in history if "epoch/tests/unseen/map" in line][1] == map_

    client = MlflowClient(f"sqlite:///{run.parent / MLFLOW_FILE}")
    found = client.get_run(ids["mlflow"])
    experiment = client.get_experiment_by_name("people")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 1
    assert (found.info.run_name, found.info.status, found.info.user_id) == ("first", "FINISHED", "unknown")
    assert (found.data.params["data.source"], found.data.params["schedule.epochs"]) == ("source", "1")
    assert found.data.tags["changed.schedule.epochs"] == "2"
    points = {m.step: m.value for m in client.get_metric_history(ids["mlflow"], "train/loss")}
    assert points == losses
    assert found.data.metrics["epoch/tests/unseen/map"] == map_

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == sorted(losses)
    everything = b"".join(path.read_bytes() for folder in folders for path in folder.glob("*.wandb"))
    assert str(tmp_path).encode() not in everything


@pytest.mark.timeout(300)
def test_a_tracker_that_fails_does_not_end_the_training(
    train: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No login for the one, nobody at the other's address: a warning each, and the result is there."""
    pytest.importorskip("wandb", reason="wants wandb: pip install 'dmx[track]'")
    pytest.importorskip("mlflow", reason="wants mlflow-skinny: pip install 'dmx[track]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert train("--log.trackers", "wandb", "mlflow") == 0
    said = capsys.readouterr()
    warnings = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in sorted(warnings)] == ["mlflow", "wandb"]
    assert all("training goes on without it" in line for line in warnings)
    assert "wandb login" in said.err
    assert len(read_lines(tmp_path / "runs" / "first" / STEPS)) == 3
    assert "unseen" in said.out


@pytest.mark.parametrize(
    ("name", "missing", "install"),
    [("wandb", "wandb", "dmx[track]"), ("mlflow", "sqlalchemy", "dmx[track]"), ("tensorboard",) * 3],
)
def test_a_tracker_that_is_not_installed_is_known_before_anything_is_written(
    train: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    missing: str,
    install: str,
) -> None:
    if name == "mlflow":
        pytest.importorskip("mlflow", reason="wants mlflow-skinny: pip install 'dmx[track]'")
    monkeypatch.setitem(sys.modules, missing, None)  # as Python says that there is none
    assert train("--log.trackers", name) == 2
    error = capsys.readouterr().err
    assert missing in error
    assert f'pip install "{install}"' in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(300)
def test_a_run_whose_data_changed_goes_on_only_deliberately(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, which says it before anything is written."""
    run, quick = tmp_path / "runs" / "first", ("--data.target", "null", "--log.trackers", "[]")
    assert train(*quick) == 0
    shutil.rmtree(tmp_path / "unseen")
    tiny.write_set(tmp_path / "unseen", 4, {"query": 8, "gallery": 8})
    before = (run / STARTS).read_bytes()
    assert train("--resume", "--schedule.epochs", "2") == 2
    assert "(test unseen) is not what" in capsys.readouterr().err
    assert (run / STARTS).read_bytes() == before
    assert train("--resume", "--schedule.epochs", "2", "--allow-changed-data") == 0
    starts = read_lines(run / STARTS)
    assert [line["first_step"] for line in starts] == [0, 3]
    assert starts[1]["changed"] == {"schedule.epochs": [1, 2]}
    assert starts[0]["data"]["test unseen"]["sha256"] != starts[1]["data"]["test unseen"]["sha256"]
    assert starts[0]["data"]["source"] == starts[1]["data"]["source"]
    assert train("--resume", "--schedule.epochs", "3") == 0, "allowed once, it is the run's data"
