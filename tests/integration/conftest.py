"""What the tests of processes and hosts share: the tiny run, and one thread a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run over four epochs: source alone, stage one, twice stage two; with data of its own."""
    return tiny.tiny_settings(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def peer_tools() -> Path:
    """The folder of other tools, for `peers.run`."""
    return peers.installed()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of threads here and in every process that a test starts: bits depend on it."""
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
