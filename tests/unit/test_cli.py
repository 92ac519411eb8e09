"""The command line itself: every command explains itself, errors are one line, closed pipes are no errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dmx import __version__
from dmx.cli import COMMANDS, main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"dmx {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert len(capsys.readouterr().out) > 500


def test_a_users_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ingest", "/nowhere/at/all", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dmx ingest: error: ")
    assert "/nowhere/at/all" in error
    assert error.count("\n") == 1


def test_a_reader_may_leave_early() -> None:
    """As in `dmx train --settings | head -1`, with a pipe that is closed before anything is written."""
    code = "import sys; sys.stdin.read(); from dmx.cli import main; sys.exit(main(['train', '--settings']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(b"")
    assert errors == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [("MemoryError()", 1, "MemoryError"), ("DmxError('wanted x')", 2, "dmx doctor: error: wanted x\n")],
)
def test_a_command_that_failed_ends_whatever_its_libraries_still_wait_for(
    error: str, status: int, said: str
) -> None:
    """As Ray's threads did, when there was no memory for the last of them."""
    code = (
        "import sys, threading, time\n"
        "import dmx.commands.doctor as doctor\n"
        "from dmx.cli import main\n"
        "from dmx.errors import DmxError\n"
        "def run(args):\n"
        "    threading.Thread(target=time.sleep, args=(300,)).start()\n"
        f"    raise {error}\n"
        "doctor.run = run\n"
        "sys.argv = ['dmx', 'doctor']\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == (status == 1)
