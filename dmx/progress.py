"""Progress of long steps: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Protocol, Self, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

WORTH_TELLING_S = 1.0
COLUMNS, ROWS = 80, 24  # of a terminal that does not say how large it is
# A job of an hour gets a dozen lines, one of a day one every five minutes.
FIRST_LINE_S, INTERVAL_GROWTH, LONGEST_INTERVAL_S = 10.0, 1.5, 300.0
SI_FROM = 1_000_000
# tqdm's own, but for slow rates, which it turns over into seconds a unit.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
_OPEN_END = "{desc}: {n_fmt}{unit} [{elapsed}, {rate_noinv_fmt}{postfix}]"


class Bar(Protocol):
    """What `progress_bar` returns."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def update(self, count: int = 1) -> object: ...

    def set_postfix_str(self, s: str, refresh: bool = True) -> object: ...


class _Silent:
    """No report at all."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        return None

    def update(self, count: int = 1) -> None:
        return None

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        return None


_silent = False


def silence() -> None:
    """Report nothing in this process from now on: of several that do the same work, one reports."""
    global _silent
    _silent = True


class _Lines:
    """A progress report for logs: lines at growing intervals, and one at the end of what took a while."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self._total, self._label, self._unit = total, label, unit
        self._count = 0
        self._postfix = ""
        self._start = time.monotonic()
        self._pause_s = FIRST_LINE_S
        self._next = self._start + self._pause_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if error is not None or time.monotonic() - self._start >= WORTH_TELLING_S:
            self._print("" if error is None else " (stopped)")

    def update(self, count: int = 1) -> None:
        self._count += count
        if time.monotonic() >= self._next:
            self._print("")
            self._pause_s = min(self._pause_s * INTERVAL_GROWTH, LONGEST_INTERVAL_S)
            self._next = time.monotonic() + self._pause_s

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        self._postfix = f", {s}" if s else ""

    def _print(self, note: str) -> None:
        elapsed_s = time.monotonic() - self._start
        rate = self._count / max(elapsed_s, 1e-9)
        of = "" if self._total is None else f"/{_shown(self._total)}"
        left = ""
        if self._total is not None and 0 < self._count < self._total:
            left = f", {_duration((self._total - self._count) / rate)} left"
        done = f"{_shown(self._count)}{of} {self._unit}, {_duration(elapsed_s)}, {_rate(rate)} {self._unit}/s"
        say(f"{self._label}: {done}{left}{self._postfix}{note}")


def _shown(count: float) -> str:
    """A number as one reads it: 1234, 1.23M, 4.5G."""
    return str(count) if count < SI_FROM else tqdm.format_sizeof(count)


def _rate(rate: float) -> str:
    return f"{rate:.2g}" if rate < 10 else f"{rate:.0f}" if rate < SI_FROM else tqdm.format_sizeof(rate)


def _duration(seconds: float) -> str:
    """3 s, 4 min 05 s, 7 h 12 min."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def progress_bar(total: int | None, label: str, unit: str = "it") -> Bar:
    """Open a progress report.

    Args:
        total: expected number of units, or None when it is not known.
        label: what is being done, in a word or two.
        unit: what is counted, e.g. `images`.

    Returns:
        A context manager whose `update(n)` counts n more units as done, and whose
        `set_postfix_str(text, refresh=False)` adds a remark, such as the loss, to the next report. What takes
        less than a second shows nothing.
    """
    if _silent:
        return _Silent()
    if sys.stderr.isatty():
        large = total is not None and total >= SI_FROM
        bar: Bar = tqdm(
            total=total, desc=label, unit=f" {unit}", unit_scale=large, file=sys.stderr,
            delay=WORTH_TELLING_S, bar_format=_OPEN_END if total is None else _BAR, **_size(sys.stderr),
        )  # fmt: skip
        return bar
    return _Lines(total, label, unit)


def columns_of(stream: TextIO) -> int:
    """How wide the terminal behind a stream is; 0 where nobody knows, as in many containers."""
    known: int = getattr(stream, "columns", 0)  # of what is brought to a terminal elsewhere
    if known:
        return known
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def _size(stream: TextIO) -> dict[str, Any]:
    """tqdm's settings of a terminal's size: followed where it is known, since it may change."""
    columns = columns_of(stream)
    if columns and not hasattr(stream, "columns"):
        return {"dynamic_ncols": True}
    # Where rows are 0 tqdm finds no room for a bar.
    return {"ncols": (columns or COLUMNS) - 1, "nrows": ROWS}


def say(message: str) -> None:
    """Print a line to stderr, above the bars that there are."""
    if not _silent:
        with tqdm.external_write_mode(file=sys.stderr):
            print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[T], *, label: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield `items` and report how far they have got; `total` defaults to their length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(total, label, unit) as bar:
        for item in items:
            yield item
            bar.update(1)
