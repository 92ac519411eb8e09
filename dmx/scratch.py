"""Folders, and processes, that are not to outlive the process that made them.

A scratch folder is removed at the end, and those of processes that were killed by the next one that makes
one: its owner holds a lock on it, which the kernel takes back from whoever ends, however that was.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NEW = ".dmx-new-"  # begins the name of a folder that is not locked yet
NEW_S = 60.0  # after which nobody is about to lock it any more
WAIT_S = 2.0
POLL_S = 0.05
Process = tuple[int, int]  # its number, and when it started: numbers come again
_locks: dict[Path, int] = {}  # of this process's folders


@contextmanager
def scratch_folder(
    prefix: str, parent: Path, *, is_left: Callable[[], bool] = lambda: False
) -> Iterator[Path]:
    """A new folder within it; gone afterwards.

    Args:
        prefix: of the names of such folders, and of nothing else in `parent`.
        parent: where they lie.
        is_left: asked afterwards whether it is left to somebody else to remove.
    """
    remove_left(prefix, parent)
    # Nobody takes it for one that was left before it is locked: until then it has another name.
    made = Path(tempfile.mkdtemp(prefix=NEW, dir=parent))
    folder = made.with_name(prefix + made.name.removeprefix(NEW))
    lock = os.open(made, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders, where it is not told apart
            fcntl.flock(lock, fcntl.LOCK_EX)
        made.rename(folder)
        _locks[folder] = lock
        try:
            yield folder
        finally:
            del _locks[folder]
            if not is_left():
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
        shutil.rmtree(made, ignore_errors=True)  # where it did not come to its name
    if is_left():
        return
    # Processes of one that was killed may have gone on writing for a moment when this one started.
    remove_left(prefix, parent)


def lock_of(folder: Path) -> int:
    """The handle that locks one of this process's folders: who inherits it keeps the folder from others."""
    return _locks[folder]


def remove_left(prefix: str, parent: Path) -> None:
    """Remove the scratch folders of processes of this user that are no more."""
    for folder in parent.iterdir():
        if not folder.name.startswith((prefix, NEW)):
            continue
        with suppress(OSError):  # another process removes it, too, or it is not ours to remove
            if folder.name.startswith(NEW) and time.time() - folder.stat().st_mtime < NEW_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def descendants(pid: int) -> set[Process]:
    """The processes that a process has started, and those that they have; empty where there is no /proc."""
    children: dict[int, list[Process]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name, in brackets, may hold anything; behind it state, parent, ..., start.
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append((int(stat.parent.name), int(fields[19])))
    found, unread = set(), [pid]
    while unread:
        own = children.get(unread.pop(), [])
        found.update(own)
        unread += [child for child, _ in own]
    return found


def await_ends(processes: set[Process]) -> None:
    """Wait for processes to end, and end those that do not within WAIT_S seconds."""
    deadline = time.monotonic() + WAIT_S
    while left := {process for process in processes if _runs(process)}:
        if time.monotonic() > deadline:
            for pid, _ in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(POLL_S)


def _runs(process: Process) -> bool:
    try:
        text = Path(f"/proc/{process[0]}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    fields = text.rpartition(")")[2].split()
    return fields[0] not in "ZX" and int(fields[19]) == process[1]
