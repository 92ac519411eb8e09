"""k-reciprocal encoding and query expansion of this worker's rows, with the rows of others that they need.

A block of rows at a time: what is needed of the others is fetched, and handed with the places where it stands
to the kernels that do the same for all rows at once (`kernels/k_reciprocal.py`, `kernels/expansion.py`).

A row needs the lists of its K neighbours and who is mutual in their half lists; the features of those few
members that no list of its own has; and, for the expansion, the encodings of k2 neighbours.

Memory: O(N K / W) for V, and a block; on the CPU 4 N bytes a thread for members, 8 N for the expansion.
Network: at most K lists of K numbers a row, less what rows share.
"""

from __future__ import annotations

import torch

from dmx.cluster.sharded.fetch import Request, blocks
from dmx.cluster.sharded.group import Group
from dmx.kernels.expansion import expand
from dmx.kernels.k_reciprocal import Members, Nearby, k_reciprocal, members, mutual, sum_to_one, weigh
from dmx.kernels.knn import Neighbours
from dmx.kernels.progress import counting
from dmx.kernels.sparse import SparseRows, join_rows, together

# Rows of a block: the lists of their neighbours, at most 4 K^2 bytes a row, stay below 60 MB for K = 30.
BLOCK_ROWS = 16384


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
    order = together(lists)
    full, half = _mutual(group, lists, order, k1)
    parts = []
    with counting(group.own, "k-reciprocal sets", "rows") as count:
        for begin, end in blocks(group, BLOCK_ROWS, "the blocks of the encoding"):
            rows = order[begin:end]
            near, (their_half,) = _nearby(group, lists, rows, half)
            found = members(near, neighbours.similarities[rows], full[rows], their_half, k1, group.rows)
            _weigh(group, found, features, squares, rows)
            parts.append(sum_to_one(found))
            count(end - begin)
    v = _put_back(parts, order)
    columns = min(k2, lists.shape[1])
    return v if columns == 1 else _expand(group, v, lists[:, :columns], order)


def _mutual(
    group: Group, lists: torch.Tensor, order: torch.Tensor, k1: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reciprocity of this worker's rows, by the full and by the half lists."""
    parts = []
    with counting(group.own, "reciprocity", "rows") as count:
        for begin, end in blocks(group, BLOCK_ROWS, "the blocks of reciprocity"):
            parts.append(mutual(_nearby(group, lists, order[begin:end])[0], k1))
            count(end - begin)
    place = torch.argsort(order)
    return torch.cat([part.full for part in parts])[place], torch.cat([part.half for part in parts])[place]


def _nearby(
    group: Group, lists: torch.Tensor, rows: torch.Tensor, *tables: torch.Tensor
) -> tuple[Nearby, list[torch.Tensor]]:
    """Some rows of this worker with their neighbours' lists, and the neighbours' rows of `tables`."""
    own = lists[rows]
    named, places = torch.unique(own, return_inverse=True)
    fetched = Request.of(group, named, "lists of neighbours").rows(lists, *tables)
    return Nearby(own, places.int(), fetched[0]), fetched[1:]


def _weigh(
    group: Group, found: Members, features: torch.Tensor, squares: torch.Tensor, rows: torch.Tensor
) -> None:
    """Weights of members of some rows that are no neighbours, from their features."""
    places = found.places()
    unknown = places[found.weights[places] == 0]
    needed, at = torch.unique(found.ids[unknown], return_inverse=True)
    request = Request.of(group, needed, "features of members that are no neighbours")
    fetched, fetched_squares = request.rows(features, squares)
    ids = found.ids.clone()
    ids[unknown] = at.int()
    open_members = Members(found.starts, found.sizes, ids, found.weights)
    weigh(open_members, features, squares, rows, fetched, fetched_squares)


def _expand(group: Group, v: SparseRows, lists: torch.Tensor, order: torch.Tensor) -> SparseRows:
    parts = []
    with counting(group.own, "query expansion", "rows") as count:
        for begin, end in blocks(group, BLOCK_ROWS, "the blocks of query expansion"):
            needed, places = torch.unique(lists[order[begin:end]], return_inverse=True)
            rows = Request.of(group, needed, "encodings of neighbours").sparse_rows(v)
            parts.append(expand(rows, places.int(), group.rows))
            count(end - begin)
    return _put_back(parts, order)


def _put_back(parts: list[SparseRows], order: torch.Tensor) -> SparseRows:
    """Blocks of rows in `order` as rows in their own order; takes the blocks away."""
    rows = join_rows(parts)
    parts.clear()
    return rows.put_back(order)
