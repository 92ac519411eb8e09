"""Small file systems, really mounted, which fill up and can be made read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Disk:
    """A file system in memory; `path` is where it is mounted."""

    path: Path

    def remount(self, options: str) -> None:
        """Change its size (`size=64m`), or whether it can be written to (`ro`, `rw`)."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Disk]:
    """A file system of a size such as `64k`, mounted at a folder that it makes."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "dmx-test", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting wants root: {mounted.stderr}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
