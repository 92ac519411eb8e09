"""What a wait in vain says."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist

from dmx.waiting import WaitError, waiting


def test_a_wait_in_vain_names_process_host_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(WaitError) as caught, waiting("train"), waiting("step 2"):
        raise RuntimeError("gloo: Timed out")
    who = f"process 3 of 4 on {os.uname().nodename}"
    place = "waited 0 s for the others at 'train, step 2', in vain: gloo: Timed out."
    assert str(caught.value).startswith(f"{who} {place}")
    assert str(caught.value).endswith("raise timeout_s")
    assert str(caught.value.__cause__) == "gloo: Timed out"
    # The place is left again.
    with pytest.raises(WaitError, match="at 'evaluate'"), waiting("evaluate"):
        raise dist.DistBackendError("a peer is gone")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$") as caught, waiting("train"):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(caught.value, WaitError)
    with pytest.raises(KeyError), waiting("train"):
        raise KeyError("gloo")
