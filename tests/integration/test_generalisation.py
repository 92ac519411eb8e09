"""The benchmark of the claim runs from end to end, goes on, and refuses what cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generalisation.py"


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    small = ["--setting", "trial", "--seeds", "0", "--roles", "1"]
    command = [sys.executable, str(SCRIPT), *places, *small, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def test_a_trial_of_every_way_goes_on_where_it_was(tmp_path: Path) -> None:
    """Ways that are done stay in the result when others are asked for, and are not run again."""
    first = run(tmp_path, "--ways", "synthetic only", "DomainMix")
    assert first.returncode == 0, first.stderr
    path = tmp_path / "generalisation_trial.json"
    before = {row["way"]: row for row in json.loads(path.read_text())["runs"]}
    assert set(before) == {"synthetic only", "DomainMix"}
    again = run(tmp_path, "--ways", "DomainMix", "true labels")
    assert again.returncode == 0, again.stderr
    after = {row["way"]: row for row in json.loads(path.read_text())["runs"]}
    assert set(after) == {"synthetic only", "DomainMix", "true labels"}
    assert after["DomainMix"] == before["DomainMix"]
    for row in after.values():
        assert row["steps"] == 12
        assert set(row["tests"]) == {"unseen", "second"}
    assert not after["synthetic only"]["clusters"]
    assert [line["purity"] for line in after["true labels"]["clusters"]] == [1.0, 1.0]
    assert {"domain_accuracy", "balance"} <= set(after["true labels"]["discriminator"][-1])


def test_what_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    for words, message in (
        (("--jobs", "0"), "--jobs: wanted 1 to"),
        (("--roles", "9"), "--roles: wanted 1 to 3"),
    ):
        done = run(tmp_path, *words)
        assert done.returncode == 2
        assert message in done.stderr
    assert not list(tmp_path.iterdir())
