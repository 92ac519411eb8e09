"""Checks for known vulnerabilities and for secrets: they fail when they should, and say what they missed."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _report(*vulnerabilities: dict[str, Any], name: str = "pyyaml") -> dict[str, Any]:
    """As pip-audit writes it."""
    return {
        "dependencies": [
            {"name": name, "version": "1.0", "vulns": list(vulnerabilities)},
            {"name": "dmx", "skip_reason": "Dependency not found on PyPI"},
        ]
    }


def test_a_vulnerability_that_can_be_mended_fails(
    audit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _report({"id": "CVE-1", "fix_versions": ["99.0"]}, name="a-package-that-nobody-limits")
    assert audit.audit(ask=lambda service: report) == 1
    assert "a-package-that-nobody-limits 1.0: CVE-1: install 99.0" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "fixes"), [("pyyaml", []), ("torch", ["99.0"])])
def test_one_that_cannot_is_told(
    audit: ModuleType, capsys: pytest.CaptureFixture[str], name: str, fixes: list[str]
) -> None:
    """There is no fix, or one that what is installed does not take (torch below 2.16)."""
    report = _report({"id": "CVE-2", "fix_versions": fixes}, name=name)
    assert audit.audit(ask=lambda service: report) == 0
    assert f"{name} 1.0: CVE-2: no fix that fits here" in capsys.readouterr().out


def test_a_service_that_does_not_answer_is_told(
    audit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next one is asked; where none answers, nobody takes silence for safety."""
    silent = {"dependencies": [{"name": "pyyaml", "skip_reason": "Dependency not found on PyPI"}]}
    answers = {"pypi": silent, "osv": _report()}
    assert audit.audit(ask=lambda service: answers[service]) == 0
    assert "1 packages looked up by osv: 0 vulnerabilities" in capsys.readouterr().out
    assert audit.audit(ask=lambda service: None) == 0
    assert "NOTHING WAS CHECKED" in capsys.readouterr().out


def _scan() -> list[str]:
    """The words of the hook that looks for secrets."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    [entry] = [hook["entry"] for repo in hooks for hook in repo["hooks"] if hook["id"] == "secrets"]
    return shlex.split(entry)


def test_a_secret_is_found(tmp_path: Path) -> None:
    """Made here, so that this file holds none."""
    key = "AKIA" + "IOSFODNN7" + "EXAMPLQ"
    (tmp_path / "settings.py").write_text(f"access = {json.dumps(key)}\n")
    (tmp_path / "clean.py").write_text("access = None\n")
    found, clean = (
        subprocess.run(
            [sys.executable, "-m", "detect_secrets.pre_commit_hook", *_scan()[1:], name],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )
        for name in ("settings.py", "clean.py")
    )  # fmt: skip
    assert found.returncode == 1, found.stderr
    assert "AWS Access Key" in found.stdout
    assert key not in found.stdout
    assert clean.returncode == 0, clean.stderr


def test_make_scans_as_the_hook_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [line] = [line for line in makefile.splitlines() if "detect-secrets-hook" in line]
    assert line.strip() == f"git ls-files -z | xargs -0 $(BIN)/{shlex.join(_scan())}"
