"""Exact similarities of candidates, and the best of them.

    kept: the k pairs of row i with the largest (s, -j), s as in `similarity.py`

`_rescore` takes a row's candidates in the order of their keys and stops when the key of the next, and so of
all others, proves that it cannot reach the worst of the first k: key + constant + 1.01 E (see
`candidates.py`; the 1 % covers the rounding of this sum). `_select` ranks what was rescored by counting who
is ahead of whom: a row has little more than k, and no order of float64 and index fits into a key to sort by.

Shapes: features (N, D) of any floating type, squares (N,) float64; ids (R, capacity) int32 and steps = s 2^44
(R, capacity) int64. Error: that of `similarity.py`. Time: reading little more than k rows of features a row;
rows that share neighbours are visited together, so that these are met in the L2 cache. Memory: 12 capacity
bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dmx.kernels.candidates import ROUNDING, Candidates, ordered
from dmx.kernels.cpu.knn import NOBODY
from dmx.kernels.device import on, pad_to_power_of_two
from dmx.kernels.similarity import GRID, from_grid, on_grid

_RESCORED = 16  # candidates a program multiplies at a time: 16 accumulators a thread
_CHUNK = 8  # candidates that all of a row are compared with at a time


@dataclass(frozen=True)
class Side:
    """Rows on one side of a search.

    Attributes:
        features: (N, D) of any floating type, contiguous; squares: (N,) float64, their squared lengths.
        rows: (M,) int64, which of them take part.
    """

    features: torch.Tensor
    squares: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Best:
    """The best pairs of every row: ids (R, k) int32, and steps = s 2^44 (R, k) int64."""

    ids: torch.Tensor
    steps: torch.Tensor

    @staticmethod
    def empty(rows: int, k: int, device: torch.device) -> Best:
        """Room for k pairs a row."""
        ids = torch.empty((rows, k), dtype=torch.int32, device=device)
        return Best(ids, torch.empty((rows, k), dtype=torch.int64, device=device))

    @staticmethod
    def nobody(rows: int, k: int, device: torch.device) -> Best:
        """Room for k pairs a row, with -1 and `NOBODY` in all places."""
        ids = torch.full((rows, k), -1, dtype=torch.int32, device=device)
        return Best(ids, torch.full((rows, k), int(NOBODY * GRID), dtype=torch.int64, device=device))

    def right_of(self, column: int) -> Best:
        """A view of the columns from `column` on."""
        return Best(self.ids[:, column:], self.steps[:, column:])


@triton.jit
def _rescore(  # type: ignore[no-untyped-def]
    queries, query_squares, features, squares, query_ids, column_ids, visit, packed, counts, constants, base,
    ids, steps, left, D, ROUNDING,
    K: tl.constexpr, CAPACITY: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0).to(tl.int64) * CAPACITY
    row = tl.load(visit + tl.program_id(0)).to(tl.int64)
    count = tl.load(counts + row)
    count = tl.where(count > CAPACITY, 0, count)
    i = tl.load(query_ids + row).to(tl.int64)
    square_i = tl.load(query_squares + i)
    every = tl.arange(0, CAPACITY)
    keys = tl.load(packed + row * CAPACITY + every, mask=every < count, other=0)
    keys = ordered((keys >> 32).to(tl.int32)).to(tl.float32, bitcast=True).to(tl.float64)
    error = tl.load(base + row) + ROUNDING * tl.abs(keys)
    most = keys + tl.load(constants + row) + 1.01 * error
    lowest = tl.full([], 2.0, tl.float64)  # of the first K similarities
    begin = 0
    while begin < count:
        slot = begin + tl.arange(0, MANY)
        held = slot < count
        position = tl.load(packed + row * CAPACITY + slot, mask=held, other=0) & 0xFFFFFFFF
        j = tl.load(column_ids + position, mask=held, other=0).to(tl.int64)
        total = tl.zeros([MANY, BLOCK], tl.float64)
        for first in range(0, D, BLOCK):
            c = first + tl.arange(0, BLOCK)
            x = tl.load(queries + i * D + c, mask=c < D, other=0.0).to(tl.float64)
            inside = held[:, None] & (c < D)[None, :]
            y = tl.load(features + j[:, None] * D + c[None, :], mask=inside, other=0.0).to(tl.float64)
            total += x[None, :] * y
        s = on_grid(tl.sum(total, 1), square_i, tl.load(squares + j, mask=held, other=1.0))
        tl.store(ids + out + slot, j.to(tl.int32), mask=held)
        tl.store(steps + out + slot, s, mask=held)
        lowest = tl.minimum(lowest, tl.min(tl.where(held & (slot < K), from_grid(s), 2.0), 0))
        begin += MANY
        if begin >= K:
            # Keys descend: who cannot reach the worst of the first K stands at the end.
            count = tl.sum(((every < count) & (most >= lowest)).to(tl.int32), 0)
    tl.store(left + tl.program_id(0), count)


@triton.jit(do_not_specialize=["stride"])
def _select(  # type: ignore[no-untyped-def]
    ids, steps, counts, targets, out_ids, out_steps, stride,
    K: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, CAPACITY)
    count = tl.load(counts + row)
    count = tl.where(count <= CAPACITY, count, 0)
    held = slot < count
    identity = tl.load(ids + row * CAPACITY + slot, mask=held, other=0)
    s = tl.load(steps + row * CAPACITY + slot, mask=held, other=0)
    rank = tl.zeros([CAPACITY], tl.int32)
    for begin in range(0, count, CHUNK):
        some = begin + tl.arange(0, CHUNK)
        other = tl.load(ids + row * CAPACITY + some, mask=some < count, other=0)[None, :]
        its = tl.load(steps + row * CAPACITY + some, mask=some < count, other=-0x4000000000000000)[None, :]
        ahead = (its > s[:, None]) | ((its == s[:, None]) & (other < identity[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    tl.debug_barrier()  # `out` may be the buffers: all is read before anything is written
    target = tl.load(targets + row).to(tl.int64) * stride
    tl.store(out_ids + target + rank, identity, mask=held & (rank < K))
    tl.store(out_steps + target + rank, s, mask=held & (rank < K))


def select(found: Best, counts: torch.Tensor, targets: torch.Tensor, out: Best, k: int) -> None:
    """The k best of the first `counts` slots of every row.

    Args:
        found: (R, capacity); counts: (R,) int32. Rows with more than there are slots are left alone.
        targets: (R,) int32, the row of `out` that gets each.
        out: rows of at least k columns; `found` itself will do.
    """
    rows, capacity = found.ids.shape
    with on(found.ids):
        _select[(rows,)](
            found.ids, found.steps, counts, targets, out.ids, out.steps, out.ids.stride(0),
            K=k, CAPACITY=capacity, CHUNK=_CHUNK, num_warps=capacity // 64,
        )  # fmt: skip


def rescore(
    queries: Side, others: Side, found: Candidates, column_ids: torch.Tensor, visit: torch.Tensor, k: int
) -> tuple[Best, torch.Tensor]:
    """Exact similarities of candidates, slot by slot, until none that is left can be among the k best.

    Args:
        found: candidates, best first.
        column_ids: (M,) int32, the row of the other side's features at every position.
        visit: (R,) int32, rows of `found` in the order to go by: those that share neighbours together.

    Returns:
        Best (R, capacity) in the order of `visit`, and counts (R,) int32 of the slots that are filled: 0 for
        rows that were given up.
    """
    rows, capacity, width = len(visit), found.packed.shape[1], others.features.shape[1]
    out = Best.empty(rows, capacity, visit.device)
    left = torch.empty(rows, dtype=torch.int32, device=visit.device)
    with on(visit):
        _rescore[(rows,)](
            queries.features, queries.squares, others.features, others.squares, found.rows, column_ids,
            visit, found.packed, found.counts, found.constants, found.base,
            out.ids, out.steps, left, width, ROUNDING, K=k, CAPACITY=capacity, MANY=_RESCORED,
            BLOCK=min(pad_to_power_of_two(width), 128), num_warps=4,
        )  # fmt: skip
    return out, left
