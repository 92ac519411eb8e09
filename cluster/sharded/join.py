"""The Jaccard join of this worker's rows: candidates from inverted lists, distances from whole rows.

The method is that of `kernels/jaccard.py`. A column belongs to the worker that holds the row of its number.

1. How many rows hold a column orders the columns: each worker counts its own rows', the owners add up.
2. Rows are cut into heads and tails; the entries of heads go to the owners of their columns, as lists.
3. A block of rows fetches the lists of its heads: rows j > i that share enough in them are candidates.
4. It fetches the candidates' rows and sums the distances.

Memory: O(entries / W), and a block. Network: the heads once, and for a block its lists and candidates' rows.
"""

from __future__ import annotations

import torch

from dmx.cluster.sharded.fetch import Request, blocks
from dmx.cluster.sharded.group import Group
from dmx.kernels.heads import cut_rows
from dmx.kernels.jaccard import bounds, jaccard_pairs
from dmx.kernels.partial_join import Lists, Pairs, candidates, pair_distances
from dmx.kernels.progress import counting
from dmx.kernels.sparse import SparseRows, join_rows, places_of, starts_of

# Rows of a block: with 100 lists of 50 rows, and 20 candidates of 100 entries each, 300 MB at worst, where no
# two rows share one. Smaller blocks fetch the same lists more often.
BLOCK_ROWS = 8192
_MOST_SORTED = 2**26  # entries


def sharded_jaccard_pairs(group: Group, v: SparseRows, max_distance: float) -> SparseRows:
    """Pairs i < j with d(i, j) <= max_distance, i one of this worker's rows.

    Args:
        group: the workers.
        v: this worker's rows, of `sharded_k_reciprocal`.
        max_distance: as for `dmx.kernels.jaccard.jaccard_pairs`.

    Returns:
        CSR rows (own rows, N), columns ascending.
    """
    if group.size == 1:
        return jaccard_pairs(v, max_distance)
    sizes = v.starts.diff()
    longest = group.most(int(sizes.max()) if len(sizes) else 0, "the longest row")
    tail, enough = bounds(max_distance, longest)
    heads = _heads(group, v, tail)
    lists = _lists(group, heads)
    parts = []
    with counting(group.own, "Jaccard distances", "rows") as count:
        for begin, end in blocks(group, BLOCK_ROWS, "the blocks of the Jaccard join"):
            parts.append(_join(group, v, heads, lists, begin, end, max_distance, enough))
            count(end - begin)
    return join_rows(parts)


def _heads(group: Group, v: SparseRows, tail: int) -> Lists:
    """Heads of this worker's rows."""
    columns, places = torch.unique(v.indices, return_inverse=True)
    counts = _count(group, columns, torch.bincount(places, minlength=len(columns)))
    order = torch.argsort(counts, stable=True)  # rare columns first, ties by number: columns ascend
    rank = torch.empty(len(columns), dtype=torch.int32, device=columns.device)
    rank[order] = torch.arange(len(columns), dtype=torch.int32, device=columns.device)
    cut = cut_rows(SparseRows(v.starts, places.int(), v.values), rank, tail, _MOST_SORTED)
    starts = starts_of(cut.head_sizes)
    entries = places_of(cut.starts[:-1], cut.head_sizes)
    return Lists(starts, columns[order[cut.ranks[entries].long()]], cut.weights[entries])


def _count(group: Group, columns: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """How many of all rows hold each of these columns, from how many of this worker's do."""
    asked = Request.of(group, columns, "columns in use")
    # What a worker asks for is what it has counted: the counts go the way of the question.
    (theirs,) = group.answer([counts], asked.wanted, asked.asked_counts, "counts of columns")
    total = torch.zeros(group.own, dtype=torch.int64, device=counts.device).index_add_(0, asked.asked, theirs)
    return asked.rows(total)[0]


def _lists(group: Group, heads: Lists) -> Lists:
    """Inverted lists over the heads of all rows, of this worker's columns; rows ascend."""
    sizes = heads.starts.diff()
    rows = torch.arange(group.first, group.first + group.own, dtype=torch.int32, device=sizes.device)
    rows = torch.repeat_interleave(rows, sizes, output_size=len(heads.indices))
    columns, order = heads.indices.sort(stable=True)
    edges = torch.tensor(group.bounds[1:-1], dtype=columns.dtype, device=columns.device)
    ends = torch.searchsorted(columns, edges).cpu()
    counts = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(columns))]).diff()
    parts = group.deal([columns, rows[order], heads.weights[order]], counts, "the heads of rows")
    columns, order = parts[0].sort(stable=True)  # workers answer in order: a column's rows ascend
    sizes = torch.bincount(columns.long() - group.first, minlength=group.own)
    return Lists(starts_of(sizes), parts[1][order], parts[2][order])


def _join(
    group: Group, v: SparseRows, heads: Lists, lists: Lists, begin: int, end: int, max_distance: float,
    enough: int,
) -> SparseRows:  # fmt: skip
    """Pairs of rows [begin, end)."""
    own = heads.part(begin, end)
    columns, places = torch.unique(own.indices, return_inverse=True)
    request = Request.of(group, columns, "lists of columns")
    fetched = Lists(*request.sparse(lists.starts, lists.indices, lists.weights))
    mine = Lists(own.starts, places.int(), own.weights)
    found = candidates(mine, fetched, group.first + begin, group.rows, enough)
    others, places = torch.unique(found.others, return_inverse=True)
    theirs = Request.of(group, others, "rows of candidates").sparse_rows(v)
    pairs = Pairs(found.starts, places.int() + (end - begin))
    distances = pair_distances(join_rows([v.part(begin, end), theirs]), pairs, group.rows)
    near = distances <= max_distance
    row = torch.repeat_interleave(
        torch.arange(end - begin, device=near.device), found.starts.diff(), output_size=len(near)
    )
    sizes = torch.bincount(row[near], minlength=end - begin)
    return SparseRows(starts_of(sizes), found.others[near], distances[near])
