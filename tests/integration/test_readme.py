"""The README is true: its commands run, its tree exists, its tables are those of the results."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

from dmx.config import from_tree, recipe, to_tree
from dmx.deployment.folder import export_model
from dmx.features import Features
from dmx.model import build_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def shell_commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines() if line]


def environment() -> dict[str, str]:
    """Commands are found where this Python stands."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    made = [words[1] for words in shell_commands() if words[0] == "make"]
    assert made == ["demo", "test"]
    plan = {
        target: subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for target in made
    }
    assert "dmx demo --out demo" in plan["demo"]
    for step in ("ruff check", "mypy", "pytest"):
        assert step in plan["test"]


@pytest.mark.timeout(900)
def test_every_dmx_command_runs_in_order(tmp_path: Path) -> None:
    commands = [words for words in shell_commands() if words[0] == "dmx"]
    assert {words[1] for words in commands} == {
        "synth",
        "ingest",
        "train",
        "evaluate",
        "embed",
        "cluster",
        "export",
        "search",
        "report",
        "doctor",
    }
    printed = {}
    for words in commands:
        done = subprocess.run(
            words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        printed[words[1]] = done.stdout
    assert (tmp_path / "styles.png").stat().st_size > 10_000
    assert (tmp_path / "runs/first/result.json").exists()
    # A line of rankings and a line of thresholds each.
    assert printed["evaluate"].count("images/mall") == 2
    assert printed["evaluate"].count("data/mall") == 2
    assert len(Features(tmp_path / "features/campus")) == 24 * 8
    assert "192 images embedded" in printed["embed"]
    assert (tmp_path / "runs/first/report.html").stat().st_size > 100_000


def test_every_python_example_runs(tmp_path: Path) -> None:
    """Where the exported model lies that one of them takes."""
    export_model(_untrained(tmp_path / "run"), tmp_path / "export" / "first", formats=["safetensors"])
    examples = blocks("python")
    said = []
    for code in examples:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said == ["(2, 256) float32\n", "40 (480,) (40, 64)\n", ""]


def _untrained(folder: Path) -> Path:
    """A checkpoint of the demo's network, as far as an export looks at it."""
    config = from_tree(recipe("demo"))
    folder.mkdir()
    save_file(build_model(config.model).state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(config)), encoding="utf-8")
    return folder


def test_the_tree_is_the_repositorys() -> None:
    tree = README.split("## The house", 1)[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert named == top - {"LICENSE"}


def test_the_demo_was_measured_with_the_recipe_that_it_has() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    assert measured["recipe"] == recipe("demo")[1], "run python benchmarks/demo.py"


def test_tables_are_those_of_the_results() -> None:
    check = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run python benchmarks/tables.py"
