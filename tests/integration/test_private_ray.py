"""A private Ray cluster lets nobody in who has not its token."""

from __future__ import annotations

import os
import subprocess
import sys

INSIDE = """
import os, subprocess, sys
from dmx.ray_cluster import ray_cluster
for turn in range(2):
    with ray_cluster(1, 100_000_000) as address:
        import ray
        print(ray.get(ray.remote(lambda: 'works').remote()), address)
        stranger = "import ray, sys; ray.init(sys.argv[1], logging_level=50); print('let in')"
        for mode in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
            if turn:
                break
            bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
            done = subprocess.run(
                [sys.executable, "-c", stranger, address], env=bare | mode, capture_output=True, text=True
            )
            print(done.returncode, done.stdout.strip())
    assert "RAY_AUTH_TOKEN" not in os.environ
"""


def test_a_stranger_is_not_let_in() -> None:
    """Neither without a token nor with another; the cluster's own work goes on, and so does a second one."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", INSIDE], capture_output=True, text=True, check=False, timeout=300, env=bare
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, without, wrong, second = done.stdout.splitlines()
    assert first.startswith("works ")
    assert without == "1 "
    assert wrong == "1 "
    assert second.startswith("works ")
