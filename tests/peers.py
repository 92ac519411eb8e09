"""Other tools, as they are on the package index, in a folder that only programs of the tests see.

The folder is made once for an environment (250 MB, 11 s where the index is near) and kept in it. Where the
index cannot be reached tests fail, and say so; who works offline sets DMX_NO_PEERS=1, and they are skipped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WANTED = Path(__file__).with_name("peers.txt")
PROGRAMS = Path(__file__).with_name("programs")
OPT_OUT = "DMX_NO_PEERS"
INSTALL_S, RUN_S = 400, 240


def installed() -> Path:
    """The folder, which is there whole or not at all."""
    if os.environ.get(OPT_OUT) == "1":
        pytest.skip(f"{OPT_OUT}=1: not to be fetched from the package index")
    version = hashlib.sha256(WANTED.read_bytes()).hexdigest()[:12]
    folder = Path(sys.prefix) / "dmx-peers" / version
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{version}-{os.getpid()}")
    # Without what they depend on: torch and its like are those of this environment.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*command, "--target", temporary, "--requirement", WANTED],
            capture_output=True, text=True, timeout=INSTALL_S, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"{WANTED.name} could not be installed (offline? set {OPT_OUT}=1): {done.stderr}")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has made it meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def run(folder: Path, program: str | Path, *arguments: object, cwd: Path | None = None) -> str:
    """What a program prints that sees the tools: one of tests/programs, or the path of another."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1",
        # BoxMOT would install what it misses into this environment.
        "PIP_NO_INDEX": "1",
        "UV_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, PROGRAMS / program, *map(str, arguments)],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=RUN_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"
    return done.stdout
