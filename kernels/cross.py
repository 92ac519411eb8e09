"""Nearest neighbours between two sets of rows, both ways, from one product: a step of a ring of shards.

    a(i) = the k rows j of B with the largest (s(i, j), -j)      b(j) = the k rows i of A likewise

s of `similarity.py`. A worker that has met other shards already knows k neighbours of every row: whoever is
less similar than the worst of them is not wanted. So a step finds what is new and little else, and a row's
lists from all shards, joined by `nearer`, are its neighbours among all rows.

Method: as `knn.py`; a key is tested against the limit of its row and of its column. What is wanted gives
limits from the start, so there are no rounds to raise them: a shard that has met its own rows first knows
about what it will keep.

Shapes: A (N, D), B (M, D) of any floating type; indices int32, similarities float64.
Error: none in the indices; similarities as in `similarity.py`.
Time: 2 N M D operations. Memory: `plan_cross`; no N x M numbers are ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmx.kernels import candidates
from dmx.kernels.candidates import Candidates, Scan
from dmx.kernels.cpu import cross as cpu
from dmx.kernels.cpu.candidates import LABEL, UNIT
from dmx.kernels.cpu.cross import Wanted as CpuWanted
from dmx.kernels.cpu.knn import NOBODY as NOBODY
from dmx.kernels.device import as_array, takes_triton
from dmx.kernels.distinct import Distinct, distinct, spread
from dmx.kernels.knn import (
    Neighbours,
    checked,
    finish,
    finish_bytes,
    neighbours_of,
    prepared_bytes,
    row_bytes,
)
from dmx.kernels.memory import Plan, free_bytes, split
from dmx.kernels.progress import counting
from dmx.kernels.rescore import Best, Side
from dmx.kernels.similarity import similarity_reference
from dmx.kernels.unit_rows import UnitRows, mean_of_units, shuffled, unit_rows

_MERGED = 2**22  # pairs that one step of merging sorts


@dataclass(frozen=True)
class Wanted:
    """Rows that seek neighbours.

    Attributes:
        features: (N, D) floating, contiguous, finite, no row zero.
        squares: (N,) float64, their squared lengths.
        least: (N,) float64, who is less similar is not wanted; `NOBODY` wants everybody.
    """

    features: torch.Tensor
    squares: torch.Tensor
    least: torch.Tensor


def cross_reference(a: torch.Tensor, b: torch.Tensor, k: int) -> tuple[Neighbours, Neighbours]:
    """The formula, dense, everybody wanted."""
    s = similarity_reference(a, b)
    found = []
    for values in (s, s.T):
        order = torch.argsort(values, dim=1, descending=True, stable=True)[:, :k]
        found.append(Neighbours(order.int(), values.gather(1, order)))
    return found[0], found[1]


def plan_cross(n: int, m: int, d: int, k: int, free: int | None = None) -> Plan:
    """What `cross_knn` of N and M rows takes on a GPU beside its arguments; passes are over A.

    Raises:
        NotEnoughMemory: not even a pass of 256 rows fits.
    """
    fixed = prepared_bytes(n, d) + prepared_bytes(m, d) + 24 * (n + m) * k + m * row_bytes(k)
    return split("cross_knn", n, fixed + finish_bytes(max(n, m), k), row_bytes(k), free,
                 least_rows=candidates.BLOCK)  # fmt: skip


@dataclass(frozen=True)
class _Side:
    """One side on a GPU: its distinct rows in a shuffled order."""

    side: Side
    groups: Distinct | None
    targets: torch.Tensor  # (U,) int64, place among the distinct rows of every position
    units: UnitRows
    least: torch.Tensor  # (U,) float64, by position

    @staticmethod
    def of(wanted: Wanted, mean: torch.Tensor) -> _Side:
        """Join equal rows, shuffle, and round for the product."""
        features, device = wanted.features, wanted.features.device
        groups = distinct(features)
        rows, least = torch.arange(len(features), device=device), wanted.least
        if groups is not None:
            rows = groups.rows
            least = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=device)
            least = least.scatter_reduce(0, groups.group, wanted.least, "amin")
        targets = shuffled(len(rows), device)
        units = unit_rows(features, wanted.squares, rows[targets].int(), mean, candidates.BLOCK)
        return _Side(Side(features, wanted.squares, rows), groups, targets, units, least[targets])

    def lists(self, near: Best, other: _Side, k: int) -> Neighbours:
        """Neighbours of all rows among all rows, from those of distinct rows among distinct rows."""
        if self.groups is None and other.groups is None:
            return neighbours_of(near)
        device = self.targets.device
        group = torch.arange(len(self.side.features), device=device)
        if self.groups is not None:
            group = self.groups.group
        if other.groups is None:
            return neighbours_of(Best(near.ids[group], near.steps[group]))
        return neighbours_of(spread(near, other.groups, group, k, False))


def cross_knn(a: Wanted, b: Wanted, k: int) -> tuple[Neighbours, Neighbours]:
    """The k nearest rows of B to every row of A, and of A to every row of B.

    Args:
        a: (N, D); b: (M, D) of the same type on the same device.
        k: columns wanted, >= 1, on a GPU <= 64.

    Returns:
        Neighbours (N, min(k, M)) and (M, min(k, N)). A list ends with index -1 and similarity `NOBODY` where
        fewer rows are as similar as is wanted; some that are less similar may be listed all the same.

    Raises:
        ValueError: k is more than a GPU takes.
        NotEnoughMemory: see `plan_cross`.
    """
    if not takes_triton(a.features):
        there, here = (CpuWanted(as_array(w.features), w.squares.numpy(), w.least.numpy()) for w in (a, b))
        found = cpu.cross_knn(there, here, k)
        lists = [Neighbours(torch.from_numpy(x.indices), torch.from_numpy(x.similarities)) for x in found]
        return lists[0], lists[1]
    a, b = (Wanted(checked(w.features, k), w.squares, w.least) for w in (a, b))
    means = mean_of_units(a.features, a.squares), mean_of_units(b.features, b.squares)
    mean = (means[0] + means[1]) / 2
    left, right = _Side.of(a, mean), _Side.of(b, mean)
    plan = plan_cross(len(left.units), len(right.units), a.features.shape[1], k, free_bytes(mean.device))
    by_row = Scan(left.units, right.units, mean, min(k, len(right.units)), own=False)
    by_column = Scan(right.units, left.units, mean, min(k, len(left.units)), own=False)
    by_row.want(left.least)
    by_column.want(right.least)
    by_column.begin_columns()
    near = Best.nobody(len(left.units), by_row.k, mean.device)
    with counting(len(left.units) * len(right.units), LABEL, UNIT) as count:
        for begin in range(0, len(left.units), plan.rows_per_pass):
            end = min(begin + plan.rows_per_pass, len(left.units))
            _finish(left, right, by_row.cross(by_column, begin, end), left.targets[begin:end], near)
            count((end - begin) * len(right.units))
    back = Best.nobody(len(right.units), by_column.k, mean.device)
    _finish(right, left, by_column.columns_found(), right.targets, back)
    return (
        left.lists(near, right, min(k, len(b.features))),
        right.lists(back, left, min(k, len(a.features))),
    )


def _finish(own: _Side, other: _Side, found: Candidates, targets: torch.Tensor, out: Best) -> None:
    """Candidates -> their rows of `out`: ids are distinct rows of the other side."""
    finish(
        own.side, other.side, other.units, found, targets, out, out.ids.shape[1], own=False, all_wanted=False
    )


def nearer(best: Neighbours, more: Neighbours, k: int) -> Neighbours:
    """The k nearest of two lists of every row: higher similarity, then lower index.

    Args:
        best, more: (N, .) each; nobody is in both lists of a row.
        k: columns of the result.
    """
    n, device = len(best.indices), best.indices.device
    indices = torch.empty((n, k), dtype=torch.int32, device=device)
    similarities = torch.empty((n, k), dtype=torch.float64, device=device)
    step = max(1, _MERGED // (best.indices.shape[1] + more.indices.shape[1]))
    for begin in range(0, n, step):
        part = slice(begin, begin + step)
        ids = torch.cat([best.indices[part], more.indices[part]], 1)
        values = torch.cat([best.similarities[part], more.similarities[part]], 1)
        ids, order = ids.sort(dim=1, stable=True)
        values = values.gather(1, order)
        values, order = values.sort(dim=1, stable=True, descending=True)
        indices[part], similarities[part] = ids.gather(1, order)[:, :k], values[:, :k]
    return Neighbours(indices, similarities)
