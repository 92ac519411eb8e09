"""The group of processes that work on one task: set up, told apart, and their few collectives.

The same worker runs under Ray Train (which has set the group up already), under torchrun (which describes
it in the environment) and alone. Symbols: W processes, B images a process, D feature width.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dmx.config import Config
from dmx.cores import cores
from dmx.waiting import waiting, who

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of its task.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes, W.
        local_rank: number of this process on its host.
        local_size: processes on this host.
        device: where this process computes.
        timeout_s: how long a collective waits for the other processes.
        control: a gloo group for small messages between hosts; None when alone.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    timeout_s: float = Config.timeout_s
    control: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


@contextmanager
def world(timeout_s: float = Config.timeout_s, local: tuple[int, int] | None = None) -> Iterator[World]:
    """Join the group of processes, and leave it at the end if it was made here.

    Args:
        timeout_s: how long a collective waits for the other processes, in seconds.
        local: (local rank, processes on this host) where the environment does not tell, as in Ray Train.

    Yields:
        This process's place. An error that passes through gets a note with the rank, so that the log of
        many processes tells which one failed.

    Raises:
        WaitError: the others do not come within the timeout.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    made_here = not dist.is_initialized()
    if made_here:
        with waiting("the start of all processes"):
            _join(os.environ, timeout)
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank, local_size = local or (
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", size)),
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    with waiting("the group for small messages"):
        control = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
    place = World(rank, size, local_rank, local_size, device, timeout_s, control)
    try:
        yield place
    except Exception as error:
        error.add_note(f"in {who()}")
        raise
    finally:
        if made_here:
            dist.destroy_process_group()


def _join(environment: Mapping[str, str], timeout: datetime.timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "WORLD_SIZE" in environment:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]  # not in the stubs


def use_cores(world: World) -> int:
    """Share this host's cores among its processes; returns the threads of this one.

    OMP_NUM_THREADS has the last word where it is set. To be called again after whatever runs Numba code in
    parallel: its pool changes the number for the whole process, and with it the rounding of sums.
    """
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", own_cores(world))))
    torch.set_num_threads(threads)
    return threads


def own_cores(world: World) -> int:
    """This process's share of the cores that its host gives to training, at least one."""
    return max(1, cores() // world.local_size)


def meet(world: World, place: str) -> None:
    """Wait until every process has come this far.

    Raises:
        WaitError: naming the place and the processes that did not come within the timeout.
    """
    if world.size > 1:
        timeout = datetime.timedelta(seconds=world.timeout_s)
        with waiting(place):
            dist.monitored_barrier(world.control, timeout=timeout, wait_all_ranks=True)


def share(world: World, value: T) -> T:
    """The first process's `value`, given to all; small ones only.

    It goes as JSON, which nobody unpickles: whoever reaches the group's ports could send another.

    Args:
        world: this process among the others.
        value: what comes out of JSON as it went in: None, text, numbers (NaN and infinities, too), lists, and
            dicts whose keys are text.

    Raises:
        TypeError: on the first process, when the value is none of these.
    """
    if world.size == 1:
        return value
    if world.leads and not _fits_json(value):
        raise TypeError(f"to share: wanted what JSON holds, found {value!r:.200}")
    packed = bytearray(json.dumps(value).encode() if world.leads else b"")
    with waiting("what the first process shares"):
        length = torch.tensor(len(packed))
        dist.broadcast(length, src=0, group=world.control)
        packed = packed or bytearray(int(length))
        dist.broadcast(torch.frombuffer(packed, dtype=torch.uint8), src=0, group=world.control)
    shared: T = json.loads(packed)
    return shared


def _fits_json(value: object) -> bool:
    """Whether JSON changes nothing about it: it would make lists of tuples, and text of all keys."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_fits_json, value.values()))
    if isinstance(value, list):
        return all(map(_fits_json, value))
    return value is None or isinstance(value, str | int | float)


def collect(world: World, part: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """All processes' CPU tensors of `counts` rows, one below the other, on the first process.

    Args:
        part: (counts[rank], ...), any dtype.
        counts: rows of each process.

    Returns:
        (sum of counts, ...); (0, ...) on the other processes, which need not hold what all have together.
    """
    if world.size == 1:
        return part
    largest = max(counts)
    padded = part.new_zeros((largest, *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in counts] if world.leads else None
    with waiting("the rows of all, collected on the first process"):
        dist.gather(padded, parts, dst=0, group=world.control)
    if parts is None:
        return part[:0].clone()
    return torch.cat([rows[:count] for rows, count in zip(parts, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all processes (each used every row)."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(rows)
        gathered = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
        with waiting("the rows of all"):
            dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        # A copy: autograd may hand the same tensor to others.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        with waiting("the gradients of all"):
            dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Every process's rows, in order of rank, differentiable.

    Args:
        rows: (B, ...), the same B on every process.

    Returns:
        (W B, ...). Its gradient is summed over the processes, so a loss that averages over them (as the
        engines do) comes out as on one process with the whole batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)  # type: ignore[no-any-return]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(rows: torch.Tensor, factor: float) -> torch.Tensor:
    """`rows` unchanged; their gradient times `factor`."""
    return rows if factor == 1 else _ScaleGradient.apply(rows, factor)
