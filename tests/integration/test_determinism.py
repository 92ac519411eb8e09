"""The same seed gives the same run, to the bit, whatever decodes; and nearly the same on more processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_bit_identical, losses_of, prepare, tensors_of

from dmx.train.determinism import WORKSPACE, WORKSPACE_SIZES, determinism
from dmx.train.loop import run_epochs
from dmx.train.runlog import EPOCHS, read_lines
from dmx.train.worker import train_worker

ROOT = Path(__file__).parents[2]
# On the source alone, so that no cluster turns a difference of rounding into another label: sums over two
# processes round otherwise than over one, about 1e-7 of a gradient, which Adam makes into steps of its own
# size where signs flip. Two epochs at the warm-up's rate were seen to stay 4 times below these.
LOSS_TOLERANCE = 2e-3
WEIGHT_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def whole(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs, through all stages, with batches made in line."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    run = prepare(tmp_path_factory.mktemp("whole") / "run", _three(tiny_settings), data={"workers": 0})
    train_worker(run)
    return run


def _three(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"schedule": settings["schedule"] | {"epochs": 3, "checkpoint_every_steps": 100}}


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_that_decode_do_not_matter(
    whole: Path, tiny_settings: dict[str, Any], tmp_path: Path, workers: int
) -> None:
    """`data.workers`: images, their augmentation and the order of batches are functions of seed and step."""
    run = prepare(tmp_path / "run", _three(tiny_settings), data={"workers": workers})
    train_worker(run)
    assert_bit_identical(run, whole)


def test_the_setting_changes_nothing_on_a_cpu(
    whole: Path, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch takes deterministic algorithms while it trains; what was set before is put back behind it."""
    seen: list[tuple[bool, bool, bool, str | None]] = []

    def watched(trainer: Any) -> None:
        cudnn = torch.backends.cudnn
        enabled = torch.are_deterministic_algorithms_enabled()
        seen.append((enabled, cudnn.deterministic, cudnn.benchmark, os.environ.get(WORKSPACE)))
        run_epochs(trainer)

    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr("dmx.train.loop.run_epochs", watched)
    run = prepare(tmp_path / "run", _three(tiny_settings) | {"deterministic": True}, data={"workers": 0})
    train_worker(run)
    assert seen == [(True, True, False, WORKSPACE_SIZES)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert_bit_identical(run, whole)


def test_what_was_set_comes_back_after_an_error() -> None:
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        with pytest.raises(KeyError), determinism(True):
            raise KeyError(torch.is_deterministic_algorithms_warn_only_enabled())
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        with determinism(False):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_processes_train_as_one(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Losses and weights within the tolerances that stand above."""
    settings = tiny_settings | {"schedule": tiny_settings["schedule"] | {"epochs": 2, "source_epochs": 2}}
    one, two = (prepare(tmp_path / name, settings) for name in ("one", "two"))
    train_worker(one)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "dmx.train.worker", str(two)], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.tensor(losses_of(run)) for run in (one, two))
    torch.testing.assert_close(first, second, rtol=LOSS_TOLERANCE, atol=0)
    weights, others = tensors_of(one), tensors_of(two)
    names = [name for name in weights if name.startswith("model/") and weights[name].is_floating_point()]
    assert names
    for name in names:
        scale = float(weights[name].abs().max())
        assert float((weights[name] - others[name]).abs().max()) <= WEIGHT_TOLERANCE * max(scale, 1.0), name
    assert len(read_lines(two / EPOCHS)) == 2


def _atomics() -> list[tuple[str, str, str]]:
    """File, operation and value of every atomic operation of the Triton kernels."""
    found = []
    for path in sorted((ROOT / "kernels").glob("*.py")):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        ]
        for call in sorted(calls, key=lambda call: call.lineno):
            if (name := ast.unparse(call.func)).startswith("tl.atomic"):
                found.append((path.name, name.removeprefix("tl."), ast.unparse(call.args[-1])))
    return found


def test_atomics_of_the_kernels_are_in_whole_numbers() -> None:
    """Additions of whole numbers and minima come to the same in any order; places are sorted afterwards.

    A new one has to be looked at, and added here with the reason why no bit depends on its order.
    """
    assert _atomics() == [
        ("candidates.py", "atomic_add", "total"),  # int32: places in a buffer, which is sorted by key
        ("dbscan.py", "atomic_add", "1"),  # int32: counts neighbours
        ("dbscan.py", "atomic_add", "1"),
        ("dbscan.py", "atomic_min", "over"),  # int32: the lowest root wins
        ("dbscan.py", "atomic_min", "low"),
        ("dbscan.py", "atomic_min", "cluster"),
        ("exact.py", "atomic_add", "1"),  # int32: places in a row, which is sorted by similarity and number
        ("jaccard.py", "atomic_add", "common"),  # int32: weights as whole numbers, rounded up
        ("jaccard.py", "atomic_cas", "j + 1"),  # int32: a set, of which only the members matter
        ("jaccard.py", "atomic_add", "total.to(tl.int64)"),  # places of candidates, which are sorted by pair
    ]
