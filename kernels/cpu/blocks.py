"""Runs a compiled, GIL-free kernel over blocks of rows, on several threads.

Every kernel of this package writes only the rows it was given, so results do not depend on the number of
threads. Plain threads rather than OpenMP: a process that used them may still fork data loader workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import torch

from dmx.kernels.progress import counting

Result = TypeVar("Result")
Thing = TypeVar("Thing")


class Workers:
    """Threads kept for many short rounds of work, with torch's own switched off meanwhile.

    torch's threads go on spinning after every operation, in the way of whoever computes next: products and
    scans in turns took twice the CPU time. Within this context torch runs on the calling thread alone, so
    that several of its operations can run side by side.
    """

    def __enter__(self) -> Workers:
        self.count = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.count)
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self.count)

    def each(self, task: Callable[[int], Result], numbers: Iterable[int]) -> list[Result]:
        """Calls `task` with every number, `count` at a time, and returns the results in their order."""
        return list(self.results(task, numbers))

    def results(self, task: Callable[[int], Result], numbers: Iterable[int]) -> Iterator[Result]:
        """As `each`, one after the other as they come."""
        return self._pool.map(task, numbers)


class Spare(Generic[Thing]):
    """Scratch that blocks hand on to one another: as many pieces as run side by side.

    A block that allocates an array as long as there are rows pays for its pages, and so all blocks together
    for the square of the rows. A block gives scratch back as it found it.
    """

    def __init__(self, make: Callable[[], Thing]) -> None:
        self._make = make
        self._free: SimpleQueue[Thing] = SimpleQueue()

    @contextmanager
    def lent(self) -> Iterator[Thing]:
        """A piece for the duration of a block."""
        try:
            thing = self._free.get_nowait()
        except Empty:
            thing = self._make()
        yield thing
        self._free.put(thing)


def run_blocks(
    task: Callable[[int, int], Result], rows: int, block: int, label: str | None = None
) -> list[Result]:
    """Calls `task(begin, end)` for every block of rows and returns the results in the order of the rows.

    Args:
        task: what to do with rows [begin, end); has to release the GIL to run in parallel.
        rows: number of rows in all.
        block: largest number of rows a call gets.
        label: tell of this step by this name (see `dmx.kernels.progress`).

    Returns:
        One result a block, in order. The number of threads is torch's (`torch.set_num_threads`).
    """
    if label is None:
        return list(_results(task, rows, block))
    with counting(rows, label, "rows") as count:
        done = []
        for result in _results(task, rows, block):
            done.append(result)
            count(min(block, rows - block * (len(done) - 1)))
        return done


def _results(task: Callable[[int, int], Result], rows: int, block: int) -> Iterator[Result]:
    starts = range(0, rows, max(block, 1))
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        yield from (task(begin, min(begin + block, rows)) for begin in starts)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda begin: task(begin, min(begin + block, rows)), starts)
