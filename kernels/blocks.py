"""Runs a compiled, GIL-free kernel over blocks of rows, on several threads.

Every kernel of this package writes only the rows it was given, so results do not depend on the number of
threads. Plain threads rather than OpenMP: a process that used them may still fork data loader workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def single_threaded_torch() -> Iterator[int]:
    """torch's operations on one thread each within, for callers that run several at once.

    torch's own threads go on spinning after every operation, in the way of whoever computes next: products
    and scans in turns took twice the CPU time.

    Yields:
        The number of threads to run; torch uses so many again afterwards.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def run_blocks(
    task: Callable[[int, int], Result], rows: int, block: int, threads: int | None = None
) -> list[Result]:
    """Calls `task(begin, end)` for every block of rows and returns the results in the order of the rows.

    Args:
        task: what to do with rows [begin, end); has to release the GIL to run in parallel.
        rows: number of rows in all.
        block: largest number of rows a call gets.
        threads: how many run at once; torch's number of threads unless given.

    Returns:
        One result a block, in order.
    """
    starts = range(0, rows, max(block, 1))
    threads = min(threads or torch.get_num_threads(), len(starts))
    if threads <= 1:
        return [task(begin, min(begin + block, rows)) for begin in starts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda begin: task(begin, min(begin + block, rows)), starts))
