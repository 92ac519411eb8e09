"""Where tensors are worked on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import dmx.cluster.validation
from dmx.cluster import pseudo_labels
from dmx.kernels.device import interpreted, takes_triton
from dmx.kernels.memory import NotEnoughMemory


def test_the_cpu_takes_numba_but_within_the_interpreter() -> None:
    x = torch.zeros(1)
    assert not takes_triton(x)
    with interpreted():
        assert takes_triton(x)
    assert not takes_triton(x)


def test_the_interpreter_has_to_be_asked_for_in_time() -> None:
    code = "from dmx.kernels.device import interpreted\nwith interpreted(): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set TRITON_INTERPRET=1 before dmx.kernels is imported" in done.stderr


def test_features_that_do_not_fit_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmx.cluster.validation, "free_bytes", lambda device: 2**28)
    x = torch.ones(4096, 1).expand(4096, 2**16)  # 1 GiB, once it is copied
    with pytest.raises(NotEnoughMemory, match=r"features: wanted 1\.11 GiB .* found 0\.25 GiB"):
        pseudo_labels(x, device="cpu")
