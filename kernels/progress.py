"""How far a long operation has come, told to whoever listens. Nobody has to.

Kernels know of no bars and no logs. Who wants to hear gives a listener, which is called when a step begins
and returns what is told of every part of it that is done:

    with listening(bar):
        self_knn(features, 30)

The listener is of this thread and of what it calls, not of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


class Counter(Protocol):
    """What a listener returns: it is told how many more are done."""

    def update(self, count: int = 1) -> object: ...


Count = Callable[[int], object]
# Total, what is done in a word or two, and what is counted.
Listener = Callable[[int, str, str], AbstractContextManager[Counter]]


@dataclass(frozen=True)
class _Open:
    """A step that is being told of, and the unit of the steps within it that add to it."""

    count: Count
    adds: str | None


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_open: ContextVar[_Open | None] = ContextVar("open", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of the steps within."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def counting(total: int, label: str, unit: str) -> Iterator[Count]:
    """Tell of a step: yields what is called with the number of units that are done.

    Within another step nothing is told, unless that one adds up what its parts count in this unit.
    """
    around = _open.get()
    if around is not None:
        yield around.count if around.adds == unit else _to_nobody
        return
    with _telling(total, label, unit, adds=None) as count:
        yield count


@contextmanager
def adding_up(total: int, label: str, unit: str) -> Iterator[None]:
    """Tell of a step that is done when the steps within have counted `total` units."""
    with _telling(total, label, unit, adds=unit):
        yield


@contextmanager
def _telling(total: int, label: str, unit: str, adds: str | None) -> Iterator[Count]:
    listener = _listener.get()
    if listener is None:
        yield _to_nobody
        return
    with listener(total, label, unit) as counter:
        token = _open.set(_Open(counter.update, adds))
        try:
            yield counter.update
        finally:
            _open.reset(token)


def _to_nobody(count: int) -> None:
    return None
