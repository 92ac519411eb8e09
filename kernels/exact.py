"""Exact neighbours by float64 products alone, for the few rows whose candidates did not fit.

    kept: the k pairs of row i with the largest (s, -j), s as in `similarity.py`

`_scan_exact` multiplies in float64 on the tensor cores and appends what beats the k-th pair so far, ties
included. Columns come in shuffled rounds, each as many as all before, so about k pairs are new in a round; a
round that overflows is done again with half the columns, and when columns are as few as slots are free, it
fits. So this always ends, whatever the data, and needs no room for an error.

Shapes: features (N, D) of any floating type, squares (N,) float64; ids and steps (R, capacity).
Error: that of `similarity.py`. Time: R N D multiply-adds in float64. Memory: 12 capacity bytes a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmx.kernels.device import on
from dmx.kernels.rescore import Best, Side, select
from dmx.kernels.similarity import on_grid

CAPACITY = 256  # slots of a row: 64 neighbours and two rounds of newcomers
_TILE = 64  # rows and columns of the float64 product
_DEPTH = 32
_NOTHING = -(2**50)  # steps below any similarity


@triton.jit(do_not_specialize=["count", "begin", "end", "k"])
def _scan_exact(  # type: ignore[no-untyped-def]
    queries, query_squares, features, squares, rows, columns, ids, steps, counts, count, begin, end, k, D,
    OWN: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = begin + tl.program_id(0) * TILE + tl.arange(0, TILE)
    i = tl.load(rows + row, mask=row < count, other=0).to(tl.int64)
    j = tl.load(columns + column, mask=column < end, other=0).to(tl.int64)
    product = tl.zeros([TILE, TILE], tl.float64)
    for left in range(0, D, DEPTH):
        c = left + tl.arange(0, DEPTH)
        x = tl.load(queries + i[:, None] * D + c[None, :], mask=(c < D)[None, :], other=0.0)
        y = tl.load(features + j[None, :] * D + c[:, None], mask=(c < D)[:, None], other=0.0)
        # The sums over one element change nothing; without them Triton 3.6 takes half precision for the
        # operands' width and fails.
        x = tl.sum(x.to(tl.float64)[:, :, None], 2)
        y = tl.sum(y.to(tl.float64)[:, :, None], 2)
        product = tl.dot(x, y, product, out_dtype=tl.float64)
    s = on_grid(product, tl.load(query_squares + i)[:, None], tl.load(squares + j)[None, :])
    # The first k slots hold the best so far, in order; newcomers have to beat the last of them.
    last = row.to(tl.int64) * CAPACITY + k - 1
    worst = tl.load(steps + last, mask=row < count, other=0x4000000000000000)[:, None]
    worst_id = tl.load(ids + last, mask=row < count, other=-1)[:, None]
    hit = (s > worst) | ((s == worst) & (j.to(tl.int32)[None, :] < worst_id))
    hit = hit & (row < count)[:, None] & (column < end)[None, :]
    if OWN:
        hit = hit & (i[:, None] != j[None, :])
    # One newcomer a row and turn, as in `candidates.py`; here turns are few.
    at = tl.min(tl.where(hit, column[None, :], 0x7FFFFFFF), 1)
    while tl.min(at, 0) < 0x7FFFFFFF:
        active = at < 0x7FFFFFFF
        found = tl.sum(tl.where(column[None, :] == at[:, None], s, 0), 1)
        slot = tl.atomic_add(counts + row, 1, mask=active, sem="relaxed")
        place = row.to(tl.int64) * CAPACITY + slot
        fits = active & (slot < CAPACITY)
        tl.store(ids + place, tl.load(columns + at, mask=active, other=0), mask=fits)
        tl.store(steps + place, found, mask=fits)
        at = tl.min(tl.where(hit & (column[None, :] > at[:, None]), column[None, :], 0x7FFFFFFF), 1)


def search(queries: Side, others: Side, rows: torch.Tensor, columns: torch.Tensor, k: int, own: bool) -> Best:
    """The k best of all columns for some rows, by exact similarities alone.

    Args:
        queries, others: the two sides.
        rows: (R,) int32, queries sought for; columns: (M,) int32, shuffled rows of the others, M >= k (k + 1
            if own).
        k: 1 to 64.
        own: queries are the features, and nobody is his own neighbour.

    Returns:
        Best (R, k).
    """
    count, device = len(rows), rows.device
    found = Best(
        torch.full((count, CAPACITY), -1, dtype=torch.int32, device=device),
        torch.full((count, CAPACITY), _NOTHING, dtype=torch.int64, device=device),
    )
    every = torch.arange(count, dtype=torch.int32, device=device)
    done, more = 0, CAPACITY - k
    while done < len(columns):
        end = min(done + more, len(columns))
        counts = torch.full((count,), k, dtype=torch.int32, device=device)
        grid = (triton.cdiv(end - done, _TILE), triton.cdiv(count, _TILE))
        with on(rows):
            _scan_exact[grid](
                queries.features, queries.squares, others.features, others.squares, rows, columns,
                found.ids, found.steps, counts, count, done, end, k, others.features.shape[1],
                OWN=own, CAPACITY=CAPACITY, TILE=_TILE, DEPTH=_DEPTH, num_warps=8,
            )  # fmt: skip
        if int(counts.max()) > CAPACITY:
            more = max((end - done) // 2, CAPACITY - k)
            continue
        select(found, counts, every, found, k)
        done, more = end, end
    return Best(found.ids[:, :k], found.steps[:, :k])
