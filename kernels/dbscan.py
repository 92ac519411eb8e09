"""DBSCAN over a given graph, at several radii at once.

    core(i)  : |{j : d(i, j) <= eps}| >= min_samples          i itself counts
    clusters : connected components of the core rows under d <= eps, numbered by their lowest core row
    border   : a row that is not core joins the lowest-numbered cluster with a core row within eps; else -1

These are scikit-learn's labels (`DBSCAN(metric="precomputed")`): it grows clusters from rows in ascending
order, so a border row falls to the first that reaches it.

Method: counts by atomic addition; union-find over core-core pairs without locks, in which the lower root
wins, so that a root is the lowest row of its cluster whatever the order; numbers by a prefix sum over the
roots; border rows by atomic minimum. Nothing depends on the order in which programs run. The row of a pair is
found from its place by binary search, so that nothing has to be held for every pair.

Shapes: pairs i < j as CSR rows with distances, any number; labels (R, N) int64 for R radii. Error: none.
Time: O(pairs log N) a radius. Memory: 8 bytes a label, 15 a row, and 9 a row and radius, the radii in passes.
Sources: Ester et al., "A density-based algorithm for discovering clusters", KDD 1996; hooking onto the lower
root with the pair carried on where it failed, as in Jaiganesh and Burtscher, "A high-performance connected
components implementation for GPUs", HPDC 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from dmx.kernels.cpu import dbscan as cpu
from dmx.kernels.device import on, takes_triton
from dmx.kernels.memory import Plan, free_bytes, split
from dmx.kernels.progress import counting
from dmx.kernels.sparse import SparseRows

# A warp a program: a loop ends with its slowest lane, and to ask whether it has takes shuffles, no barrier.
# Four pairs a lane keep as many reads under way. Integers are not specialised: every epoch has other sizes.
_STEPS = 3  # neighbours counted, clusters joined, borders reached
_BLOCK, _WARPS = 128, 1
_RADIUS_BYTES = 4 + 4 + 1  # a row and radius of a pass: degree, parent, which labels are missing
_NUMBER_BYTES = 8 + 4 + 3  # a row, one radius at a time: prefix sum over the roots, row numbers, conditions


def dbscan_reference(distances: torch.Tensor, eps: float, min_samples: int) -> torch.Tensor:
    """The definition, dense: (N, N) distances -> (N,) int64 labels."""
    near = distances.double() <= eps
    near.fill_diagonal_(True)
    core = near.sum(1) >= min_samples
    labels = torch.full((len(near),), -1, dtype=torch.int64, device=near.device)
    cluster = 0
    for i in core.nonzero()[:, 0].tolist():
        if labels[i] >= 0:
            continue
        members = torch.zeros_like(core)
        members[i] = True
        while not torch.equal(grown := members | (near[members & core].any(0) & (labels < 0)), members):
            members = grown
        labels[members] = cluster
        cluster += 1
    return labels


@triton.jit
def row_of(starts, rows, steps, place):  # type: ignore[no-untyped-def]
    """The CSR row that holds each place: the last whose start is not beyond it. steps: bits of `rows`."""
    low = tl.zeros_like(place)
    high = low + rows  # row `low` starts at or before the place, row `high` after it
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= place
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _close_pairs(  # type: ignore[no-untyped-def]
    starts, indices, distances, radii, rows, steps, pairs, BLOCK: tl.constexpr
):
    """This program's pairs (i, j), and which of them lie within its radius."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < pairs
    eps = tl.load(radii + tl.program_id(1))
    near = exists & (tl.load(distances + place, mask=exists, other=0.0) <= eps)
    j = tl.load(indices + place, mask=exists, other=0).to(tl.int64)
    return row_of(starts, rows, steps, tl.where(exists, place, 0)), j, near


@triton.jit(do_not_specialize=["rows", "steps", "pairs"])
def _degrees(  # type: ignore[no-untyped-def]
    starts, indices, distances, radii, degree, rows, steps, pairs, BLOCK: tl.constexpr
):
    """Adds the rows within eps of every row to `degree` (R, N)."""
    i, j, near = _close_pairs(starts, indices, distances, radii, rows, steps, pairs, BLOCK)
    degree += tl.program_id(1).to(tl.int64) * rows
    tl.atomic_add(degree + i, 1, mask=near, sem="relaxed")
    tl.atomic_add(degree + j, 1, mask=near, sem="relaxed")


@triton.jit
def _roots(parent, x, active):  # type: ignore[no-untyped-def]
    """The root of every active x, halving the paths on the way.

    Other programs hook roots and halve paths meanwhile. Whatever a cell holds, now or earlier, is a lower row
    of the same cluster, or its own row while that is a root. An old value is never wrong, then: at worst it
    leads to a row that is no root any more, and `_union` notices. Volatile, since the multiprocessor's own
    cache does not see what others write: there a value could stay old for as long as the program runs.
    """
    up = tl.load(parent + x, mask=active, other=0, volatile=True)
    going = active & (up != x)
    while tl.max(going.to(tl.int32), 0) > 0:
        over = tl.load(parent + up, mask=going, other=0, volatile=True)
        # Not a plain store: that of a program that comes late would put back a row above the root which
        # `_flatten` has left here meanwhile.
        tl.atomic_min(parent + x, over, mask=going & (over != up), sem="relaxed")
        x = tl.where(going, up, x)
        up = tl.where(going, over, up)
        going = going & (up != x)
    return x


@triton.jit(do_not_specialize=["rows", "steps", "pairs", "min_samples"])
def _union(  # type: ignore[no-untyped-def]
    starts, indices, distances, radii, degree, parent, rows, steps, pairs, min_samples, BLOCK: tl.constexpr
):
    """Joins the clusters of core rows within eps; `parent` (R, N) starts with every row its own."""
    i, j, active = _close_pairs(starts, indices, distances, radii, rows, steps, pairs, BLOCK)
    degree += tl.program_id(1).to(tl.int64) * rows
    parent += tl.program_id(1).to(tl.int64) * rows
    active = active & (tl.load(degree + i, mask=active, other=0) >= min_samples)
    active = active & (tl.load(degree + j, mask=active, other=0) >= min_samples)
    a, b = i.to(tl.int32), j.to(tl.int32)
    while tl.max(active.to(tl.int32), 0) > 0:
        a, b = _roots(parent, a, active), _roots(parent, b, active)
        high, low = tl.maximum(a, b), tl.minimum(a, b)
        active = active & (high != low)
        found = tl.atomic_min(parent + high, low, mask=active, sem="relaxed")
        # Either `high` was a root and is hooked now, or it had been hooked before, and the clusters of
        # `found` and `low` remain to be joined. Both rows are below `high`, so this ends.
        active = active & (found != high) & (found != low)
        a = tl.where(active, found, low)
        b = low


@triton.jit(do_not_specialize=["rows"])
def _flatten(parent, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sets the parent of every row to its root."""
    parent += tl.program_id(1).to(tl.int64) * rows
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    root = _roots(parent, row, exists)
    tl.store(parent + row, root, mask=exists)


@triton.jit(do_not_specialize=["rows", "steps", "pairs", "min_samples"])
def _borders(  # type: ignore[no-untyped-def]
    starts, indices, distances, radii, degree, labels, rows, steps, pairs, min_samples, BLOCK: tl.constexpr
):
    """Gives rows that are not core the lowest cluster in reach; their `labels` (R, N) start at N."""
    i, j, near = _close_pairs(starts, indices, distances, radii, rows, steps, pairs, BLOCK)
    degree += tl.program_id(1).to(tl.int64) * rows
    labels += tl.program_id(1).to(tl.int64) * rows
    core_i = tl.load(degree + i, mask=near, other=0) >= min_samples
    core_j = tl.load(degree + j, mask=near, other=0) >= min_samples
    near = near & (core_i != core_j)
    border, core = tl.where(core_i, j, i), tl.where(core_i, i, j)
    cluster = tl.load(labels + core, mask=near, other=0)
    tl.atomic_min(labels + border, cluster, mask=near, sem="relaxed")


class Together(Protocol):
    """How workers that hold a part of the pairs each come to the same labels. Tensors change in place."""

    def sum(self, counts: torch.Tensor) -> None:
        """Add up the counts of all workers."""

    def least(self, labels: torch.Tensor) -> None:
        """Take the least of the labels of all workers."""

    def join(self, parent: torch.Tensor, unite: Callable[[SparseRows], None]) -> None:
        """Unite the clusters of all workers: `parent` (N,) names the root of every row.

        Args:
            unite: joins, in this worker's `parent`, the two rows of every pair.
        """


class _Alone:
    """One worker that holds all pairs."""

    def sum(self, counts: torch.Tensor) -> None:
        pass

    def least(self, labels: torch.Tensor) -> None:
        pass

    def join(self, parent: torch.Tensor, unite: Callable[[SparseRows], None]) -> None:
        pass


def plan_dbscan(n: int, pairs: int, radii: int, free_bytes: int | None = None) -> Plan:
    """Memory of labelling N rows at `radii` radii; its passes are over the radii. Pairs take nothing."""
    return split("dbscan", radii, (8 * radii + _NUMBER_BYTES) * n, _RADIUS_BYTES * n, free_bytes)


@dataclass(frozen=True)
class _Pass:
    """Some radii at once: `eps` (R,) float64, degree and parent (R, N) int32."""

    pairs: SparseRows
    eps: torch.Tensor
    degree: torch.Tensor
    parent: torch.Tensor
    min_samples: int

    def count(self) -> None:
        """Adds to the degrees what these pairs make of them."""
        if not takes_triton(self.degree):
            for eps, degree in zip(self.eps.tolist(), self.degree, strict=True):
                cpu.add_degrees(self.pairs.on_cpu(), eps, degree.numpy())
            return
        self._over_pairs(_degrees)

    def unite(self) -> None:
        """Joins the clusters of core rows."""
        if not takes_triton(self.degree):
            for eps, degree, parent in zip(self.eps.tolist(), self.degree, self.parent, strict=True):
                cpu.unite(self.pairs.on_cpu(), eps, degree.numpy(), self.min_samples, parent.numpy())
            return
        self._over_pairs(_union, self.parent)
        self._flatten(self.parent)

    def unite_also(self, row: int, edges: SparseRows) -> None:
        """Joins the rows of `edges`, all of them core rows, at one radius."""
        one = _Pass(edges, torch.ones_like(self.eps[:1]), self.degree[row : row + 1],
                    self.parent[row : row + 1], self.min_samples)  # fmt: skip
        one.unite()

    def number(self, labels: torch.Tensor) -> None:
        """Numbers the clusters by their lowest core row; N where a row is not core."""
        n = labels.shape[1]
        for row, root, within in zip(labels, self.parent, self.degree, strict=True):
            core = within >= self.min_samples
            lowest = core & (root == torch.arange(n, dtype=torch.int32, device=root.device))
            torch.index_select(lowest.cumsum(0).sub_(1), 0, root, out=row)
            row.masked_fill_(~core, n)

    def reach_borders(self, labels: torch.Tensor) -> None:
        """Gives rows that are not core the lowest cluster in reach."""
        if not takes_triton(self.degree):
            for eps, degree, row in zip(self.eps.tolist(), self.degree, labels, strict=True):
                cpu.reach_borders(self.pairs.on_cpu(), eps, degree.numpy(), self.min_samples, row.numpy())
            return
        self._over_pairs(_borders, labels)

    def _over_pairs(self, kernel: Any, *tensors: torch.Tensor) -> None:
        pairs, n, count = self.pairs, len(self.pairs), len(self.pairs.indices)
        grid = (triton.cdiv(count, _BLOCK), len(self.eps))
        least = () if kernel is _degrees else (self.min_samples,)
        if count:
            with on(pairs.values):
                kernel[grid](pairs.starts, pairs.indices, pairs.values, self.eps, self.degree, *tensors,
                             n, n.bit_length(), count, *least, BLOCK=_BLOCK, num_warps=_WARPS)  # fmt: skip

    def _flatten(self, parent: torch.Tensor) -> None:
        count, n = parent.shape
        with on(parent):
            _flatten[triton.cdiv(n, _BLOCK), count](parent, n, BLOCK=_BLOCK, num_warps=_WARPS)


def _label(
    pairs: SparseRows, eps: torch.Tensor, min_samples: int, labels: torch.Tensor, together: Together
) -> None:
    """Fills `labels` (R, N) at the radii `eps` (R,)."""
    count, n = labels.shape
    degree = torch.zeros((count, n), dtype=torch.int32, device=labels.device)
    parent = torch.arange(n, dtype=torch.int32, device=labels.device).repeat(count, 1)
    work = _Pass(pairs, eps, degree, parent, min_samples)
    with counting(_STEPS, "DBSCAN", "steps") as done:
        work.count()
        together.sum(degree)
        degree += 1  # the row itself
        done(1)
        work.unite()
        for row in range(count):
            together.join(parent[row], partial(work.unite_also, row))
        done(1)
        work.number(labels)
        work.reach_borders(labels)
        together.least(labels)
        done(1)
    labels.masked_fill_(labels == n, -1)


def dbscan(
    pairs: SparseRows, radii: Sequence[float], min_samples: int, *, together: Together | None = None
) -> torch.Tensor:
    """Labels of every row at every radius.

    Args:
        pairs: distances of pairs i < j, at least all within the largest radius (`jaccard_pairs`).
        radii: eps of each labeling; pairs at exactly eps count.
        min_samples: rows within eps, itself included, that make a core row.
        together: with other workers: each holds some of the pairs, as rows of all N, and all get all labels.

    Returns:
        (len(radii), N) int64 on the device of `pairs`; -1 marks outliers.

    Raises:
        NotEnoughMemory: a labeling does not fit on the device.
    """
    device = pairs.values.device
    plan = plan_dbscan(len(pairs), len(pairs.indices), len(radii), free_bytes(device))
    labels = torch.empty((len(radii), len(pairs)), dtype=torch.int64, device=device)
    eps = torch.tensor(radii, dtype=torch.float64, device=device)
    for begin in range(0, len(radii), plan.rows_per_pass):
        part = slice(begin, begin + plan.rows_per_pass)
        _label(pairs, eps[part], min_samples, labels[part], together or _Alone())
    return labels
