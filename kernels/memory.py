"""Memory is planned before it is taken: how much a call needs, how many passes, or an error with the number.

Every operation has a function that returns a `Plan` from shapes alone, without touching a device; the
operation itself asks for it with the bytes that are free. Torch's own cache counts as free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SHARE = 0.9  # of what is free: the rest is for fragments and for sorts


@dataclass(frozen=True)
class Plan:
    """What a call takes on the device beside its arguments.

    Attributes:
        fixed_bytes: taken whatever the passes: results and what every pass reads.
        pass_bytes: taken by one pass on top.
        rows_per_pass: rows a pass handles.
        passes: how many there are.
    """

    fixed_bytes: int
    pass_bytes: int
    rows_per_pass: int
    passes: int

    @property
    def peak_bytes(self) -> int:
        """The most that is held at a time."""
        return self.fixed_bytes + self.pass_bytes


class NotEnoughMemory(MemoryError):  # noqa: N818 - MemoryError says it is one
    """Not even one pass fits on the device."""


def split(
    operation: str, rows: int, fixed_bytes: int, bytes_per_row: int, free_bytes: int | None,
    least_rows: int = 1, most_rows: int | None = None,
) -> Plan:  # fmt: skip
    """The fewest equal passes over `rows` that fit into `free_bytes`.

    Args:
        operation: its name, for the error.
        rows: rows in all, at least 1.
        fixed_bytes, bytes_per_row: what is needed whatever the passes, and for a row of a pass.
        free_bytes: what the device has left; None for as much as is wanted.
        least_rows: rows a pass has at least; passes are multiples of it.
        most_rows: rows a pass has at most, where more would gain nothing.

    Raises:
        NotEnoughMemory: a pass of `least_rows` does not fit.
    """
    most = rows if most_rows is None else min(rows, most_rows)
    if free_bytes is not None:
        room = int(_SHARE * free_bytes) - fixed_bytes
        smallest = min(least_rows, rows)
        if room < smallest * bytes_per_row:
            needed = int((fixed_bytes + smallest * bytes_per_row) / _SHARE) + 1
            raise NotEnoughMemory(
                f"{operation}: wanted {needed / 2**30:.2f} GiB of free device memory for the smallest pass "
                f"({smallest} of {rows} rows), found {free_bytes / 2**30:.2f} GiB; free some, use a larger "
                f'device, or device="cpu"'
            )
        most = min(most, room // max(bytes_per_row, 1))
    if most < rows:
        most = max(most // least_rows, 1) * least_rows
    even = -(-rows // -(-rows // most))
    size = min(-(-even // least_rows) * least_rows, rows)
    return Plan(fixed_bytes, size * bytes_per_row, size, -(-rows // size))


def require(what: str, needed_bytes: int, free_bytes: int | None) -> None:
    """Asks for memory that passes do not help with; None for free is as much as is wanted.

    Raises:
        NotEnoughMemory: it does not fit.
    """
    if free_bytes is not None and needed_bytes > int(_SHARE * free_bytes):
        raise NotEnoughMemory(
            f"{what}: wanted {needed_bytes / _SHARE / 2**30:.2f} GiB of free device memory, found "
            f'{free_bytes / 2**30:.2f} GiB; free some, use a larger device, or device="cpu"'
        )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated there; None on the CPU, where nothing is planned."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached
