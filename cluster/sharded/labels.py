"""Pseudo-labels of rows that lie on several workers: every step of the method, and labels for everyone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.cluster.labels import Settings, mean_of_labels
from dmx.cluster.reliability import Evidence, reliable
from dmx.cluster.sharded.encoding import sharded_k_reciprocal
from dmx.cluster.sharded.fetch import Request
from dmx.cluster.sharded.group import Group
from dmx.cluster.sharded.join import sharded_jaccard_pairs
from dmx.cluster.sharded.neighbours import sharded_knn
from dmx.cluster.validation import as_features
from dmx.kernels.dbscan import dbscan
from dmx.kernels.knn import Neighbours
from dmx.kernels.sparse import SparseRows, starts_of

_ELEMENTS = 2**25  # float64 elements of members' features that averaging fetches at a time


@dataclass(frozen=True)
class ShardedPseudoLabels:
    """What clustering found in the N images of all workers; C is `num_identities`.

    Attributes:
        labels: (N,) int64 as `PseudoLabels.labels`, the same on every worker.
        independence_threshold: as of `PseudoLabels`.
        num_identities: C.
        centroids: this worker's rows of (C, D) float32: those from C rank // W to C (rank + 1) // W.
        evidence: why images were kept and dropped; on the first worker alone, None on the others.
    """

    labels: NDArray[np.int64]
    independence_threshold: float | None
    num_identities: int
    centroids: torch.Tensor
    evidence: Evidence | None = None


def sharded_pseudo_labels(
    features: Any,
    *,
    group: Group | None = None,
    device: str = "auto",
    neighbours: Neighbours | None = None,
    centroids_of: tuple[torch.Tensor, torch.Tensor] | None = None,
    **settings: Any,
) -> ShardedPseudoLabels:
    """`dmx.cluster.pseudo_labels` of rows that lie on several workers. All workers call it together.

    Args:
        features: (own rows, D), this worker's; the order of the ranks is the order of the rows. The same
            width and type on all. A worker may have no rows, but not all.
        group: the workers; None for all processes of torch.distributed, or this one alone.
        device: "cpu", "cuda", or "auto" for CUDA where there is one; the same for all.
        neighbours: of these rows among all N, where they are known already: `sharded_knn`'s or others, with
            min(k1, N) columns, each row itself first.
        centroids_of: other features of the same rows, whose means the centroids are, and their squared
            lengths, both as `sharded_centroids` takes them; None for those that are clustered.
        settings: k1, k2, eps, eps_gap, min_samples, min_cluster_size and independence_threshold, as for
            `pseudo_labels`.

    Returns:
        ShardedPseudoLabels, bit by bit what one worker with all rows finds.

    Raises:
        TypeError, ValueError: as `pseudo_labels`; row numbers count from this worker's first.
        WorkerLostError: another worker failed or did not come within the group's timeout.
    """
    chosen = Settings.of(**settings)
    group = group or Group.of(len(features))
    rows, squares = as_features(features, device, may_be_empty=group.size > 1)
    if neighbours is None:
        neighbours = sharded_knn(group, rows, squares, chosen.k1)
    else:
        _require_neighbours(group, neighbours.indices, min(chosen.k1, group.rows))
    v = sharded_k_reciprocal(group, rows, squares, neighbours, chosen.k1, chosen.k2)
    del neighbours
    close = sharded_jaccard_pairs(group, v, chosen.radii[2])
    del v
    three = dbscan(_among_all(group, close), chosen.radii, chosen.min_samples, together=_Together(group))
    labels, threshold, evidence = _reliable(group, three, chosen)
    count = int(labels.max()) + 1
    return ShardedPseudoLabels(
        labels.numpy(),
        threshold,
        count,
        sharded_centroids(group, *(centroids_of or (rows, squares)), labels, count),
        evidence,
    )


def _require_neighbours(group: Group, lists: torch.Tensor, columns: int) -> None:
    """Whoever made them: reciprocity reads a row's number from its own list."""
    if lists.shape != (group.own, columns):
        raise ValueError(
            f"neighbours: wanted {group.own} lists of {columns}, found an array of {tuple(lists.shape)}"
        )
    numbers = torch.arange(group.first, group.first + group.own, device=lists.device)
    wrong = torch.nonzero(lists[:, 0] != numbers)
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"neighbours: wanted every row first in its own list, found {int(lists[row, 0])} first in that "
            f"of row {group.first + row}; move it there"
        )


def _among_all(group: Group, close: SparseRows) -> SparseRows:
    """This worker's rows as rows of all N, the others' empty."""
    before = close.starts.new_zeros(group.first)
    after = close.starts[-1:].expand(group.rows - group.first - group.own)
    return SparseRows(torch.cat([before, close.starts, after]), close.indices, close.values)


@dataclass(frozen=True)
class _Together:
    """How DBSCAN's steps become one over the group."""

    group: Group

    def sum(self, counts: torch.Tensor) -> None:
        self.group.sum(counts, "how many neighbours each image has")

    def least(self, labels: torch.Tensor) -> None:
        self.group.least(labels, "the clusters that border images reach")

    def join(self, parent: torch.Tensor, unite: Callable[[SparseRows], None]) -> None:
        """In log2(W) rounds: half of the workers send their clusters to the other half, the first has all."""
        group, stride = self.group, 1
        while stride < group.size:
            what = f"clusters in round {stride.bit_length()} of joining them"
            sends = group.rank % (2 * stride) == stride
            receives = group.rank % (2 * stride) == 0 and group.rank + stride < group.size
            edges = _edges(parent) if sends else parent.new_empty((0, 2))
            # Sizes first: only the sender knows how many rows are not their own root.
            sizes = group.collect([len(edges)], what)[:, 0].tolist()
            source = group.rank + stride if receives else None
            room = [parent.new_empty((sizes[source], 2))] if source is not None else []
            group.swap([edges], group.rank - stride if sends else None, room, source, what)
            if room:
                unite(_as_pairs(room[0], len(parent)))
            stride *= 2
        group.spread(parent, "the clusters of all workers")


def _edges(parent: torch.Tensor) -> torch.Tensor:
    """(M, 2) root and row of every row that is not its own root; rows ascend."""
    rows = torch.nonzero(parent != torch.arange(len(parent), device=parent.device)).flatten()
    return torch.stack([parent[rows], rows.to(parent.dtype)], 1)


def _as_pairs(edges: torch.Tensor, n: int) -> SparseRows:
    """Edges (root < row) as CSR pairs at distance 0."""
    roots, order = edges[:, 0].long().sort(stable=True)
    starts = starts_of(torch.bincount(roots, minlength=n))
    zeros = torch.zeros(len(edges), dtype=torch.float64, device=edges.device)
    return SparseRows(starts, edges[order, 1].contiguous(), zeros)


def _reliable(
    group: Group, three: torch.Tensor, chosen: Settings
) -> tuple[torch.Tensor, float | None, Evidence | None]:
    """Labels and threshold, decided by the first worker and given to all; the evidence stays with it."""
    device, evidence = three.device, None
    labels = torch.empty(group.rows, dtype=torch.int64, device=device)
    threshold = torch.full((1,), torch.nan, dtype=torch.float64, device=device)
    if group.rank == 0:
        tight, base, loose = three.cpu().numpy()
        found = reliable(tight, base, loose, chosen.min_cluster_size, chosen.independence_threshold)
        labels, evidence = torch.from_numpy(found.labels).to(device), found.evidence
        if found.independence_threshold is not None:
            threshold[0] = found.independence_threshold
    group.spread(labels, "the labels of the first worker")
    value = float(group.spread(threshold, "the independence threshold"))
    return labels.cpu(), None if np.isnan(value) else value, evidence


def sharded_centroids(
    group: Group, features: torch.Tensor, squares: torch.Tensor, labels: torch.Tensor, count: int
) -> torch.Tensor:
    """Unit means of this worker's share of the pseudo-identities, from their images wherever they are.

    Args:
        group: the workers, which all call it.
        features: (own rows, D), this worker's; squares: (own rows,) float64, their squared lengths.
        labels: (N,) int64 of all images, from 0 to count - 1, each with an image at least; -1 for none.
        count: C.

    Returns:
        Rows C rank // W to C (rank + 1) // W of (C, D) float32.
    """
    first, last = count * group.rank // group.size, count * (group.rank + 1) // group.size
    wanted = torch.nonzero((labels >= first) & (labels < last)).flatten()
    order = wanted[torch.argsort(labels[wanted], stable=True)]
    sizes = torch.bincount(labels[order] - first, minlength=last - first)
    most = max(1, _ELEMENTS // features.shape[1])
    parts = _runs(sizes, most)
    rounds = group.most(len(parts), "the blocks of centroids")
    ends = [0, *sizes.cumsum(0).tolist()]
    out = torch.empty((last - first, features.shape[1]), dtype=torch.float32, device=features.device)
    for i in range(rounds):
        begin, end = parts[i] if i < len(parts) else (0, 0)
        members = order[ends[begin] : ends[end]].to(features.device)
        numbers, places = torch.unique(members, return_inverse=True)
        rows, lengths = Request.of(group, numbers, "images of pseudo-identities").rows(features, squares)
        if end > begin:
            out[begin:end] = mean_of_labels(rows[places], lengths[places], sizes[begin:end].to(rows.device))
    return out


def _runs(sizes: torch.Tensor, most: int) -> list[tuple[int, int]]:
    """Consecutive labels [begin, end) of at most `most` images in all; a larger one is a run by itself."""
    runs, begin, images = [], 0, 0
    for label, size in enumerate(sizes.tolist()):
        if images and images + size > most:
            runs.append((begin, label))
            begin, images = label, 0
        images += size
    return [*runs, (begin, len(sizes))] if len(sizes) else []
