"""Waiting for a stream of results, but not for ever."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from dmx.errors import DmxError

T = TypeVar("T")
POLL_S = 1.0


def patiently(items: Callable[[], Iterable[T]], timeout_s: float, in_vain: str) -> Iterator[T]:
    """Yield what `items()` yields, one ahead; it runs in a thread, so that waiting has an end.

    Args:
        items: called in the thread; what it raises is raised here.
        timeout_s: the longest time to wait for one item, in seconds.
        in_vain: says what was waited for, and what to do, when nothing came.

    Raises:
        DmxError: no item came in time.
    """
    found: queue.Queue[Any] = queue.Queue(1)
    ended, stop = object(), threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                found.put(item, timeout=POLL_S)
                return

    def pull() -> None:
        try:
            for item in items():
                put(item)
                if stop.is_set():
                    return
            put(ended)
        except BaseException as error:  # for the thread that waits
            put(error)

    threading.Thread(target=pull, name="patiently", daemon=True).start()
    try:
        while True:
            try:
                item = found.get(timeout=timeout_s)
            except queue.Empty:
                raise DmxError(f"waited {timeout_s:.0f} s for {in_vain}") from None
            if item is ended:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
