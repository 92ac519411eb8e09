"""`dmx demo` at a small scale: the whole way from nothing to two tested models, and going on afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dmx.config import from_tree, recipe
from dmx.demo import BASELINE, DOMAINMIX, Demo, commands
from dmx.errors import DmxError

ROOT = Path(__file__).parents[2]
SCALE = "0.03"


def demo(out: Path) -> subprocess.CompletedProcess[str]:
    """`make demo` in this environment, as if its installation were up to date."""
    words = ["make", "--no-print-directory", "-o", f"{sys.prefix}/.installed", "demo", f"VENV={sys.prefix}"]
    words.append(f"DEMO=--out {out} --scale {SCALE}")
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
def test_demo_from_nothing(tmp_path: Path) -> None:
    done = demo(tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["models"]) == {BASELINE, DOMAINMIX}
    steps = {model["steps"] for model in result["models"].values()}
    assert len(steps) == 1, "both models get the same budget"
    for model in result["models"].values():
        assert 0 < model["map"] <= 1
        assert model["valid_queries"] > 50
    schedule = from_tree(recipe("demo")).schedule
    clustered = [row["epoch"] for row in result["clusters"]]
    assert clustered == list(range(schedule.source_epochs + 1, schedule.epochs + 1))
    log = (tmp_path / "domainmix" / "metrics.jsonl").read_text().splitlines()
    assert len(log) == steps.pop()
    text = (tmp_path / "result.md").read_text()
    assert text in done.stdout
    assert done.stdout.endswith(f"to look at it: dmx report {tmp_path}/domainmix\n")
    assert text.count("\n|") >= 6

    again = demo(tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "result.json").read_text())["models"] == result["models"]
    assert "0 rendered now" in again.stdout


def test_both_runs_differ_only_in_the_target(tmp_path: Path) -> None:
    trainings = [words for words in commands(Demo(tmp_path)) if words[0] == "train"]
    plain, mixed = trainings
    extra = [word for word in mixed if word not in plain]
    assert extra[0] == "--target"
    assert len(extra) == 3  # --target, its path, and the name of the run


def test_scale_is_checked(tmp_path: Path) -> None:
    with pytest.raises(DmxError, match="--scale wants"):
        Demo(tmp_path, scale=0)
