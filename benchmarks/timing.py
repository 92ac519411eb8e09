"""Inputs and clocks of the GPU benchmark: features drawn on the device, calls timed over rotated inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

REPEATS = 7
SECONDS = 12.0  # a row's timed runs take at most about this long, and are then fewer than REPEATS
ROTATED_BYTES = 2**28  # five times the L2 cache of an H100
MOST_BYTES = 24 * 2**30  # of all rotated inputs together
Result = TypeVar("Result")


def features(n: int, d: int, kind: str, dtype: str, device: torch.device, seed: int) -> torch.Tensor:
    """(n, d) unit rows of `dtype`.

    clustered: as in `cluster_cpu.py`, 16 images an identity on average, some identities tighter than others.
    Their spread is that one for d = 2048; elsewhere it goes with the fourth root of d, which keeps the ratio
    of similarities within identities to those by chance, and with it the counts in `model.py`.
    random: all directions alike, without any structure.
    """
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty((n, d), dtype=getattr(torch, dtype), device=device)
    identities = max(n // 16, 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(count: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=device)

    identity = torch.randint(identities, (n,), generator=generator, device=device)
    spread = (uniform(identities, 1.5, 5.0) * (d / 2048) ** 0.25)[identity] * uniform(n, 0.8, 1.25)
    centres = normal(identities, d) if kind == "clustered" else None
    for begin in range(0, n, 65536):
        part = slice(begin, begin + 65536)
        rows = normal(len(out[part]), d)
        if centres is not None:
            rows = rows * spread[part, None] + centres[identity[part]]
        out[part] = torch.nn.functional.normalize(rows)
    return out


def rotated(n: int, d: int, kind: str, dtype: str, device: torch.device) -> list[torch.Tensor]:
    """2 to 7 tensors, so that no call finds its input in the cache; fewer where they pass MOST_BYTES."""
    size = n * d * (2 if dtype == "bfloat16" else 4)
    count = min(max(2, -(-ROTATED_BYTES // size)), REPEATS, max(1, MOST_BYTES // size))
    return [features(n, d, kind, dtype, device, seed) for seed in range(count)]


def free(device: torch.device) -> None:
    """Gives cached memory back, so that a row does not depend on those before it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """The result and its seconds: between CUDA events, host synchronisations included; wall time on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    result = call()
    after.record()
    after.synchronize()
    return result, before.elapsed_time(after) / 1e3


def measured(
    calls: Sequence[Callable[[], Result]], device: torch.device, seconds: float = SECONDS
) -> tuple[dict[str, Any], list[Result]]:
    """Times the calls in turn.

    Returns:
        Fields of a row: `seconds`, the median; `seconds_all`; `first_call_s`, which compiles and does not
        count; `repeats`, with `repeats_note` when they are fewer than 7; `inputs_rotated`; `peak_bytes` held
        at a time beyond what was held before (None on a CPU). And the last result of every call.
    """
    start = time.perf_counter()
    calls[0]()
    free(device)
    first = time.perf_counter() - start
    held = 0
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    result, once = timed(calls[0], device)
    peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
    repeats = REPEATS if REPEATS * once <= seconds else max(1, int(seconds / once))
    times, results = [once], [result]
    for turn in range(1, max(repeats, len(calls))):
        which = turn % len(calls)
        result, once = timed(calls[which], device)
        times.append(once)
        if which < len(results):
            results[which] = result
        else:
            results.append(result)
    note = None
    if len(times) < REPEATS:
        note = f"{len(times)} runs, as one takes {times[0]:.1f} s"
    row = {
        "seconds": sorted(times)[len(times) // 2], "seconds_all": times, "first_call_s": first,
        "repeats": len(times), "repeats_note": note, "inputs_rotated": len(calls), "peak_bytes": peak,
    }  # fmt: skip
    return row, results


def ceilings(device: torch.device, size: int, copy_bytes: int) -> dict[str, Any]:
    """The two ceilings: a bf16 product (size, size) by (size, size), and a copy of `copy_bytes`.

    Returns:
        `gemm_tflops` (2 size^3 operations) and `copy_tb_s` (bytes read plus bytes written), medians of 21
        runs over 3 inputs, on random data: products of zeros run faster.
    """
    pairs = [[torch.randn(size, size, device=device).bfloat16() for _ in range(2)] for _ in range(3)]
    out = torch.empty(size, size, dtype=torch.bfloat16, device=device)
    sources = [torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_() for _ in range(3)]
    target = torch.empty_like(sources[0])
    gemm, copy = [], []
    start = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - start < 1:  # until clocks are those of long work
        timed(partial(torch.mm, *pairs[0], out=out), device)
    for run in range(24):
        gemm.append(timed(partial(torch.mm, *pairs[run % 3], out=out), device)[1])
    for run in range(24):
        copy.append(timed(partial(target.copy_, sources[run % 3]), device)[1])
    # The first 3 warm up.
    return {
        "gemm_tflops": 2 * size**3 / sorted(gemm[3:])[10] / 1e12, "gemm_size": size,
        "copy_tb_s": 2 * copy_bytes / sorted(copy[3:])[10] / 1e12, "copy_bytes": copy_bytes,
    }  # fmt: skip
