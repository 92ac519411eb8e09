"""The tables of what was fuzzed and listed: of their results, and with every fault in them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("reliability_tables", BENCHMARKS / "reliability_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("cells", None)
    return module


def _result(name: str) -> Any:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_every_reader_was_fuzzed_for_a_minute_and_none_has_a_fault(tables: ModuleType) -> None:
    """What `benchmarks/fuzz.py` found last; a fault that comes up is mended, and the reader fuzzed again."""
    result = _result("fuzz")
    assert {row["target"] for row in result["rows"]} == set(tables.READERS)
    assert all(row["seconds"] >= 60 and row["files"] > 1000 for row in result["rows"])
    assert not [row["target"] for row in result["rows"] if row["faults"] or row["status"]]
    table = tables.fuzz(result)
    assert "| image decoder | " in table
    result["rows"][0] |= {"faults": ["found-crash-1"], "status": 77}
    assert tables.fuzz(result) != table


def test_listing_is_flat(tables: ModuleType) -> None:
    """Ten million files take less than twice the memory of a hundred thousand; broken images cost nothing."""
    result = _result("listing")
    runs = {row["images"]: row["memory_bytes"] for row in result["rows"] if row["way"] == "in runs"}
    assert max(runs) == 10_000_000
    assert runs[10_000_000] < 2 * runs[100_000]
    costs = {row["broken"]: row["cpu_s"] for row in result["broken"]}
    assert costs[1] < 1.3 * costs[0]
    assert "10,000,000" in tables.listing(result)
