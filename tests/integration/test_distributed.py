"""The collectives of training, and what they say when a process does not come."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest
import torch

from dmx.distributed import World, collect, gather_rows, meet, share, world

TIMEOUT_S = 5.0


def test_collectives_and_a_missing_process() -> None:
    """Two processes; then one of them stays away, and the other's error says which and where."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    first, error, *_ = [*done.stdout.splitlines(), "", ""]
    assert first == "collectives work", done.stderr[-4000:]
    host = os.uname().nodename
    assert error.startswith(f"process 0 of 2 on {host} waited 5 s for the others at 'embedding of epoch 3'")
    assert re.search(r"Ranks? 1 failed", error)
    assert "raise timeout_s" in error


def _check_collectives(place: World) -> None:
    x = torch.full((2, 3), float(place.rank + 1), requires_grad=True)
    gathered = gather_rows(x)
    arriving: list[torch.Tensor] = []
    gathered.register_hook(arriving.append)
    assert gathered[:, 0].tolist() == [1, 1, 2, 2]
    # Each process weighs all rows by its own number: 1 + 2 reach every one of them.
    ((place.rank + 1) * gathered).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 3), 3.0))
    # What arrives may belong to others too: it is left as it was.
    assert torch.equal(arriving[0], torch.full((4, 3), place.rank + 1.0))
    mine = torch.arange(3 * place.rank).reshape(-1, 1)
    assert collect(place, mine, [0, 3]).flatten().tolist() == ([0, 1, 2] if place.leads else [])
    _check_share(place)
    meet(place, "the end of the collectives")


def _check_share(place: World) -> None:
    """The first process's value comes to all as it is; what would not is refused before anybody waits."""
    assert share(place, {"rank": place.rank}) == {"rank": 0}
    numbers = [0.1, -0.0, 5e-324, 1.7976931348623157e308, float("nan"), float("inf"), float("-inf"), 2**70]
    values = [
        {"epoch": {"numbers": numbers, "none": None, "yes": True}, "": [], "text": 'ä \udcff\n"', "{}": {}},
        *(None, "", 3, {}),
    ]
    for value in values:
        # Their texts: NaN equals nothing, and -0.0 equals 0.
        assert repr(share(place, value if place.leads else "another")) == repr(value)
    for value in (b"", (1, 2), {1: 2}, {"a": {1}}, [torch.zeros(1)], World):
        if place.leads:
            with pytest.raises(TypeError, match="to share: wanted what JSON holds, found"):
                share(place, value)


def _main() -> None:
    torch.set_num_threads(1)
    with world(TIMEOUT_S) as place:
        _check_collectives(place)
        if not place.leads:
            time.sleep(2 * TIMEOUT_S)
            return
        print("collectives work")
        try:
            meet(place, "embedding of epoch 3")
        except RuntimeError as error:
            print(" ".join(str(error).split()))


if __name__ == "__main__":
    _main()
