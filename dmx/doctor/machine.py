"""The machine: system, processor, memory, room on its disks and in shared memory."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dmx.cores import cores
from dmx.doctor.report import Problem, Row, Section, gib
from dmx.doctor.trials import Outcome, one_line

# Those that change what DMX does on a machine. None of them is a secret.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "NUMBA_NUM_THREADS", "NUMBA_DISABLE_JIT", "OMP_NUM_THREADS",
    "NCCL_SOCKET_IFNAME", "RAY_ADDRESS", "DMX_ALIVE_S",
)  # fmt: skip
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

# Ray (2.60) gives its object store 30 % of the available memory, or less where /dev/shm has less, though
# not below 10^10 bytes. Where that does not fit, the store is a file in Ray's folder, which is slow.
_STORE_SHARE, _STORE_LEAST = 0.3, 10**10
_RAY = "/tmp"  # where `dmx.ray_cluster` puts its folder
_FULL = 0.95  # share of a disk beyond which Ray writes no more objects to it


def memory() -> tuple[int, int]:
    """Bytes of memory that this process may use, and those that are available now."""
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    total, available = (
        int(found[1]) * 1024
        for name in ("MemTotal", "MemAvailable")
        if (found := re.search(rf"^{name}:\s+(\d+) kB", text, re.M))
    )
    limits = [path.read_text(encoding="utf-8").strip() for path in _LIMITS if path.exists()]
    limit = min([total, *(int(text) for text in limits if text.isdigit())])  # "max": none
    return limit, min(available, limit)


def rows(bf16: Outcome) -> list[Row]:
    """System, processor and memory.

    Args:
        bf16: what torch says of the processor.
    """
    found = [
        _row("system", lambda: f"{platform.platform()}"),
        _row("processor", lambda: _processor(bf16)),
        _row("memory", lambda: "{}, {} available".format(*map(gib, memory()))),
    ]
    if given := {name: os.environ[name] for name in _VARIABLES if name in os.environ}:
        text = " ".join(f"{name}={value}" for name, value in given.items())
        found.append(Row("environment", text, given))
    return found


def _row(name: str, tell: Callable[[], str]) -> Row:
    """A line, also where /proc does not say what is expected of it, or a folder is gone."""
    try:
        return Row(name, tell())
    except (OSError, ValueError) as error:
        return Row(name, f"cannot tell: {one_line(error)}")


def _processor(bf16: Outcome) -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    name = named[1].strip() if named else platform.machine()
    there = len(re.findall(r"^processor\s*:", text, re.M))
    hardware = "unknown" if bf16.result is None else "yes" if bf16.result["cpu"] else "no"
    return f"{name}, {cores()} of {there} cores for this process, bf16 in hardware: {hardware}"


def room() -> Section:
    """Room on the disks of the current and of the temporary folder, and in shared memory."""
    found: list[Problem] = []
    rows = [_row("this folder", lambda: _disk(os.getcwd()))]
    try:
        temporary = tempfile.gettempdir()
    except OSError as error:
        found.append(Problem("temporary folder", "one that can be written to", one_line(error), "set TMPDIR"))
    else:
        rows.append(_row("temporary", lambda: _disk(temporary)))
        if temporary != _RAY:
            rows.append(_row("Ray", lambda: _disk(_RAY)))
    rows.append(_row("/dev/shm", lambda: _shared_memory(found)))
    usage = shutil.disk_usage(_RAY)
    return Section("room", rows, [*found, *disk_problems(usage.total, usage.free)])


def _disk(path: str) -> str:
    usage = shutil.disk_usage(path)
    return f"{gib(usage.free)} free of {gib(usage.total)} in {path}"


def disk_problems(total: int, free: int) -> list[Problem]:
    """What Ray complains of in /tmp, from the bytes of its disk."""
    if free >= (1 - _FULL) * total:
        return []
    wanted = f"more than {1 - _FULL:.0%} of its disk free, or else Ray writes no objects there"
    found = f"{free / total:.1%} ({gib(free)})"
    return [Problem(_RAY, wanted, found, "delete files on that disk", fails=False)]


def _shared_memory(found: list[Problem]) -> str:
    usage = shutil.disk_usage("/dev/shm")
    found.extend(shared_memory_problems(usage.free, memory()[1]))
    return f"{gib(usage.free)} free of {gib(usage.total)}"


def shared_memory_problems(free: int, available: int) -> list[Problem]:
    """What Ray complains of in /dev/shm.

    Args:
        free: bytes there; available: bytes of memory.
    """
    store = min(_STORE_SHARE * available, _STORE_LEAST)
    if free >= store:
        return []
    wanted = f"{gib(store)} free, which Ray takes for objects"
    remedy = (
        f"delete files there, or give the container more (Docker: --shm-size={1.1 * store / 2**30:.1f}gb, "
        "Kubernetes: an emptyDir of medium Memory); until then objects lie on disk, which slows dmx embed"
    )
    return [Problem("/dev/shm", wanted, gib(free), remedy, fails=False)]
