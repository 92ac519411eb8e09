"""Query expansion: every sparse row becomes the mean of the rows of its nearest neighbours.

    V(i) <- mean of V(j) over the first k2 columns j of knn(i)

Method: every column of the k2 rows is looked up in the others by binary search, and written where it occurs
first. No atomics: results do not depend on the schedule. On the CPU rows are added up in an array of N.

Shapes: lists (R, k2); V CSR, any number of rows; result CSR of R rows, columns ascending on a GPU.
Memory: the result, and as much as its longest rows for a pass of at most 2^18 rows.
Time: O(R k2^2 K log K) look-ups in rows just gathered.
Source: Zhong et al., CVPR 2017, section 3.4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmx.kernels.cpu import k_reciprocal as cpu
from dmx.kernels.device import on, takes_triton
from dmx.kernels.memory import free_bytes, split
from dmx.kernels.sparse import SparseRows, empty_rows, put_in_order

ENTRY_BYTES = 12  # of a sparse row: int32 column, float64 value
MOST_ROWS = 2**18  # a pass: 60 waves of one-warp programs on an H100; more would only hold more scratch
LEAST_ROWS = 16  # passes are multiples of it, so that what they begin with is aligned and nothing recompiles

# The usual k2 = 6 rows are one group, their 180 or so entries three blocks. 4 values a thread, because a
# look-up holds 64-bit addresses. Left alone, the compiler spills 8 bytes to get by with 8 registers fewer.
_LIST_GROUP, _ENTRY_BLOCK, _AVERAGE_WARPS, _AVERAGE_REGISTERS = 8, 64, 4, 80


def expand_reference(v: torch.Tensor, lists: torch.Tensor) -> torch.Tensor:
    """The formula, dense: rows (U, N) and lists (R, k2) -> (R, N)."""
    return v[lists.long()].mean(1)


@triton.jit
def _rows(lists, starts, first, LISTS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of V of list entries first + [0, GROUP): number, start, size (0 beyond LISTS), each (GROUP, 1)."""
    c = first + tl.arange(0, GROUP)[:, None]
    j = tl.load(lists + c, mask=c < LISTS, other=0).to(tl.int64)
    start = tl.load(starts + j)
    return c, start, tl.where(c < LISTS, (tl.load(starts + j + 1) - start).to(tl.int32), 0)


@triton.jit
def _average(  # type: ignore[no-untyped-def]
    lists, starts, columns, values, begin, to_starts, to_columns, to_values, counts,
    LISTS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """The union of the rows of a list: its size or, if FILL, its columns with the sums of their values.

    Every column is looked up in the other rows, GROUP of them at once, and written where it occurs first. How
    much room is needed shows when all rows are counted, so this runs twice.
    """
    row = tl.program_id(0).to(tl.int64)
    lists += (begin + row) * LISTS
    entries, used = 0, 0
    for group in range(0, LISTS, GROUP):
        _, _, sizes = _rows(lists, starts, group, LISTS, GROUP)
        entries += tl.sum(tl.sum(sizes, 1), 0)
    for first in range(0, entries, BLOCK):  # of the rows as if written one after the other
        at = first + tl.arange(0, BLOCK)
        live = at < entries
        own, before = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        passed = 0
        for group in range(0, LISTS, GROUP):
            _, _, sizes = _rows(lists, starts, group, LISTS, GROUP)
            past = passed + tl.cumsum(sizes, 0) <= at[None, :]
            own += tl.sum(past.to(tl.int32), 0)
            before += tl.sum(tl.where(past, sizes, 0), 0)
            passed += tl.sum(tl.sum(sizes, 1), 0)
        own_start = tl.load(starts + tl.load(lists + own, mask=live, other=0).to(tl.int64))
        wanted = tl.load(columns + own_start + (at - before), mask=live, other=-1)
        earlier = tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], tl.float64)
        for group in range(0, LISTS, GROUP):
            other, start, left = _rows(lists, starts, group, LISTS, GROUP)
            mask = live[None, :] & (other < (LISTS if FILL else own[None, :]))
            offset = tl.zeros([GROUP, BLOCK], tl.int32)
            longest = tl.max(tl.max(left, 1), 0)
            while longest > 1:  # the last column <= wanted lies in [offset, offset + left), if there is one
                middle = offset + left // 2
                column = tl.load(columns + start + middle, mask=mask, other=0)
                offset = tl.where(column <= wanted[None, :], middle, offset)
                left -= left // 2
                longest -= longest // 2
            found = mask & (tl.load(columns + start + offset, mask=mask, other=-1) == wanted[None, :])
            earlier += tl.sum((found & (other < own[None, :])).to(tl.int32), 0)
            if FILL:
                total += tl.sum(tl.load(values + start + offset, mask=found, other=0.0), 0)
        new = ((earlier == 0) & live).to(tl.int32)
        if FILL:
            slot = tl.load(to_starts + row) + used + tl.cumsum(new, 0) - new
            tl.store(to_columns + slot, wanted, mask=new == 1)
            tl.store(to_values + slot, total, mask=new == 1)
        used += tl.sum(new, 0)
    if not FILL:
        tl.store(counts + row, used)


def expand(v: SparseRows, lists: torch.Tensor, columns: int) -> SparseRows:
    """Means of the rows in each list.

    Args:
        v: rows that sum to 1, on the lists' device; columns ascending on a GPU.
        lists: (R, k2) int32, rows of `v`, contiguous.
        columns: how many columns there are.

    Raises:
        NotEnoughMemory: not even 16 rows at a time fit on the device.
    """
    if not takes_triton(v.values):
        return SparseRows.of(cpu.expand(lists.numpy(), v.on_cpu(), columns))
    n, near = lists.shape
    sizes = torch.empty(n, dtype=torch.int32, device=lists.device)
    if n == 0:
        return empty_rows(sizes)
    settings = {"LISTS": near, "GROUP": _LIST_GROUP, "BLOCK": _ENTRY_BLOCK,
                "num_warps": _AVERAGE_WARPS, "maxnreg": _AVERAGE_REGISTERS}  # fmt: skip
    with on(lists):
        _average[(n,)](
            lists, v.starts, v.indices, v.values, 0, None, None, None, sizes, FILL=False, **settings
        )
        entries, longest = int(sizes.sum()), int(sizes.max())
        plan = split("k_reciprocal", n, 8 * n + ENTRY_BYTES * entries, 8 + ENTRY_BYTES * longest,
                     free_bytes(lists.device), LEAST_ROWS, MOST_ROWS)  # fmt: skip
        out = empty_rows(sizes)
        for begin in range(0, n, plan.rows_per_pass):
            end = min(begin + plan.rows_per_pass, n)
            part = empty_rows(sizes[begin:end])
            _average[(end - begin,)](lists, v.starts, v.indices, v.values, begin, part.starts, part.indices,
                                     part.values, None, FILL=True, **settings)  # fmt: skip
            put_in_order(part.indices, part.values, part.starts, sizes[begin:end], out, begin)
    return out
