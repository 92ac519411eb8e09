"""Stopping when told to: what a signal interrupts, where it only leaves word, and what ends all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmx import stopping

AGAIN = "; the same command begins again"
# What a process does when signals come; `told` makes sure that they do.
PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from dmx import stopping

def told():
    print("up", flush=True)
    time.sleep(30)

try:
    with stopping.listening(lambda: "dmx test"):
        {body}
except stopping.Stopped:
    print(stopping.last_words(), flush=True)
    stopping.end(stopping.status())
"""


def start(body: str, *words: object, stop_s: float = 10) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("{body}", body.replace("\n", "\n        ")), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DMX_STOP_S": str(stop_s)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_interrupts_and_closes_what_is_open(signum: int, status: int) -> None:
    process = start("try:\n    told()\nfinally:\n    print('closed')")
    process.send_signal(signum)
    said, _ = process.communicate(timeout=30)
    assert said == f"closed\nstopped by {signal.Signals(signum).name}{AGAIN}\n"
    assert process.returncode == status


def test_a_signal_only_leaves_word_where_it_is_deferred() -> None:
    body = (
        "with stopping.deferred():\n"
        "    print('up', flush=True)\n"
        "    while stopping.wished() is None: time.sleep(0.01)\n"
        "    print('to the end')\n"
        "print('and further')"
    )
    process = start(body)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == f"to the end\nstopped by SIGTERM{AGAIN}\n"


def test_a_signal_is_heard_behind_a_long_call() -> None:
    """One that no signal interrupts, longer than two signals are taken for one."""
    body = (
        "import hashlib\nprint('up', flush=True)\nstopping.AGAIN_S = 0.1\n"
        "threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()\nstart = time.monotonic()\n"
        "try: hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000)\n"
        "finally: print(time.monotonic() - start)"
    )
    took_s, said = start(body, stop_s=100).communicate(timeout=100)[0].splitlines()
    assert float(took_s) > 0.2
    assert said == f"stopped by SIGTERM{AGAIN}"


def test_what_came_before_it_is_not_deferred() -> None:
    stopping._state = stopping._State(signum=signal.SIGTERM)
    try:
        with pytest.raises(stopping.Stopped), stopping.deferred():
            pass
    finally:
        stopping._state = stopping._State()


def test_a_second_signal_ends_at_once_and_the_same_one_twice_does_not() -> None:
    body = (
        "try:\n    told()\n"
        "finally:\n    print('closing', flush=True)\n    time.sleep(4)\n    print('closed', flush=True)"
    )
    process = start(body)
    for _ in range(3):  # timeout(1) tells the command, and its group once more
        process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "closing\n"
    time.sleep(stopping.AGAIN_S + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(1) == 143
    assert process.stdout.read() == ""
    process.communicate()


def test_whoever_does_not_come_to_an_end_is_ended_with_a_word() -> None:
    process = start("try:\n    told()\nfinally:\n    time.sleep(60)", stop_s=1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert said == f"dmx test: stopped by SIGTERM, by force after 0.9 s{AGAIN}\n"
    assert process.returncode == 143


SWALLOWED = {
    "code that catches all": "try:\n    told()\nexcept BaseException:\n    pass\ntime.sleep(60)",
    "a callback": (
        "class Left:\n    def __del__(self):\n        told()\nleft = Left()\ndel left\ntime.sleep(60)"
    ),
}


@pytest.mark.parametrize("by", SWALLOWED)
def test_who_swallows_the_end_is_told_again(by: str) -> None:
    """The command ends by itself, and says nothing but how."""
    process = start(SWALLOWED[by])
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=8)
    assert out.splitlines()[-1] == f"stopped by SIGTERM{AGAIN}"
    assert said == ""
    assert process.returncode == 143


def test_who_is_on_the_way_out_is_not_told_again() -> None:
    process = start("try:\n    told()\nfinally:\n    time.sleep(1)\n    print('tidied')")
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=8)
    assert out.splitlines()[-2:] == ["tidied", f"stopped by SIGTERM{AGAIN}"]
    assert (said, process.returncode) == ("", 143)


def test_an_import_that_is_stopped_gives_its_locks_back() -> None:
    """Interrupted between taking one and seeing to its return, it would keep all threads from importing."""
    body = (
        "print('up', flush=True)\n"
        "lock = threading.Lock()\n"
        "code = 'lock.acquire(); os.kill(os.getpid(), signal.SIGTERM); lock.release()'\n"
        "try:\n"
        "    exec(compile(code, '<frozen importlib._bootstrap>', 'exec'))\n"
        "    time.sleep(60)\n"
        "finally:\n"
        "    print('held' if lock.locked() else 'free')"
    )
    process = start(body)
    out, said = process.communicate(timeout=8)
    assert out.splitlines() == ["free", f"stopped by SIGTERM{AGAIN}"]
    assert (said, process.returncode) == ("", 143)


def test_other_faults_of_callbacks_are_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """To whom they were told."""
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))

    class Left:
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def __del__(self) -> None:
            raise self.error

    before = sys.unraisablehook
    with stopping.listening(lambda: "dmx test", ends=False):
        for error in (stopping.Stopped, ValueError):
            Left(error)
    assert told == [ValueError]
    assert sys.unraisablehook is before


@pytest.mark.parametrize("begins", [True, False])
def test_a_thread_that_finds_no_memory_to_begin_is_not_waited_for(begins: bool) -> None:
    """`Thread.start` waits until the thread says that it began, which none does whose first step fails."""
    code = (
        "import threading, time\n"
        "from dmx import stopping\n"
        "stopping.LOOK_S = 0.2\n"
        "def fail(self): raise MemoryError\n"
        "with stopping.listening(lambda: 'dmx test'):\n"
        f"    if not {begins}: threading.Thread._bootstrap = fail\n"
        "    until = time.monotonic() + 1\n"
        "    while time.monotonic() < until: threading.Thread(target=time.sleep, args=(0,)).start()"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=20)
    assert done.returncode == (0 if begins else 1)
    assert ("error: found no memory for a thread to begin" in done.stderr) is not begins


def test_a_library_that_takes_the_handlers_does_not_take_the_end() -> None:
    """As ray.init does while it starts."""
    process = start("signal.signal(signal.SIGTERM, lambda *_: None)\ntold()", stop_s=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    process.communicate()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stopping.listening(lambda: "dmx test"):
        assert signal.getsignal(signal.SIGTERM) not in before
        with stopping.keeping_handlers():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_library_that_wants_signals_for_itself_gets_none_and_is_not_interrupted() -> None:
    """As ray.init does, whose handler ends the process wherever it is, in a lock of logging for one."""
    process = start(
        "with stopping.alone_with_signals():\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))\n"
        "    print('up', flush=True)\n"
        "    while stopping.wished() is None: time.sleep(0.01)\n"
        "    print('through', flush=True)\n"
        "print('never')"
    )
    process.send_signal(signal.SIGTERM)
    said, complaints = process.communicate(timeout=30)
    assert said == f"through\nstopped by SIGTERM{AGAIN}\n"
    assert not complaints
    assert process.returncode == 143


WORKER = "with stopping.heeding(Path(sys.argv[1])):\n    {inside}"
STEPS = WORKER.format(
    inside="with stopping.deferred():\n"
    "        print('up', flush=True)\n"
    "        while stopping.wished() is None: time.sleep(0.01)\n"
    "        time.sleep(0.5)\n"
    "        print('a step more', flush=True)"
)


def test_a_worker_ends_behind_its_step_when_the_file_says_so(tmp_path: Path) -> None:
    word = tmp_path / "stop"
    word.touch()
    process = start(STEPS, word)
    stopping.leave_word(word, signal.SIGINT)
    assert process.communicate(timeout=30)[0] == f"a step more\nstopped by SIGINT{AGAIN}\n"


def test_a_worker_that_does_no_steps_ends_at_once_and_without_an_error(tmp_path: Path) -> None:
    word = tmp_path / "stop"
    word.touch()
    process = start(WORKER.format(inside="told()"), word)
    stopping.leave_word(word, signal.SIGTERM)
    assert process.wait(10) == 0  # or its launcher would start it again
    process.communicate()


def test_a_worker_that_gets_the_signal_itself_tells_the_others(tmp_path: Path) -> None:
    """As the tasks of srun do when SLURM preempts a job."""
    word = tmp_path / "stop"
    word.touch()
    process = start(STEPS, word)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == f"a step more\nstopped by SIGTERM{AGAIN}\n"
    assert stopping.found_word(word) == signal.SIGTERM


def test_a_worker_ends_with_its_launcher(tmp_path: Path) -> None:
    """Whose folder whoever goes on after it removes."""
    word = tmp_path / "stop"
    word.touch()
    process = start(WORKER.format(inside="told()"), word)
    word.unlink()
    assert process.wait(10) == 1
    process.communicate()
