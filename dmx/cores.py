"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")


def cores() -> int:
    """Cores that this process may use: those it is allowed on, or fewer where its time is limited.

    `taskset` and cpusets say on which cores it may run, the quota of a control group (Docker's `--cpus`, the
    limit of a Kubernetes container) for how many cores' time, of which a part counts as a core.
    """
    allowed = len(os.sched_getaffinity(0))
    return min([allowed, *(max(1, math.ceil(limit)) for limit in _quotas())])


def _quotas() -> Iterator[float]:
    """Cores' worth of time that the control groups of this process allow, as far as they are seen."""
    with suppress(OSError):
        for line in (ROOT / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
                base = ROOT / "sys/fs/cgroup" / controllers
                # A container sees its own group as the root, and another name for it.
                group = base / name.lstrip("/")
                for folder in (group, *group.parents):
                    yield from _quota(folder)
                    if folder == base:
                        break


def _quota(folder: Path) -> Iterator[float]:
    """That of one group, of either version of control groups; none where nothing limits it."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text().split()
        yield int(quota) / int(period)  # "max" is no number
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            yield int(quota) / int(period)
