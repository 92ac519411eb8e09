"""Ends what a killed command would leave: its scratch folder, and the processes that still write to it.

    python -m dmx.guard FOLDER     waits for the end of its input, which its command holds open

Ray's agents need a minute to notice that their cluster is gone, and no code of a command that was killed can
end them. This process can: it has a session of its own, so that what kills a whole group leaves it alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dmx import stopping
from dmx.scratch import lock_of

POLL_S = 0.1
# Of a process that was told to stop: their inputs stay open until it ends.
_left_to: list[subprocess.Popen[bytes]] = []


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """See to it that nothing is left of a folder and of who writes to it when the block or this process ends.

    A process that was told to stop leaves it to its end, which is near. The folder stays locked until the
    guard is through: another command that removed it meanwhile would have files in it open, too.

    Args:
        folder: of `scratch_folder`, for this process and those that it starts, and for nobody else.
    """
    command = [sys.executable, "-m", "dmx.guard", str(folder)]
    # Who reads what this process says shall not wait for its guard.
    guard = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, pass_fds=[lock_of(folder)],
    )  # fmt: skip
    try:
        yield
    finally:
        if stopping.is_ending():
            _left_to.append(guard)
        else:
            guard.communicate()  # closes its input, and waits


def users_of(folder: str) -> set[int]:
    """The processes that have a file in a folder open, also one that is deleted; as far as one may see."""
    inside = folder.rstrip("/") + "/"
    found = set()
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(handle).startswith(inside):
                found.add(int(handle.parts[2]))
    return found


def main() -> None:
    """Wait for the command's end, then end the others."""
    (folder,) = sys.argv[1:]
    command = os.getppid()
    sys.stdin.buffer.read()
    # A command that ends by itself is still there, with its log of Ray's open.
    alive = {command} if os.getppid() == command else set()
    while users := users_of(folder) - alive:
        for pid in users:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
