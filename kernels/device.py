"""Which implementation a tensor takes: Triton on CUDA, numba on the CPU, Triton's interpreter in tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray

_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)


def takes_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on this tensor run as Triton kernels."""
    return tensor.is_cuda or _interpreted.get()


@triton.jit
def _probe() -> None:
    pass


@contextmanager
def interpreted() -> Iterator[None]:
    """Within this context tensors on the CPU take the Triton kernels too, run by Triton's interpreter.

    For tests on machines without a GPU: it is thousands of times slower than numba.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not set when the kernels were imported.
    """
    if isinstance(_probe, triton.JITFunction):
        raise RuntimeError(
            "interpreted: wanted Triton's interpreter, found its compiler; set TRITON_INTERPRET=1 before "
            "dmx.kernels is imported"
        )
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def pad_to_power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`: widths of blocks have to be one."""
    return max(least, int(triton.next_power_of_2(n)))


def as_array(features: torch.Tensor) -> NDArray[Any]:
    """Features as the numba kernels take them: C-contiguous, float64 if they are, else float32."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return np.ascontiguousarray(features.detach().to("cpu", dtype).numpy())


def on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one: Triton launches where torch currently is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
