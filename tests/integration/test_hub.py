"""A model by its name on the hub, for every command that takes one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub import COMMIT, hub_of
from runs import write_run

from dmx.cli import main

NAME = "someone/street"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    run = write_run(folder / "run", tiny_settings, 0)
    assert main(["export", str(run), str(folder / "export"), "--formats", "safetensors"]) == 0
    return folder / "export"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    tiny.write_set(folder, 5, {"query": 4, "gallery": 4})
    return folder


def dmx(cwd: Path, endpoint: str, *commands: list[object], offline: str = "0") -> tuple[list[int], str]:
    """Statuses and errors of commands in a process of their own: where the hub is gets read at import."""
    code = (
        "import json, sys; from dmx.cli import main; print(*[main(each) for each in json.loads(sys.argv[1])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([[str(word) for word in words] for words in commands])],
        cwd=cwd,
        env={
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HUB_CACHE": str(cwd / "cache"),
            "HF_HUB_OFFLINE": offline,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return [int(status) for status in done.stdout.splitlines()[-1].split()], done.stderr


def test_every_command_takes_the_name(exported: Path, dataset: Path, tmp_path: Path) -> None:
    """Downloaded once; `dmx export` wrote it, and what it is not needed for stays there."""
    with hub_of(NAME, exported) as (endpoint, asked):
        evaluations = [
            ["evaluate", each, dataset, "--json", f"{Path(each).name}.json"] for each in (NAME, exported)
        ]
        assert dmx(tmp_path, endpoint, *evaluations)[0] == [0, 0]
        found = [
            json.loads((tmp_path / file).read_text())["results"] for file in ("street.json", "export.json")
        ]
        assert found[0] == found[1]
        assert f"/{NAME}/resolve/{COMMIT}/model.safetensors" in asked
        assert not any(path.endswith("README.md") for path in asked)
    # The hub is gone; what it gave is kept.
    statuses, errors = dmx(
        tmp_path,
        endpoint,
        ["search", dataset, dataset, "--model", NAME, "--out", "ranking.json"],
        ["embed", NAME, dataset, "--out", "features", "--split", "query"],
        ["export", NAME, "again", "--formats", "safetensors"],
        offline="1",
    )
    assert statuses == [0, 0, 0], errors
    assert json.loads((tmp_path / "ranking.json").read_text())["model"]["model"] == NAME
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (exported / weights).read_bytes()


def test_a_name_that_the_hub_does_not_have(exported: Path, dataset: Path, tmp_path: Path) -> None:
    with hub_of(NAME, exported) as (endpoint, _):
        statuses, errors = dmx(tmp_path, endpoint, ["evaluate", "someone/other", dataset])
    assert statuses == [2]
    assert "someone/other: wanted a folder, or a model of this name on the Hugging Face hub" in errors


def test_without_a_network_the_error_says_so(dataset: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens there
        statuses, errors = dmx(tmp_path, endpoint, ["evaluate", NAME, dataset])
    assert statuses == [2]
    assert "found no such folder, and the hub gave none" in errors
    assert "HF_HUB_OFFLINE=1 to take what was downloaded before" in errors


def test_a_mistyped_run_is_no_name(dataset: Path, tmp_path: Path) -> None:
    """Where there is a folder `runs`, nobody is asked for runs/frist."""
    (tmp_path / "runs").mkdir()
    with hub_of(NAME, dataset) as (endpoint, asked):
        _, errors = dmx(tmp_path, endpoint, ["evaluate", "runs/frist", dataset])
    assert "runs/frist: wanted a run folder" in errors
    assert not asked
