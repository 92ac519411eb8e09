"""Ending when told to: by SIGTERM, which schedulers send before they take a machine away, or SIGINT (Ctrl-C).

The first signal raises `Stopped` in the main thread, so that whatever is open is closed on the way out;
within `deferred` it only leaves word, for code that soon comes to a better place to stop. A second one ends
the process at once. Whoever does not come to an end within STOP_S is ended: what is unfinished lies under
temporary names, and the next start removes it.

Workers, which another process has started, follow a file that all hosts see (`heeding`): in Ray's the code
runs in a thread, where no signal ever arrives.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# From the signal to the end of the process, seconds. Kubernetes gives 30, SLURM what its GraceTime says.
STOP_S = float(os.environ.get("DMX_STOP_S", "10"))
MAIN_S = 0.9 * STOP_S
# Workers end first: after them their launcher has processes of its own to end.
WORKER_S = 0.6 * STOP_S
# timeout(1) sends its signal twice, to the command and to its group: that is one wish.
AGAIN_S = 1.0
POLL_S = 0.25
REMIND_S = 0.1
# A thread that starts begins within a millisecond. Two looks, so far apart, must not see the same start.
LOOK_S = 15.0
_FRAMES_OF_A_START = 3  # itself, and what it waits in
NO_THREAD = (
    b"error: found no memory for a thread to begin, for which this command would wait for ever: give it more "
    b"memory, and give the same command again\n"
)


class Stopped(BaseException):
    """This process was told to stop. No `Exception`: who catches those shall not go on."""


@dataclass
class _State:
    """What this process was told, and where it is."""

    signum: int | None = None
    since: float = 0.0
    handled: float | None = None
    is_reminded: bool = False
    is_deferred: bool = False
    is_agreed: bool = False
    ends: bool = True
    tell: Callable[[int], None] | None = None
    words: Callable[[], str] | None = None


_state = _State()


def wished() -> int | None:
    """The signal that told this process to stop; None while nobody has."""
    return _state.signum


def is_ending() -> bool:
    """Whether this process was told to stop and is about to end, not only its command."""
    return _state.signum is not None and _state.ends


def agree(stop: bool) -> None:
    """All processes of a task know by now that they stop here, or that they do not."""
    _state.is_agreed = stop


def agreed() -> bool:
    """Whether all processes of the task stop here."""
    return _state.is_agreed


def wish(signum: int) -> None:
    """Note that this process is told to stop; the first time counts."""
    if _state.signum is None:
        _state.signum, _state.since = signum, time.monotonic()


def overdue(seconds: float) -> bool:
    """Whether the wish to stop is older than this."""
    return _state.signum is not None and time.monotonic() - _state.since > seconds


@contextmanager
def deferred(tell: Callable[[int], None] | None = None) -> Iterator[None]:
    """Signals within interrupt nothing: the code looks at `wished`, and ends by itself in time.

    Args:
        tell: called with the signal, to pass it on.

    Raises:
        Stopped: the wish came before, or so late that the code within did not see it.
    """
    if _state.signum is not None:
        raise Stopped
    _state.is_deferred, _state.tell = True, tell
    try:
        yield
    finally:
        _state.is_deferred, _state.tell = False, None
    if _state.signum is not None:
        raise Stopped


def say_at_the_end(words: Callable[[], str] = lambda: "; the same command goes on") -> None:
    """What else to say, behind "stopped by SIGTERM", when this command is stopped."""
    _state.words = words


def last_words(*, by_force: bool = False) -> str:
    """One line: by what this process was stopped, and what there is to say of it."""
    line = f"stopped by {signal.Signals(_state.signum or signal.SIGTERM).name}"
    if by_force:
        line += f", by force after {MAIN_S:.2g} s"
    if _state.words is None:
        return f"{line}; the same command begins again"
    with suppress(OSError, ValueError):  # nothing that cannot be read shall hide that it was stopped
        line += _state.words()
    return line


def status() -> int:
    """The exit status of a process that was stopped, as shells count: 143 after SIGTERM, 130 after SIGINT."""
    return 128 + (_state.signum or signal.SIGTERM)


def end(status: int) -> NoReturn:
    """End this process, which has nothing open: Python takes seconds to tidy up large libraries."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(status)


@contextmanager
def listening(name: Callable[[], str], *, ends: bool = True) -> Iterator[None]:
    """Heed signals within, in the main thread of a command.

    Args:
        name: of the command, for its last words.
        ends: whether the process ends when it is stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _state
    _state = _State(ends=ends)
    done = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The pipe tells of signals that Python's handlers cannot see yet, or that a library has taken from them.
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, done, name), name="stopping", daemon=True).start()
    hook = sys.unraisablehook
    sys.unraisablehook = partial(_drop_stopped, hook)
    try:
        with keeping_handlers():
            _handle(_on_signal)
            yield
    finally:
        done.set()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(wakeup)
        os.close(writer)  # which ends the thread
        if not ends:
            _state = _State()


@contextmanager
def alone_with_signals() -> Iterator[None]:
    """Let no library replace the handlers of signals within, and interrupt nothing: it is soon through.

    Not within `deferred`, which it is itself.

    Raises:
        Stopped: a signal came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    module: Any = signal
    put = module.signal

    def put_other(signum: int, handler: Any) -> Any:
        return signal.getsignal(signum) if signum in SIGNALS else put(signum, handler)

    # Code that is not Python's may replace them all the same: then they are put back.
    with keeping_handlers(), deferred():
        module.signal = put_other
        try:
            yield
        finally:
            module.signal = put


@contextmanager
def keeping_handlers() -> Iterator[None]:
    """Put the handlers of signals back that are replaced within."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for signum in SIGNALS:
        signal.signal(signum, handler)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _state.is_reminded:
        _state.is_reminded = False
        if not (_state.is_deferred or _is_on_its_way_out() or _holds_import_locks(frame)):
            raise Stopped
        return
    if _state.handled is not None:  # the way out is not to be interrupted, but may be cut short
        if time.monotonic() - _state.handled > AGAIN_S:
            os._exit(128 + signum)
        return
    _state.handled = time.monotonic()
    wish(signum)
    if _state.tell is not None:
        _state.tell(signum)
    if not (_state.is_deferred or _holds_import_locks(frame)):
        raise Stopped


def _is_on_its_way_out() -> bool:
    """Whether `Stopped` is being handled: a callback, or code that catches all, may have swallowed it."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def _holds_import_locks(frame: FrameType | None) -> bool:
    """Whether the code that was interrupted may have a lock of imports that it would not give back."""
    return frame is not None and frame.f_code.co_filename.startswith("<frozen importlib")


def _drop_stopped(
    tell: Callable[[sys.UnraisableHookArgs], object], unraisable: sys.UnraisableHookArgs
) -> None:
    """Tell of what Python drops in a callback, but not of `Stopped`, which comes again."""
    if not issubclass(unraisable.exc_type, Stopped):
        tell(unraisable)


def _watch(reader: int, done: threading.Event, name: Callable[[], str]) -> None:
    """End the process when it does not end by itself, or waits for what cannot come."""
    starting: set[FrameType] = set()
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], LOOK_S)[0]:
                before, starting = starting, _starting()
                if before & starting and _state.ends:
                    os.write(2, NO_THREAD)
                    os._exit(1)
            elif heard := pipe.read(1):
                _see_to_the_end(heard[0], done, name)
            else:
                return


def _see_to_the_end(signum: int, done: threading.Event, name: Callable[[], str]) -> None:
    """Remind the main thread until it is on its way out, and end the process where it is not out in time."""
    if signum not in SIGNALS:
        return
    wish(signum)
    while not done.wait(REMIND_S):
        if overdue(MAIN_S):
            sys.stderr.write(f"{name()}: {last_words(by_force=True)}\n")
            sys.stderr.flush()
            os._exit(status())
        is_heard = _state.handled is not None and signal.getsignal(signum) is _on_signal
        if is_heard and not _state.is_deferred:
            _state.is_reminded = True
            signal.pthread_kill(threading.main_thread().ident or 0, signum)


def _starting() -> set[FrameType]:
    """The calls of `Thread.start` that wait for a thread to begin.

    One that finds no memory for its first step ends without a word to who waits, who then waits for ever; nor
    is there memory in it to tell anybody else.
    """
    found = set()
    for frame in sys._current_frames().values():
        caller: FrameType | None = frame
        for _ in range(_FRAMES_OF_A_START):
            if caller is not None and caller.f_code is threading.Thread.start.__code__:
                found.add(caller)
            caller = caller and caller.f_back
    return found


@contextmanager
def heeding(word: Path) -> Iterator[None]:
    """Be a worker that ends when a file says so: behind a step within `deferred`, elsewhere at once.

    It ends without an error, which its launcher would answer by starting it again, and says nothing, which
    is the launcher's to do. It ends as well when its launcher is gone.

    Args:
        word: a file that is there; the number of the signal stands in it once there was one.
    """
    done = threading.Event()
    global _state
    _state = _State()
    threading.Thread(target=_heed, args=(word, done), name="stopping", daemon=True).start()
    try:
        with keeping_handlers():
            if threading.current_thread() is threading.main_thread():
                _handle(lambda signum, _: leave_word(word, signum))
            yield
    finally:
        done.set()


def _heed(word: Path, done: threading.Event) -> None:
    parent = os.getppid()
    while not done.wait(POLL_S):
        try:
            signum = found_word(word)
        except FileNotFoundError:  # whoever goes on after a launcher that was killed removes its folder
            os._exit(1)
        except OSError:  # a file system that is away for a moment
            continue
        if os.getppid() != parent:
            os._exit(1)
        if signum is not None:
            wish(signum)
            if (_state.is_deferred or _state.is_agreed) and done.wait(WORKER_S):
                return
            os._exit(0)


def leave_word(word: Path, signum: int) -> None:
    """Tell all that heed this file."""
    word.write_text(str(int(signum)), encoding="utf-8")


def found_word(word: Path) -> int | None:
    """The signal that stands in the file; None while none does.

    It is opened each time, for network file systems look for what is new only then.
    """
    text = word.read_text(encoding="utf-8")
    return int(text) if text else None
