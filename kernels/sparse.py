"""Sparse rows: what k-reciprocal encoding and the Jaccard join hand on, and rows of them put in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from dmx.kernels.cpu import sparse as cpu
from dmx.kernels.device import takes_triton

_PUT_ROWS = 2**18  # rows that are put back at a time: their places take 16 bytes an entry
_ROW_BLOCK = 32  # entries of a row that are ranked at a time: rows hold about 30 before expansion


@dataclass(frozen=True)
class SparseRows:
    """CSR rows: columns `indices[starts[i]:starts[i + 1]]`, each once, with their `values`.

    Attributes:
        starts: (N + 1,) int64.
        indices: (entries,) int32.
        values: (entries,) float64, on the same device as the others.
    """

    starts: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def part(self, begin: int, end: int) -> SparseRows:
        """Rows [begin, end)."""
        first, last = int(self.starts[begin]), int(self.starts[end])
        starts = self.starts[begin : end + 1] - first
        return SparseRows(starts, self.indices[first:last], self.values[first:last])

    def put_back(self, order: torch.Tensor) -> SparseRows:
        """The same in another order: row i of these becomes row order[i], (N,) int64."""
        if not takes_triton(self.values):
            return SparseRows.of(self.on_cpu().put_back(order.numpy()))
        place = torch.argsort(order)
        sizes, begins = self.starts.diff()[place], self.starts[:-1][place]
        out = empty_rows(sizes)
        for first in range(0, len(order), _PUT_ROWS):
            last = min(first + _PUT_ROWS, len(order))
            entries = places_of(begins[first:last], sizes[first:last])
            to = slice(int(out.starts[first]), int(out.starts[last]))
            out.indices[to], out.values[to] = self.indices[entries], self.values[entries]
        return out

    @property
    def rows(self) -> torch.Tensor:
        """(entries,) int64, the row of every entry."""
        numbers = torch.arange(len(self), device=self.starts.device)
        return torch.repeat_interleave(numbers, self.starts.diff(), output_size=len(self.indices))

    def on_cpu(self) -> cpu.SparseRows:
        """As NumPy arrays; a view where the tensors lie on the CPU already."""
        return cpu.SparseRows(*(part.cpu().numpy() for part in (self.starts, self.indices, self.values)))

    @staticmethod
    def of(rows: cpu.SparseRows) -> SparseRows:
        """From NumPy arrays, without a copy."""
        parts = (rows.starts, rows.indices, rows.values)
        return SparseRows(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def join_rows(parts: Sequence[SparseRows]) -> SparseRows:
    """Blocks of consecutive rows as one."""
    sizes = torch.cat([part.starts.diff() for part in parts])
    return SparseRows(
        starts_of(sizes),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.values for part in parts]),
    )


def together(lists: torch.Tensor) -> torch.Tensor:
    """(N,) int64, an order of rows in which those that share neighbours follow each other.

    Rows of one person have the lowest of their nearer neighbours in common more often than not; the lowest of
    all is often a stranger. Rows that lie as they are visited stream through the caches, and a block of them
    names fewer others.

    Args:
        lists: (N, K) neighbours, the nearest first.
    """
    return torch.argsort(lists[:, : (lists.shape[1] + 1) // 2].min(1).values, stable=True)


def starts_of(sizes: torch.Tensor) -> torch.Tensor:
    """(N,) entries a row -> (N + 1,) int64 starts."""
    starts = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(sizes, 0, out=starts[1:])
    return starts


def places_of(begins: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Where the entries of some rows stand, one row after the other.

    Args:
        begins: (R,) int64, place of the first entry of each; sizes: (R,) of any integer type.

    Returns:
        (entries,) int64.
    """
    ends = sizes.cumsum(0)  # int64
    count = int(ends[-1]) if len(ends) else 0
    places = torch.repeat_interleave(begins - (ends - sizes), sizes, output_size=count)
    return places.add_(torch.arange(count, device=places.device))


def empty_rows(sizes: torch.Tensor) -> SparseRows:
    """Room for rows of these sizes."""
    starts = starts_of(sizes)
    entries = int(starts[-1])
    return SparseRows(
        starts,
        torch.empty(entries, dtype=torch.int32, device=sizes.device),
        torch.empty(entries, dtype=torch.float64, device=sizes.device),
    )


@triton.jit
def _order(columns, values, starts, sizes, to_columns, to_values, to_starts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copies rows of distinct columns so that the columns ascend and the values of a row sum to 1."""
    row = tl.program_id(0).to(tl.int64)
    start, size, to = tl.load(starts + row), tl.load(sizes + row), tl.load(to_starts + row)
    totals = tl.zeros([BLOCK], tl.float64)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        totals += tl.load(values + start + at, mask=at < size, other=0.0)
    total = tl.sum(totals, 0)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        column = tl.load(columns + start + at, mask=at < size, other=-1)
        rank = tl.zeros([BLOCK], tl.int32)
        for second in range(0, size, BLOCK):
            other_at = second + tl.arange(0, BLOCK)
            other = tl.load(columns + start + other_at, mask=other_at < size, other=2147483647)
            rank += tl.sum((other[:, None] < column[None, :]).to(tl.int32), 0)
        value = tl.load(values + start + at, mask=at < size, other=0.0)
        tl.store(to_columns + to + rank, column, mask=at < size)
        tl.store(to_values + to + rank, value / total, mask=at < size)


def put_in_order(
    columns: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor,
    out: SparseRows, begin: int = 0,
) -> None:  # fmt: skip
    """Copies rows of distinct columns to rows `begin` and on of `out`: ascending, and summing to 1.

    Row r is columns[starts[r] : starts[r] + sizes[r]], with its values. For tensors that take Triton.
    """
    _order[(len(sizes),)](columns, values, starts, sizes, out.indices, out.values, out.starts[begin:],
                          BLOCK=_ROW_BLOCK, num_warps=1)  # fmt: skip
