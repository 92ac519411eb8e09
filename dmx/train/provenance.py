"""What a run was started with, each time: code, versions and data, so that a result can be traced.

`starts.jsonl` gets a line for every `dmx train` that trains, the first and those that go on. Uncommitted
changes of the code lie beside it, in `code/`, by their hash.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dmx
from dmx.errors import DmxError
from dmx.train.runlog import read_lines, versions
from dmx.writing import whole_file, write_whole

STARTS = "starts.jsonl"
CODE = "code"
GIT_S = 20.0
MOST_DIFF_BYTES = 1 << 20
ALLOW = "--allow-changed-data"

Data = Mapping[str, Mapping[str, Any]]


def check_data(run: Path, data: Data) -> None:
    """Check that the data sets are those that the run was begun with, or last allowed to go on with.

    Args:
        run: the run folder, or that of a branch's trunk.
        data: of each set, by what it is to the run: `describe_dataset`.

    Raises:
        DmxError: one has changed; names it, and what there was and is.
    """
    starts = read_lines(run / STARTS)
    known: Data = starts[-1]["data"] if starts else {}
    for role in sorted(known.keys() & data.keys()):
        was, found = known[role], data[role]
        if was["sha256"] != found["sha256"]:
            raise DmxError(
                f"{found['path']} ({role}) is not what {run} was trained with: wanted {_told(was)}, found "
                f"{_told(found)}. Put the old data back, choose another --run, or go on deliberately with "
                f"{ALLOW}"
            )


def _told(data: Mapping[str, Any]) -> str:
    rows = ", ".join(f"{count} images in {split}" for split, count in data["rows"].items())
    return f"{rows} and a {data['of']} of SHA-256 {data['sha256'][:16]}..."


def record_start(run: Path, data: Data, changed: Mapping[str, Any], first_step: int) -> str | None:
    """Append what the run is started with now.

    Args:
        run: the run folder.
        data: as of `check_data`.
        changed: setting to (old, new) since the start before.
        first_step: step of the run that it goes on at, from 0.

    Returns:
        What differs in code and versions from the start before, in words; None: nothing, or there was none.
    """
    starts = read_lines(run / STARTS)
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "first_step": first_step,
        "code": code_state(run / CODE),
        "versions": versions() | machine_versions(),
        "data": data,
        "changed": changed,
    }
    # Whole, as this is what every later start is compared with.
    write_whole(run / STARTS, "".join(json.dumps(each) + "\n" for each in [*starts, line]))
    return _differences(starts[-1], line) if starts else None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    found = []
    for name in sorted(before["code"].keys() | now["code"].keys()):
        old, new = (code_told(line["code"].get(name)) for line in (before, now))
        if old != new:
            found.append(f"{name}: {old} -> {new}")
    for name in sorted(before["versions"].keys() | now["versions"].keys()):
        old, new = (line["versions"].get(name) for line in (before, now))
        if old != new:
            found.append(f"{name} {old} -> {new}")
    return "; ".join(found) or None


def code_told(state: Mapping[str, Any] | None) -> str:
    """The state of a source tree, one of `code_state`, in words."""
    if not state or "commit" not in state:
        return "no git repository"
    changes = f" with changes {state['diff_sha256'][:8]}" if state["is_dirty"] else ""
    return f"commit {str(state['commit'])[:10]}{changes}"


def code_state(keep: Path) -> dict[str, dict[str, Any]]:
    """The state of DMX's own source, and of the current folder, where each is in a git repository.

    Args:
        keep: folder for the diffs of uncommitted changes.
    """
    found, roots = {}, set()
    for name, folder in (("dmx", Path(dmx.__file__).parent), ("folder", Path.cwd())):
        root = _git(folder, "rev-parse", "--show-toplevel")
        if root is not None and root not in roots and _is_tracked(name, folder):
            roots.add(root)
            found[name] = git_state(Path(os.fsdecode(root.strip())), keep)
    return found


def _is_tracked(name: str, folder: Path) -> bool:
    """An installed package may lie in a repository (as .venv does) without being its code."""
    return name != "dmx" or bool(_git(folder, "ls-files", "__init__.py"))


def git_state(root: Path, keep: Path) -> dict[str, Any]:
    """Commit, whether tracked files differ from it, the SHA-256 of the difference, and untracked files.

    A difference of at most a MiB is kept as `keep/SHA.diff`, which `git apply` takes.
    """
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {"commit": None, "is_dirty": False, "diff_sha256": None, "untracked": None}
    diff = _git(root, "diff", "--binary", "--no-ext-diff", "--no-color", "HEAD") or b""
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z") or b""
    digest = hashlib.sha256(diff).hexdigest() if diff else None
    if digest is not None and len(diff) <= MOST_DIFF_BYTES:
        keep.mkdir(parents=True, exist_ok=True)
        with whole_file(keep / f"{digest[:16]}.diff") as temporary:
            temporary.write_bytes(diff)
    return {
        "commit": commit.decode().strip(),
        "is_dirty": bool(diff),
        "diff_sha256": digest,
        "untracked": untracked.count(b"\0"),
    }


def _git(folder: Path, *words: str) -> bytes | None:
    """What git says; None: there is no git, no repository, or no answer."""
    # Without locks: a look at a repository must not come in the way of whoever works in it.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_S, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@functools.cache
def machine_versions() -> dict[str, str]:
    """What results depend on beside packages: the CUDA that torch is built for, and the driver."""
    import torch

    from dmx.doctor.gpu import find_driver

    return {"cuda": torch.version.cuda or "none", "driver": find_driver().version or "none"}
