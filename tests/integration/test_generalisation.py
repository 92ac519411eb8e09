"""The benchmark of the claim runs from end to end, goes on, and refuses what cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmx.cores import cores
from dmx.train.branch import ORIGIN

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = ("--setting", "trial", "--seeds", "0")
TOGETHER = ("--jobs", str(min(2, cores())))


def run(tmp_path: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    command = [sys.executable, str(FOLDER / script), *places, *SMALL, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def rows_of(tmp_path: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((tmp_path / "generalisation_trial.json").read_text(encoding="utf-8"))
    return {row["way"]: row for row in content["runs"]}


def test_a_trial_of_every_way_goes_on_and_is_drawn(tmp_path: Path) -> None:
    """Ways that are done stay in the result when others are asked for, and are not run again."""
    first = run(
        tmp_path, "generalisation.py", "--roles", "1", *TOGETHER, "--ways", "synthetic only", "DomainMix"
    )
    assert first.returncode == 0, first.stderr
    before = rows_of(tmp_path)
    kept = tmp_path / "work" / "trial" / "runs" / "DomainMix--street-campus--0" / "result.json"
    written = kept.stat().st_mtime_ns
    assert set(before) == {"synthetic only", "DomainMix"}
    again = run(tmp_path, "generalisation.py", "--roles", "1", *TOGETHER, "--switches", "no switch")
    assert again.returncode == 0, again.stderr
    after = rows_of(tmp_path)
    assert set(after) == {"synthetic only", "pseudo-labels", "DomainMix", "true labels", "no switch"}
    assert {way: after[way] for way in before} == before
    assert kept.stat().st_mtime_ns == written
    begun = {}
    for run_of in (tmp_path / "work" / "trial" / "runs").iterdir():
        if (run_of / ORIGIN).exists():
            begun[run_of.name.split("--")[0]] = json.loads((run_of / ORIGIN).read_text())["epochs"]
    assert begun == {"synthetic-only": 1, "pseudo-labels": 2, "true-labels": 1, "no-switch": 1}
    for row in after.values():
        assert row["steps"] == 12
        assert set(row["tests"]) == {"unseen", "second"}
    assert not after["synthetic only"]["clusters"]
    assert [line["purity"] for line in after["true labels"]["clusters"]] == [1.0, 1.0]
    assert {"domain_accuracy", "balance"} <= set(after["true labels"]["discriminator"][-1])
    assert not after["pseudo-labels"]["discriminator"]

    drawn = run(tmp_path, "generalisation_pictures.py", "--out", str(tmp_path / "pictures"))
    assert drawn.returncode == 0, drawn.stderr
    assert ">no switch, street labelled<" in (tmp_path / "pictures" / "clusters.svg").read_text(
        encoding="utf-8"
    )
    assert ">DomainMix<" in (tmp_path / "pictures" / "discriminator.svg").read_text(encoding="utf-8")
    assert (tmp_path / "pictures" / "domains.png").stat().st_size > 10_000
    measured = json.loads((tmp_path / "generalisation_trial_cameras.json").read_text(encoding="utf-8"))
    ways = ("synthetic only", "pseudo-labels", "DomainMix", "true labels")
    wanted = {(way, 0, camera) for way in ways for camera in range(6)}
    assert {(row["way"], row["seed"], row["camera"]) for row in measured["rows"]} == wanted
    for way in ways:  # every camera asks equally often here, so that the mean over cameras is the mAP
        cameras = [row["map"] for row in measured["rows"] if row["way"] == way]
        assert sum(cameras) / 6 == pytest.approx(after[way]["tests"]["unseen"]["map"], abs=1e-6)


def test_without_a_result_there_is_nothing_to_draw(tmp_path: Path) -> None:
    done = run(tmp_path, "generalisation_pictures.py", "--out", str(tmp_path / "pictures"))
    assert done.returncode == 2
    assert "generalisation_trial.json, which generalisation.py writes, found none" in done.stderr


def test_what_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    for words, message in (
        (("--jobs", "0"), "--jobs: wanted 1 to"),
        (("--roles", "9"), "--roles: invalid choice: 9"),
        (("--switches", "magic"), "--switches: invalid choice"),
    ):
        done = run(tmp_path, "generalisation.py", *words)
        assert done.returncode == 2
        assert message in done.stderr
    assert not list(tmp_path.iterdir())
