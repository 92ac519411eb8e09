"""What a process says when it waited for the others in vain: who it is, where, and what it waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

# Gloo raises plain RuntimeErrors: that they are about other processes stands in their text alone.
SIGNS = ("gloo", "nccl", "monitoredbarrier", "timed out", "timeout", "connection", "socket")

_places: list[str] = []


class WaitError(RuntimeError):
    """Other processes did not come, or went away: names this process, its host and what it waited for."""


@contextmanager
def waiting(place: str) -> Iterator[None]:
    """Say where, when a collective within it fails because of other processes.

    Args:
        place: what is waited for, "the labels of all"; places nest.

    Raises:
        WaitError: instead of what the collective raised, which is its cause.
    """
    _places.append(place)
    start = time.monotonic()
    try:
        yield
    except WaitError:
        raise
    except RuntimeError as error:
        if not _is_about_others(error):
            raise
        at = ", ".join(_places)
        raise WaitError(
            f"{who()} waited {time.monotonic() - start:.0f} s for the others at '{at}', in vain: {error}. "
            "Look at their logs: one failed or hangs, or its host is out of reach. If it only works for "
            "longer (the first process evaluates for all), raise timeout_s"
        ) from error
    finally:
        _places.pop()


def who() -> str:
    """This process among the others, and its host."""
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
    else:
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return f"process {rank} of {size} on {os.uname().nodename}"


def _is_about_others(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in SIGNS)
