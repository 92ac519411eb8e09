"""k-reciprocal encoding and query expansion of this worker's rows, with the rows of others that they need.

A block of rows at a time: what is needed of the others is fetched, numbered anew from 0, and handed to the
kernels that do the same for all rows at once (`kernels/k_reciprocal.py`, `kernels/expansion.py`). Nothing in
them depends on how rows are numbered, so the results are the same bit by bit.

A row needs the lists of its K neighbours and who is mutual in their half lists; the features of those few
members that no list of its own has; and, for the expansion, the encodings of k2 neighbours.

Memory: O(N K / W) for V, and a block. Network: at most K lists of K numbers a row, less what rows share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmx.cluster.sharded.fetch import Request, blocks
from dmx.cluster.sharded.group import Group
from dmx.kernels.expansion import expand
from dmx.kernels.k_reciprocal import Members, Mutual, k_reciprocal, members, mutual, sum_to_one, weigh
from dmx.kernels.knn import Neighbours
from dmx.kernels.sparse import SparseRows, join_rows

# Rows of a block: its lists of lists, at most 8 K^2 bytes a row, stay below 60 MB for K = 30.
BLOCK_ROWS = 8192


def sharded_k_reciprocal(
    group: Group, features: torch.Tensor, squares: torch.Tensor, neighbours: Neighbours, k1: int, k2: int
) -> SparseRows:
    """V of this worker's rows.

    Args:
        group: the workers.
        features: (own rows, D), contiguous; squares: (own rows,) float64.
        neighbours: of `sharded_knn`.
        k1, k2: as for `dmx.kernels.k_reciprocal.k_reciprocal`.

    Returns:
        CSR rows (own rows, N), columns numbered among all N rows.
    """
    if group.size == 1:
        return k_reciprocal(features, neighbours, k1, k2, squares=squares)
    lists = neighbours.indices
    reciprocal = _mutual(group, lists, k1)
    parts = []
    for begin, end in blocks(group, BLOCK_ROWS, "the blocks of the encoding"):
        local = _Neighbourhood.of(group, lists, begin, end, reciprocal)
        similarities = neighbours.similarities[begin:end].contiguous()
        rows = members(local.lists, similarities, local.reciprocal, k1, 0, end - begin, len(local.names))
        _weigh(group, rows, local.names, features, squares, begin)
        parts.append(sum_to_one(rows.renamed(local.names)))
    v = join_rows(parts)
    near = min(k2, lists.shape[1])
    return v if near == 1 else _expand(group, v, lists[:, :near])


def _mutual(group: Group, lists: torch.Tensor, k1: int) -> Mutual:
    """Reciprocity of this worker's rows."""
    parts = []
    for begin, end in blocks(group, BLOCK_ROWS, "the blocks of reciprocity"):
        local = _Neighbourhood.of(group, lists, begin, end, None)
        parts.append(mutual(local.lists, k1, end - begin))
    return Mutual(torch.cat([part.full for part in parts]), torch.cat([part.half for part in parts]))


@dataclass(frozen=True)
class _Neighbourhood:
    """A block of rows and their neighbours, numbered anew: the block first, then the others.

    Attributes:
        lists: (U, K) int32, lists of all of them; who is in such a list alone has a number from U on.
        names: (E,) int32, numbers among all N rows.
        reciprocal: of the block the full, of all U the half lists, where it was given.
    """

    lists: torch.Tensor
    names: torch.Tensor
    reciprocal: Mutual

    @staticmethod
    def of(
        group: Group, lists: torch.Tensor, begin: int, end: int, reciprocal: Mutual | None
    ) -> _Neighbourhood:
        """Rows [begin, end) of this worker's `lists`."""
        first = group.first
        block = torch.arange(first + begin, first + end, dtype=torch.int32, device=lists.device)
        named = torch.unique(lists[begin:end])
        others = named[(named < first + begin) | (named >= first + end)]
        request = Request.of(group, others, "lists of neighbours")
        tables = (lists,) if reciprocal is None else (lists, reciprocal.half)
        fetched = request.rows(*tables)
        whole = torch.cat([lists[begin:end], fetched[0]])
        known = torch.cat([block, others])
        names, numbered = _renumbered(whole, known)
        if reciprocal is None:
            return _Neighbourhood(numbered, names, Mutual(whole[:0], whole[:0]))
        half = torch.cat([reciprocal.half[begin:end], fetched[1]])
        return _Neighbourhood(numbered, names, Mutual(reciprocal.full[begin:end].contiguous(), half))


def _renumbered(entries: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries numbered from 0, those in `first` in its order; and what the numbers stand for."""
    found = torch.unique(entries)
    order = torch.argsort(first)
    place = torch.searchsorted(first[order], found).clamp(max=max(len(first) - 1, 0))
    is_first = first[order][place] == found if len(first) else torch.zeros_like(found, dtype=torch.bool)
    names = torch.cat([first, found[~is_first]])
    ascending = torch.argsort(names)
    numbers = ascending[torch.searchsorted(names[ascending], entries)]
    return names, numbers.int()


def _weigh(
    group: Group,
    rows: Members,
    names: torch.Tensor,
    features: torch.Tensor,
    squares: torch.Tensor,
    begin: int,
) -> None:
    """Weights of members that are no neighbours, from their features."""
    places = rows.places()
    ids = rows.ids[places]
    unknown = ids[rows.weights[places] == 0]
    needed = torch.unique(names[unknown.long()])
    request = Request.of(group, needed, "features of members that are no neighbours")
    fetched, fetched_squares = request.rows(features, squares)
    count = len(rows.sizes)
    # Where in the table below each name's features stand; of the others nobody asks.
    table = torch.zeros(len(names), dtype=torch.int32, device=names.device)
    wanted = torch.unique(unknown).long()
    table[wanted] = (torch.searchsorted(needed, names[wanted]) + count).int()
    weigh(
        rows.renamed(table),
        torch.cat([features[begin : begin + count], fetched]),
        torch.cat([squares[begin : begin + count], fetched_squares]),
        0,
    )


def _expand(group: Group, v: SparseRows, lists: torch.Tensor) -> SparseRows:
    parts = []
    for begin, end in blocks(group, BLOCK_ROWS, "the blocks of query expansion"):
        near = lists[begin:end]
        needed = torch.unique(near)
        rows = Request.of(group, needed, "encodings of neighbours").sparse_rows(v)
        parts.append(expand(rows, torch.searchsorted(needed, near.contiguous()).int(), group.rows))
    return join_rows(parts)
