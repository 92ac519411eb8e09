"""Sparse rows cut into heads and tails, with an inverted index over the heads: what the Jaccard join walks.

    rank(e) : place of column e by the number of rows that hold it, rare columns first, ties by number
    w(v)    = floor(2^14 v) + 1 > 2^14 v                             a value in whole numbers, at least 1
    tail(i) : as many entries of row i, from the highest rank down, as have w of at most T together
    head(i) : the others

Sums of w are exact in any order and never below what they stand for.

Shapes: V (N, N) CSR, values from 0 to 1. Time: two sorts of the entries. Memory: 28 bytes an entry, 64 a row,
and 80 for an entry of the rows that are being sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dmx.kernels.sparse import SparseRows, starts_of

WHOLE = 2**14  # w(1) fits int16
ENTRY_BYTES = 4 + 8 + 2 + 4 + 2 + 8  # ranks, values, weights; lists, their weights, places in them
ROW_BYTES = 8 * 8  # starts, counts and ranks
SORT_BYTES = 80  # keys and order before and after, rows, running sums, what the sort itself takes


@dataclass(frozen=True)
class Heads:
    """Columns are ranks here.

    Attributes:
        starts: (N + 1,) int64.
        ranks: (entries,) int32, ascending in every row.
        values: (entries,) float64.
        weights: (entries,) int16, w of the values.
        head_starts: (N + 1,) int64; head(i) is the first head_starts[i + 1] - head_starts[i] entries of row
        i. list_starts: (N + 1,) int64, the heads by rank. list_rows: (head entries,) int32, ascending in
        every list. list_weights: (head entries,) int16. after: (head entries,) int64, by rows: where in its
        list the row that follows stands. longest: entries of the longest row.
    """

    starts: torch.Tensor
    ranks: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor
    head_starts: torch.Tensor
    list_starts: torch.Tensor
    list_rows: torch.Tensor
    list_weights: torch.Tensor
    after: torch.Tensor
    longest: int


def groups(starts: torch.Tensor, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive rows [begin, end) of at most `most` entries in all; a longer row is a group by itself."""
    begin, n = 0, len(starts) - 1
    while begin < n:
        fits = torch.searchsorted(starts, int(starts[begin]) + most, right=True)
        end = max(begin + 1, int(fits) - 1)
        yield begin, end
        begin = end


def _rows_of(sizes: torch.Tensor, total: int) -> torch.Tensor:
    """The row of every entry, (total,) int64."""
    rows = torch.arange(len(sizes), device=sizes.device)
    return torch.repeat_interleave(rows, sizes, output_size=total)


def _rank(indices: torch.Tensor, n: int, most: int) -> torch.Tensor:
    """(N,) int32."""
    counts = torch.zeros(n, dtype=torch.int64, device=indices.device)
    for part in torch.split(indices, most):
        counts += torch.bincount(part, minlength=n)
    rank = torch.empty(n, dtype=torch.int32, device=indices.device)
    rank[counts.argsort(stable=True)] = torch.arange(n, dtype=torch.int32, device=indices.device)
    return rank


def find_heads(v: SparseRows, tail: int, most: int) -> Heads:
    """Sorts the rows by rank, cuts off their tails and lists the heads.

    Args:
        v: rows as of `k_reciprocal`; columns in any order.
        tail: T.
        most: entries sorted at a time.
    """
    n, longest = len(v), int(v.starts.diff().max())
    rank = _rank(v.indices, n, most)
    ranks, values = torch.empty_like(v.indices), torch.empty_like(v.values)
    weights = torch.empty_like(v.indices, dtype=torch.int16)
    head_sizes, list_sizes = torch.zeros_like(v.starts[1:]), torch.zeros_like(v.starts[1:])
    for begin, end in groups(v.starts, most):
        first, last = int(v.starts[begin]), int(v.starts[end])
        if first == last:
            continue
        part = slice(first, last)
        row = _rows_of(v.starts[begin : end + 1].diff(), last - first)
        keys, order = ((row << 32) | rank.index_select(0, v.indices[part])).sort()
        ranks[part] = keys & 0xFFFFFFFF
        values[part] = v.values[part].index_select(0, order)
        weights[part] = (values[part] * WHOLE).to(torch.int16) + 1
        del keys, order
        upto = weights[part].cumsum(0)  # int64
        all_of_row = upto[v.starts[begin + 1 : end + 1] - first - 1][row]
        in_head = all_of_row - upto + weights[part] > tail  # an entry and what follows is too much for a tail
        head_sizes[begin:end] = torch.bincount(row[in_head], minlength=end - begin)
        list_sizes += torch.bincount(ranks[part][in_head], minlength=n)
    del rank
    head_starts, list_starts = starts_of(head_sizes), starts_of(list_sizes)
    lists = _lists(v.starts, ranks, weights, head_starts, list_starts, most)
    return Heads(v.starts, ranks, values, weights, head_starts, list_starts, *lists, longest)


def _lists(
    starts: torch.Tensor, ranks: torch.Tensor, weights: torch.Tensor,
    head_starts: torch.Tensor, list_starts: torch.Tensor, most: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`list_rows`, `list_weights` and `after`."""
    n, device = len(starts) - 1, starts.device
    count = int(head_starts[-1])
    list_rows = torch.empty(count, dtype=torch.int32, device=device)
    list_weights = torch.empty(count, dtype=torch.int16, device=device)
    after = torch.empty(count, dtype=torch.int64, device=device)
    free = list_starts[:-1].clone()  # where the next row of a list goes: groups come in the order of the rows
    for begin, end in groups(head_starts, most):
        first, last = int(head_starts[begin]), int(head_starts[end])
        row = _rows_of(head_starts[begin : end + 1].diff(), last - first) + begin
        entry = torch.arange(first, last, device=device) + (starts - head_starts)[row]
        keys, order = ((ranks[entry].long() << 32) | row).sort()
        del row
        column = keys >> 32
        sizes = torch.bincount(column, minlength=n)
        place = torch.arange(last - first, device=device) + (free - starts_of(sizes)[:-1])[column]
        list_rows[place] = (keys & 0xFFFFFFFF).to(torch.int32)
        list_weights[place] = weights[entry[order]]
        after[first + order] = place + 1
        free += sizes
    return list_rows, list_weights, after
