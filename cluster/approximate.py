"""Approximate nearest neighbours over all workers, from inverted lists, and how many of the exact they are.

1. Centroids: k-means on a random sample of all rows, by the first worker, given to all.
2. Each worker puts its own rows into the lists of the centroids (`inverted_lists.py`).
3. A ring: a block of each worker's rows meets every shard, with the similarity of the worst neighbour that
   each row has so far; what is found comes back and is joined.
4. Recall: a random sample of rows is compared with all rows by the exact kernels.

The result is the exact answer over the rows of the lists searched, with the similarities and ties of
`kernels/knn.py`. Neither lists nor answer depend on the number of workers or threads; with all lists searched
it is what the exact search finds, bit by bit.

Symbols: N rows in all, D their width, k neighbours, W workers, L lists, P of which are searched for a row.
Memory: O(N D / W + N k / W) and a block, on the host; for the first worker the sample of 64 L rows too.
Network: a block visits every worker, N D elements a worker, and 12 k bytes a row for every shard.
Time: N P / L products of width D a row, shared by W workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.cluster.inverted_lists import (
    ROWS,
    Floats,
    Queries,
    Shard,
    import_faiss,
    nearest_lists,
    train_centroids,
    unit_float32,
)
from dmx.cluster.sharded.fetch import Request
from dmx.cluster.sharded.group import Group
from dmx.cluster.validation import as_count
from dmx.kernels.cpu import knn as cpu
from dmx.kernels.cross import NOBODY, nearer
from dmx.kernels.device import as_array
from dmx.kernels.knn import Neighbours
from dmx.kernels.progress import counting

RECALL = 0.98  # below it, the caller is warned
PROBES = 256  # the least of those in benchmarks/ivf.py whose recall is 0.98 or more at N = 100 k
_PER_LIST = 64  # rows of the sample a list; faiss advises 39 to 256
_LEAST_PER_LIST = 39


@dataclass(frozen=True)
class Approximate:
    """Neighbours of this worker's rows, and how good those of all workers are.

    Attributes:
        neighbours: (own rows, min(k, N)), numbers among all N rows, itself first; similarities are exact.
        recall: share of the exact neighbours (the row itself not counted) that were found, over the sample.
        sampled: rows of the sample, over all workers.
    """

    neighbours: Neighbours
    recall: float
    sampled: int


def recall_message(found: Approximate, k: int) -> tuple[str, bool]:
    """What to tell about the recall, and whether it is below 0.98: a warning then.

    Args:
        found: of `ivf_neighbours`; k: as given to it.
    """
    others = max(min(k, found.neighbours.indices.shape[1]) - 1, 0)
    text = f"recall {found.recall:.4f} of the {others} nearest others, measured on {found.sampled} rows"
    if found.recall >= RECALL:
        return text, False
    return f"{text}: below {RECALL}; search more lists (raise probes), or use the exact neighbours", True


def ivf_neighbours(
    group: Group, features: torch.Tensor, squares: torch.Tensor, k: int, *, lists: int | None = None,
    probes: int | None = None, seed: int = 0, sample: int = 1000,
) -> Approximate:  # fmt: skip
    """About the k nearest of all rows to every row of this worker, itself first. All workers call it.

    Args:
        group: the workers.
        features: (own rows, D), as `as_features` returns them, on any device.
        squares: (own rows,) float64, their squared lengths.
        k: columns wanted; min(k, N) are returned.
        lists: L; None for 4 sqrt(N), or fewer so that each has 39 rows to be trained on.
        probes: P, lists searched for a row; None for 256, all where there are fewer. A row whose lists hold
            fewer than min(k, N) rows has twice as many searched, and so on: every list of neighbours is full.
        seed: draws the samples; sample: rows to measure the recall on. All the same for all workers.

    Returns:
        Approximate, on the device of the features.

    Raises:
        ImportError: faiss is not installed.
        ValueError: k, lists, probes or sample is less than 1, or there are fewer rows than lists, or none.
        WorkerLostError: another worker failed or did not come within the group's timeout.
    """
    import_faiss()
    columns = min(as_count("k", k), group.rows)
    if group.rows == 0:
        raise ValueError(
            "features: wanted at least one row on some worker, found none; pass one row an image"
        )
    lists = default_lists(group.rows) if lists is None else as_count("lists", lists)
    if lists > group.rows:
        raise ValueError(f"lists: wanted at most as many as there are rows, {group.rows}, found {lists}")
    probes = as_count("probes", PROBES if probes is None else probes)
    as_count("sample", sample)
    rows, lengths = as_array(features), squares.cpu().numpy()
    centroids = _centroids(group, rows, lengths, lists, seed)
    shard = Shard.of(rows, lengths, centroids, features.device)
    near = _search(group, shard, centroids, probes, columns)
    own = torch.arange(group.first, group.first + group.own, dtype=torch.int32)
    found = _own_first(near, shard.groups.group, own)
    recall, sampled = _recall(group, rows, found, seed, sample)
    indices, similarities = found.indices.to(features.device), found.similarities.to(features.device)
    return Approximate(Neighbours(indices, similarities), recall, sampled)


def default_lists(n: int) -> int:
    """4 sqrt(N), at most N / 39."""
    return max(1, min(round(4 * math.sqrt(n)), n // _LEAST_PER_LIST))


def _centroids(
    group: Group, rows: Floats, squares: NDArray[np.float64], lists: int, seed: int
) -> NDArray[np.float32]:
    """(L, D) unit rows: trained by the first worker, from rows of all."""
    numbers = torch.empty(0, dtype=torch.int64)
    if group.rank == 0:
        chosen = np.random.default_rng(seed).choice(
            group.rows, min(_PER_LIST * lists, group.rows), replace=False
        )
        numbers = torch.from_numpy(np.sort(chosen))
    request = Request.of(group, numbers, "rows to train the lists on")
    drawn, lengths = request.rows(torch.from_numpy(rows), torch.from_numpy(squares))
    centroids = np.empty((lists, rows.shape[1]), np.float32)
    if group.rank == 0:
        centroids = train_centroids(unit_float32(drawn.numpy(), lengths.numpy()), lists, seed)
    return group.spread(torch.from_numpy(centroids), "the centroids of the lists").numpy()


def _search(group: Group, shard: Shard, centroids: NDArray[np.float32], probes: int, k: int) -> Neighbours:
    """The k nearest in the lists searched, of each of this worker's U distinct rows: (U, k) on the CPU."""
    sizes = shard.sizes()
    group.sum(sizes, "how many rows each list has")
    # By list: rows that stand together search the same lists, which then are in the cache.
    order = shard.list_groups.numpy()
    distinct = shard.groups.rows[order]
    out = Neighbours(
        torch.empty((len(order), k), dtype=torch.int32), torch.empty((len(order), k), dtype=torch.float64)
    )
    rounds = group.most(-(-len(order) // ROWS), "the blocks of the search")
    with counting(len(order), "neighbours in lists", "rows") as count:
        for block in range(rounds):
            part = slice(block * ROWS, (block + 1) * ROWS)
            rows, squares = shard.rows[distinct[part]], shard.squares[distinct[part]]
            lists = nearest_lists(unit_float32(rows, squares), centroids, sizes.numpy(), probes, k)
            least = torch.full((len(rows),), NOBODY, dtype=torch.float64)
            mine = Queries(torch.from_numpy(rows), torch.from_numpy(squares), torch.from_numpy(lists), least)
            found, to = _around(group, shard, mine, k), shard.list_groups[part]
            out.indices[to], out.similarities[to] = found.indices, found.similarities
            count(len(rows))
    return out


def _around(group: Group, shard: Shard, mine: Queries, k: int) -> Neighbours:
    """Neighbours of a block of this worker's rows in every shard; this shard meets the others' blocks."""
    what = "the block of worker {} in step {} of {} of the search"
    shapes = group.collect(mine.lists.shape, "the sizes of blocks").tolist()
    best = _found(group, shard, mine, k)
    for step in range(1, group.size):
        source, to = (group.rank - step) % group.size, (group.rank + step) % group.size
        # Who is less similar than the worst so far is not wanted.
        sent = (*mine.tensors[:3], best.similarities[:, -1].contiguous())
        count, width = shapes[source]
        room = [tensor.new_empty((count, *tensor.shape[1:])) for tensor in sent]
        room[2] = sent[2].new_empty((count, width))
        theirs = Queries(*group.swap(sent, to, room, source, what.format(source, step, group.size - 1)))
        there = _found(group, shard, theirs, k)
        back = [t.new_empty((len(mine.rows), k)) for t in (there.indices, there.similarities)]
        back = group.swap(
            (there.indices, there.similarities), source, back, to,
            f"what worker {to} found in step {step} of {group.size - 1} of the search",
        )  # fmt: skip
        best = nearer(best, Neighbours(*back), k)
    return best


def _found(group: Group, shard: Shard, queries: Queries, k: int) -> Neighbours:
    """What this worker's rows have, by numbers among all N rows."""
    return _numbered(shard.search(queries, k), group.first)


def _numbered(found: cpu.Neighbours, first: int) -> Neighbours:
    indices = torch.from_numpy(found.indices)
    return Neighbours(
        torch.where(indices < 0, indices, indices + first), torch.from_numpy(found.similarities)
    )


def _own_first(near: Neighbours, of: NDArray[np.int64], own: torch.Tensor) -> Neighbours:
    """Lists in which every row leads its own, with similarity 1.

    Args:
        near: (U, K) nearest rows, the row itself like any other.
        of: (n,), the list that each row starts from; own: (n,) int32, the number of each row.
    """
    n, k = len(of), near.indices.shape[1]
    out = Neighbours(torch.empty((n, k), dtype=torch.int32), torch.ones((n, k), dtype=torch.float64))
    for begin in range(0, n, ROWS):
        part = slice(begin, begin + ROWS)
        lists = torch.from_numpy(of[part])
        indices, similarities = near.indices[lists], near.similarities[lists]
        others = indices != own[part, None]
        # Where more than K rows are equal the row itself may be missing: the last gives way.
        others[others.all(1), -1] = False
        out.indices[part, 0] = own[part]
        out.indices[part, 1:] = indices[others].reshape(len(lists), k - 1)
        out.similarities[part, 1:] = similarities[others].reshape(len(lists), k - 1)
    return out


def _recall(group: Group, rows: Floats, found: Neighbours, seed: int, sample: int) -> tuple[float, int]:
    """Share of the exact neighbours of a sample of rows that were found, and the size of the sample."""
    k = found.indices.shape[1]
    numbers = np.random.default_rng((seed, 1)).choice(group.rows, min(sample, group.rows), replace=False)
    drawn = torch.from_numpy(np.sort(numbers))
    (queries,) = Request.of(group, drawn, "the rows of the sample").rows(torch.from_numpy(rows))
    mine = cpu.nobody(len(drawn), k)
    if len(rows):
        best = cpu.knn(queries.numpy(), rows, k)
        width = best.indices.shape[1]
        mine.indices[:, :width], mine.similarities[:, :width] = best.indices, best.similarities
    here = _numbered(mine, group.first)
    edges = torch.searchsorted(drawn, torch.tensor(group.bounds))
    parts = group.deal([here.indices, here.similarities], edges.diff(), "the exact neighbours of the sample")
    begin, end = int(edges[group.rank]), int(edges[group.rank + 1])
    shards = [part.reshape(group.size, end - begin, k).unbind() for part in parts]
    exact = Neighbours(shards[0][0], shards[1][0])
    for indices, similarities in list(zip(*shards, strict=True))[1:]:
        exact = nearer(exact, Neighbours(indices, similarities), k)
    if k == 1:
        return 1.0, len(drawn)  # nobody to be found
    own = drawn[begin:end]
    exact = _own_first(exact, np.arange(len(own)), own.int())
    # Who is as similar as the last of the exact ones is as right as that one.
    right = found.similarities[own - group.first, 1:] >= exact.similarities[:, -1:]
    hits = int(group.collect([int(right.sum())], "how many of the sample's neighbours were found").sum())
    return hits / (len(drawn) * (k - 1)), len(drawn)
