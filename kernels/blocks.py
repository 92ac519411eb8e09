"""Runs a compiled, GIL-free kernel over blocks of rows, on several threads.

Every kernel of this package writes only the rows it was given, so results do not depend on the number of
threads. Plain threads rather than OpenMP: a process that used them may still fork data loader workers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def run_blocks(task: Callable[[int, int], Result], rows: int, block: int) -> list[Result]:
    """Calls `task(begin, end)` for every block of rows and returns the results in the order of the rows.

    Args:
        task: what to do with rows [begin, end); has to release the GIL to run in parallel.
        rows: number of rows in all.
        block: largest number of rows a call gets.

    Returns:
        One result a block, in order. The number of threads is torch's (`torch.set_num_threads`).
    """
    starts = range(0, rows, max(block, 1))
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        return [task(begin, min(begin + block, rows)) for begin in starts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda begin: task(begin, min(begin + block, rows)), starts))
