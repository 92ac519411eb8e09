"""What the table of kills says of numbers that are known."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def row(**changed: Any) -> dict[str, Any]:
    faults: dict[str, Any] = {"partial": [], "differences": [], "leaks": [], "rude": []}
    kills = {"SIGKILL": 2, "SIGKILL to the group": 3, "SIGTERM": 1, "out of memory: killed": 2}
    where = {"starting": 2, "at work": 4, "through": 2}
    end_s = {"count": 1, "median": 0.44, "max": 1.26}
    return {
        "command": "train-ray",
        "dates": ["2026-01-02"],
        "kills": kills,
        "where": where,
        "end_s": end_s,
        **faults,
        **changed,
    }


def test_kills_are_counted_by_kind_and_faults_are_shouted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module("kill_table").reliability_kill
    machine = {"cores": 2, "memory_limit": "cgroup v1"}
    text = table({"machine": machine, "rows": [row(), row(command="ingest", end_s=None)]})
    assert "| dmx train, ray | 5 | 1 | 0 | 2 | 50% | 0 | 0 | 0 | 0.4 | 1.3 |" in text
    assert "4 ended well all the same" in text
    assert "| dmx ingest | 5 | 1 | 0 | 2 | 50% | 0 | 0 | 0 |  |  |" in text
    assert "16 kills at random moments" in text
    assert "each then came to" in text
    assert "Struck on 2026-01-02;" in text
    told = table(
        {
            "machine": machine,
            "rows": [row(leaks=["process x"], rude=["a traceback"], dates=["2026-01-03", "2026-01-02"])],
        }
    )
    assert "| 0 | 0 | 1 |" in told
    assert "2 FAULTS were found" in told
    assert "Struck from 2026-01-02 to 2026-01-03;" in told
