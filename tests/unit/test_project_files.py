"""What stands beside the code: citation, changes, templates."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import dmx

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None
    assert {cited["version"], project["version"], newest[1]} == {dmx.__version__}
    assert cited["license"] == project["license"]


def test_the_citation_has_what_the_format_wants() -> None:
    """Required by version 1.2.0 of the Citation File Format, of the software and of the paper."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    paper = cited["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert all({"family-names", "given-names"} <= author.keys() for author in paper["authors"])


def test_templates_ask_for_what_they_name() -> None:
    files = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(files) >= 2
    for file in files:
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys(), file
        assert any(part.get("validations", {}).get("required") for part in form["body"]), file


def test_hooks_check_what_make_lint_does() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    assert [f"$(BIN)/{hook['entry']} ." for hook in hooks] == [line.strip() for line in lint.splitlines()[1:]]
