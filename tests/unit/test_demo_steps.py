"""What the demo does again and what it keeps when it is run again; the commands themselves are not run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dmx import demo as demo_module
from dmx.demo import RESULT, RUNS, TEST_SET, Demo, run_demo
from dmx.errors import DmxError

METRICS = {"map": 0.5, "rank1": 0.6, "minp": 0.4}


def _pretend(ran: list[str], took_s: float, fails_at: str | None = None) -> object:
    """A command that takes so long, and leaves the files that tell it is done."""

    def run(words: list[str]) -> None:
        ran.append(" ".join(words))
        time.sleep(took_s)
        if fails_at and words[0] == fails_at:
            raise DmxError("interrupted")
        if "--sheet" in words:
            Path(words[words.index("--sheet") + 1]).write_text("drawn")
        elif words[0] == "ingest":
            Path(words[2]).mkdir(parents=True)
            (Path(words[2]) / "manifest.json").write_text("{}")
        elif words[0] == "train":
            folder = Path(words[words.index("--run") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RESULT).write_text(json.dumps({"steps": 1, "tests": {TEST_SET: METRICS}}))

    return run


def test_run_again_keeps_the_measured_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither draws the sheet nor ingests again; both trainings have their own seconds."""
    ran: list[str] = []
    monkeypatch.setattr(demo_module, "_run", _pretend(ran, 0.11))
    run_demo(Demo(tmp_path))
    first = json.loads((tmp_path / RESULT).read_text())
    assert len(first["seconds"]) == len(ran) == 1 + 3 + 3 + len(RUNS)
    assert first["total_seconds"] == pytest.approx(sum(first["seconds"].values()))
    assert min(first["seconds"].values()) >= 0.1

    ran.clear()
    monkeypatch.setattr(demo_module, "_run", _pretend(ran, 0))
    run_demo(Demo(tmp_path))
    assert json.loads((tmp_path / RESULT).read_text()) == first
    assert not [words for words in ran if "--sheet" in words or words.startswith("ingest")]


def test_seconds_before_an_interruption_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "_run", _pretend([], 0.11, fails_at="train"))
    with pytest.raises(DmxError, match="interrupted"):
        run_demo(Demo(tmp_path))
    monkeypatch.setattr(demo_module, "_run", _pretend([], 0.11))
    run_demo(Demo(tmp_path))
    seconds = json.loads((tmp_path / RESULT).read_text())["seconds"]
    trainings = [spent for name, spent in seconds.items() if name.startswith("train")]
    assert trainings[0] >= 0.2 > trainings[1]
