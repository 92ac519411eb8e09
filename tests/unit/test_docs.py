"""Documents name tests, files and settings that are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmx.config import leaves, recipe_names

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize(("page", "least"), [("method.md", 9), ("reliability.md", 60)])
def test_every_test_that_a_page_names_is_there(page: str, least: int) -> None:
    """Each difference from the published code has one, and each promise."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= least
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_and_settings_are_known(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"--recipe ([a-z][\w-]*)", text):
        assert name in recipe_names(), name
    known = set(leaves())
    sections = "|".join({name.split(".")[0] for name in known if "." in name})
    for name in re.findall(rf"`((?:{sections})\.\w+)", text):
        assert name in known or name.endswith((".json", ".py", ".md", ".safetensors")), name


def test_the_learning_rate_is_drawn_in_both_modes(tmp_path: Path) -> None:
    picture = tmp_path / "rate.svg"
    script = ROOT / "benchmarks" / "learning_rate.py"
    subprocess.run([sys.executable, str(script), "--out", str(picture)], check=True, timeout=120)
    drawn = picture.read_text(encoding="utf-8")
    assert ">fixed<" in drawn
    assert ">official<" in drawn
