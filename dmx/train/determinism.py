"""The setting `deterministic`: the same bits every time on a GPU, where torch can.

On a CPU a run depends on its seed, the machine and the number of processes and threads, to the bit, with or
without it. On a GPU torch by itself takes the fastest way, and some of these add up in the order in which
threads come. With it such an operation takes another way; one that has no other warns by its name, once, and
goes on. DMX's own kernels need no such way: their atomics count, take minima and hand out places, all in
whole numbers, and what lands in those places is sorted (tests/integration/test_determinism.py names each).

Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Two buffers of fixed size, without which cuBLAS chooses by what is free. Read when a GPU is first used.
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE_SIZES = ":4096:8"


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Take deterministic algorithms within, if they are wanted; what was set before is put back.

    Args:
        wanted: as the setting says. To be entered before anything computes on a GPU.
    """
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    before_cudnn = cudnn.deterministic, cudnn.benchmark
    os.environ.setdefault(WORKSPACE, WORKSPACE_SIZES)
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before_cudnn
