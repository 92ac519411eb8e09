"""Sparse rows cut into heads and tails, with an inverted index over the heads: what the Jaccard join walks.

    rank(e) : place of column e by the number of rows that hold it, rare columns first, ties by number
    w(v)    = floor(2^14 v) + 1 > 2^14 v                             a value in whole numbers, at least 1
    tail(i) : as many entries of row i, from the highest rank down, as have w of at most T together
    head(i) : the others

Sums of w are exact in any order and never below what they stand for.

Shapes: V (N, N) CSR, values from 0 to 1. Time: two sorts of the entries. Memory: 20 bytes an entry, 64 a row,
and 80 for an entry of the rows that are being sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dmx.kernels.sparse import SparseRows, starts_of

WHOLE = 2**14  # w(1) fits int16
ENTRY_BYTES = 4 + 2 + 4 + 2 + 8  # ranks, weights; lists, their weights, places in them
ROW_BYTES = 8 * 8  # starts, counts and ranks
SORT_BYTES = 80  # keys and order before and after, rows, running sums, what the sort itself takes


@dataclass(frozen=True)
class Heads:
    """Columns are ranks here.

    Attributes:
        starts: (N + 1,) int64.
        ranks: (entries,) int32, ascending in every row; weights: (entries,) int16, w of the values.
        head_starts: (N + 1,) int64; head(i) is the first head_starts[i + 1] - head_starts[i] entries of row
        i. list_starts: (N + 1,) int64, the heads by rank. list_rows: (head entries,) int32, ascending in
        every list. list_weights: (head entries,) int16. after: (head entries,) int64, by rows: where in its
        list the row that follows stands. longest: entries of the longest row.
    """

    starts: torch.Tensor
    ranks: torch.Tensor
    weights: torch.Tensor
    head_starts: torch.Tensor
    list_starts: torch.Tensor
    list_rows: torch.Tensor
    list_weights: torch.Tensor
    after: torch.Tensor
    longest: int


@dataclass(frozen=True)
class Cut:
    """Rows in the order of their ranks, and where their heads end.

    Attributes:
        starts: (N + 1,) int64.
        ranks: (entries,) int32, ascending in every row; weights: (entries,) int16.
        head_sizes: (N,) int64.
    """

    starts: torch.Tensor
    ranks: torch.Tensor
    weights: torch.Tensor
    head_sizes: torch.Tensor


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


def cut_rows(v: SparseRows, rank: torch.Tensor, tail: int, most: int) -> Cut:
    """Sorts the rows by rank and cuts off their tails.

    Args:
        v: rows as of `k_reciprocal`; columns in any order.
        rank: (columns,) int32, place of every column.
        tail: T.
        most: entries sorted at a time.
    """
    ranks, weights = torch.empty_like(v.indices), torch.empty_like(v.indices, dtype=torch.int16)
    head_sizes = torch.zeros_like(v.starts[1:])
    for begin, end in groups(v.starts, most):
        first, last = int(v.starts[begin]), int(v.starts[end])
        if first == last:
            continue
        part = slice(first, last)
        row = _rows_of(v.starts[begin : end + 1].diff(), last - first)
        keys, order = ((row << 32) | rank.index_select(0, v.indices[part])).sort()
        ranks[part] = keys & 0xFFFFFFFF
        weights[part] = (v.values[part].index_select(0, order) * WHOLE).to(torch.int16) + 1
        del keys, order
        upto = weights[part].cumsum(0)  # int64
        all_of_row = upto[v.starts[begin + 1 : end + 1] - first - 1][row]
        in_head = all_of_row - upto + weights[part] > tail  # an entry and what follows is too much for a tail
        head_sizes[begin:end] = torch.bincount(row[in_head], minlength=end - begin)
    return Cut(v.starts, ranks, weights, head_sizes)


def find_heads(v: SparseRows, tail: int, most: int) -> Heads:
    """Cuts the rows and lists the heads by rank; arguments as of `cut_rows`."""
    n, longest = len(v), int(v.starts.diff().max())
    cut = cut_rows(v, _rank(v.indices, n, most), tail, most)
    head_starts = starts_of(cut.head_sizes)
    lists = _lists(cut, head_starts, most)
    return Heads(v.starts, cut.ranks, cut.weights, head_starts, *lists, longest)


def _lists(
    cut: Cut, head_starts: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`list_starts`, `list_rows`, `list_weights` and `after`."""
    n, device = len(cut.starts) - 1, cut.starts.device
    count = int(head_starts[-1])
    list_sizes = torch.zeros(n, dtype=torch.int64, device=device)
    for begin, end in groups(head_starts, most):
        entry = _head_entries(cut, head_starts, begin, end)[1]
        list_sizes += torch.bincount(cut.ranks[entry], minlength=n)
    list_starts = starts_of(list_sizes)
    list_rows = torch.empty(count, dtype=torch.int32, device=device)
    list_weights = torch.empty(count, dtype=torch.int16, device=device)
    after = torch.empty(count, dtype=torch.int64, device=device)
    free = list_starts[:-1].clone()  # where the next row of a list goes: groups come in the order of the rows
    for begin, end in groups(head_starts, most):
        first, last = int(head_starts[begin]), int(head_starts[end])
        row, entry = _head_entries(cut, head_starts, begin, end)
        keys, order = ((cut.ranks[entry].long() << 32) | row).sort()
        del row
        column = keys >> 32
        sizes = torch.bincount(column, minlength=n)
        place = torch.arange(last - first, device=device) + (free - starts_of(sizes)[:-1])[column]
        list_rows[place] = (keys & 0xFFFFFFFF).to(torch.int32)
        list_weights[place] = cut.weights[entry[order]]
        after[first + order] = place + 1
        free += sizes
    return list_starts, list_rows, list_weights, after


def _head_entries(
    cut: Cut, head_starts: torch.Tensor, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of every entry of the heads of rows [begin, end), and where it stands among all entries."""
    first, last = int(head_starts[begin]), int(head_starts[end])
    row = _rows_of(head_starts[begin : end + 1].diff(), last - first) + begin
    entry = torch.arange(first, last, device=row.device) + (cut.starts - head_starts)[row]
    return row, entry
