"""Progress of long steps: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Protocol, Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_INTERVAL_S = 10.0


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
    """A progress report for logs: one line every `LINE_INTERVAL_S` seconds and one at the end."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self._total, self._label, self._unit = total, label, unit
        self._count = 0
        self._postfix = ""
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._print("" if error is None else " (stopped)")

    def update(self, count: int = 1) -> None:
        self._count += count
        if time.monotonic() - self._last >= LINE_INTERVAL_S:
            self._print("")

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        self._postfix = f", {s}" if s else ""

    def _print(self, note: str) -> None:
        self._last = time.monotonic()
        elapsed_s = self._last - self._start
        rate = self._count / max(elapsed_s, 1e-9)
        of = "" if self._total is None else f"/{self._total}"
        left = ""
        if self._total is not None and 0 < self._count < self._total:
            left = f", {(self._total - self._count) / rate:.0f} s left"
        done = f"{self._count}{of} {self._unit}, {elapsed_s:.0f} s, {rate:.1f} {self._unit}/s"
        print(f"{self._label}: {done}{left}{self._postfix}{note}", file=sys.stderr, flush=True)


def progress_bar(total: int | None, label: str, unit: str = "it") -> Bar:
    """Open a progress report.

    Args:
        total: expected number of units, or None when it is not known.
        label: what is being done, in a word or two.
        unit: what is counted, e.g. `images`.

    Returns:
        A context manager whose `update(n)` counts n more units as done, and whose
        `set_postfix_str(text, refresh=False)` adds a remark, such as the loss, to the next report.
    """
    if _silent:
        return _Silent()
    if sys.stderr.isatty():
        return tqdm(total=total, desc=label, unit=f" {unit}", dynamic_ncols=True)
    return _Lines(total, label, unit)


def progress(items: Iterable[T], *, label: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield `items` and report how far they have got; `total` defaults to their length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(total, label, unit) as bar:
        for item in items:
            yield item
            bar.update(1)
