"""Work done ahead in threads, in order, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(
    pool: Executor | None, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[R]:
    """Yield `function(item)` in the order of `items`, at most `ahead` of them begun before they are asked
    for.

    An exception of `function` is raised where its result would have been. When the caller stops early, what
    has not begun is cancelled.

    Args:
        pool: where to work; None works in the caller's thread, when asked.
        function: called once for each item.
        items: read no further than `ahead` beyond what was yielded.
        ahead: at least 1.
    """
    if pool is None:
        yield from map(function, items)
        return
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
