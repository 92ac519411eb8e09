"""Cores that a process may use, by what limits it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmx import cores as module
from dmx.cores import cores

ALLOWED = len(os.sched_getaffinity(0))
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/\n", {"": "max 100000"}, 64),
        ("0::/\n", {"": "400000 100000"}, 4),
        ("0::/\n", {"": "150000 100000"}, 2),
        ("0::/\n", {"": "10000 100000"}, 1),
        ("0::/a/b\n", {"a": "300000 100000", "a/b": "max 100000"}, 3),
        ("0::/of/the/host\n", {"": "200000 100000"}, 2),
        ("4:cpu,cpuacct:/a\n1:name=systemd:/\n", {"cpu,cpuacct/a": (500000, 100000)}, 5),
        ("4:cpu,cpuacct:/docker/x\n0::/\n", {"cpu,cpuacct": (50000, 25000)}, 2),
        ("4:cpu:/a\n", {"cpu/a": (-1, 100000)}, 64),
        ("4:memory:/a\n", {"memory/a": (100000, 100000)}, 64),
        ("0::/\n", {}, 64),
    ],
)
def test_quotas(
    groups: str, files: dict[str, str | tuple[int, int]], wanted: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of either version of control groups, of a group around this one, and of a container's own."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, found in files.items():
        folder = tmp_path / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(found, str):
            (folder / "cpu.max").write_text(f"{found}\n")
        else:
            for which, number in zip(("quota", "period"), found, strict=True):
                (folder / f"cpu.cfs_{which}_us").write_text(f"{number}\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert cores() == wanted


def test_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert cores() == ALLOWED


@pytest.mark.skipif(
    not os.access(CPU_GROUPS / "cpu.cfs_quota_us", os.W_OK),
    reason="wants a control group, and may make none",
)
def test_a_real_quota() -> None:
    group = CPU_GROUPS / f"dmx-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("90000")
        code = "from dmx.cores import cores; print(cores())"
        join = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{code}'"
        said = subprocess.run(["sh", "-c", join], check=True, capture_output=True, text=True).stdout
        assert said == "1\n"
    finally:
        group.rmdir()
