"""Folders of processes that were killed go with the next one; those of others stay."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmx.scratch import await_ends, descendants, scratch_folder

HOLD = (
    "import sys; from pathlib import Path; from dmx.scratch import scratch_folder\n"
    "with scratch_folder('try-', Path(sys.argv[1])) as folder:\n"
    "    (folder / 'file').touch(); print(folder, flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that has such a folder, with a file in it."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_it_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch_folder("try-", tmp_path) as folder:
        (folder / "below").mkdir()
        assert folder.name.startswith("try-")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_the_next_one_removes(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    with scratch_folder("try-", tmp_path):
        assert (left / "file").exists(), "its owner runs"
    holder.kill()
    holder.communicate()
    assert (left / "file").exists()
    (tmp_path / "other-folder").mkdir()
    with scratch_folder("try-", tmp_path) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, tmp_path / "other-folder"])


def test_what_was_killed_before_it_had_its_name_goes_a_minute_later(tmp_path: Path) -> None:
    """Not at once: its owner may be about to lock it."""
    left, young = tmp_path / ".dmx-new-left", tmp_path / ".dmx-new-young"
    for folder in (left, young):
        folder.mkdir()
    minute_ago = time.time() - 61
    os.utime(left, (minute_ago, minute_ago))
    with scratch_folder("try-", tmp_path):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [young]


def test_what_does_not_come_to_its_name_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"), scratch_folder("try-", tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_descendants_are_awaited_and_then_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmx.scratch.WAIT_S", 0.3)
    stays = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    )
    child = subprocess.Popen([sys.executable, "-c", stays], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    found = descendants(child.pid)
    assert [pid for pid, _ in found] == [grandchild]
    start = time.monotonic()
    await_ends(found)
    assert child.wait(5) == 0
    assert time.monotonic() - start >= 0.3
    child.stdout.close()


def test_who_cleans_up_is_not_taken_for_one_of_those_that_are_to_end(tmp_path: Path) -> None:
    """The guard of a killed command ends whoever uses its folder; the next command removes such folders."""
    owner = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dmx.guard import guarded\n"
        "from dmx.scratch import scratch_folder\n"
        "with scratch_folder('try-', Path(sys.argv[1])) as folder, guarded(folder):\n"
        "    for number in range(1500): (folder / str(number) / 'below').mkdir(parents=True)\n"
        "    print(flush=True)\n"
        "    time.sleep(60)\n"
    )
    cleaner = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dmx.scratch import remove_left\n"
        "print(flush=True)\n"
        "while list(Path(sys.argv[1]).iterdir()): time.sleep(0.001), remove_left('try-', Path(sys.argv[1]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", owner, str(tmp_path)], stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        command.stdout.readline()
        begin = [sys.executable, "-c", cleaner, str(tmp_path)]
        with subprocess.Popen(begin, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            command.kill()
            assert other.wait(60) == 0
