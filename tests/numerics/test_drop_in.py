"""The README's drop-in for other people's re-ID code gives the labels of the code it replaces."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def published() -> ModuleType:
    """The published dense way, as the benchmark has it."""
    spec = importlib.util.spec_from_file_location("cluster_cpu", ROOT / "benchmarks" / "cluster_cpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cluster_cpu"] = module
    spec.loader.exec_module(module)
    return module


def three_lines() -> str:
    """The imports and the three lines, without the features they are shown on."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Drop-in for your own re-ID code")[1]
    [code] = [block for block in re.findall(r"```python\n(.*?)```", section, re.S) if "dmx.kernels" in block]
    lines = [line for line in code.splitlines() if line and not line.startswith("features =")]
    assert sum(not line.startswith(("import", "from")) for line in lines) == 3
    return "\n".join(lines)


@pytest.mark.parametrize("spread", [0.7, 1.0, 1.3])
def test_labels_equal_those_of_the_published_code(spread: float) -> None:
    rng = np.random.default_rng(0)
    people = np.repeat(rng.standard_normal((20, 64)), 15, 0)
    x = (people + spread * rng.standard_normal(people.shape)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    dense = published()
    distances = dense.dense_jaccard(dense.dense_encoding(x, dense.dense_neighbours(x)))
    want = dense.dense_dbscan(distances)[1]
    scope = {"features": torch.from_numpy(x)}
    exec(three_lines(), scope)
    np.testing.assert_array_equal(scope["labels"], want)
    assert 1 < len(set(want)) <= 21
