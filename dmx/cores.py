"""How many cores this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores that the process is allowed on: containers and `taskset` may leave fewer than there are."""
    return len(os.sched_getaffinity(0))
