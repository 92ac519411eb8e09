"""Exact k nearest neighbours by cosine similarity.

    knn(i) = the k rows j with the largest (s(i, j), -j)        s of `similarity.py`, float64

A self-join puts row i first, then the k - 1 others: higher similarity, then lower index.
N < k gives N columns.

Method, on a GPU: equal rows are joined (`distinct.py`); a float16 product fused with a filter leaves a short
list that provably holds all neighbours (`candidates.py`); the list is rescored in float64 (`rescore.py`), and
rows whose list did not fit are compared with everybody in float64 (`exact.py`). On the CPU `cpu/knn.py` has
the same results.

Shapes: features (N, D), queries (Q, D) of any floating type; indices (., k) int32, similarities float64.
Error: none in the indices; similarities as in `similarity.py`.
Time: 2 N^2 D operations on the tensor cores, half for a self-join, and O(N k D). Memory: O(N (k + D)); see
`plan_knn`. Neither N x N nor N x block numbers are ever stored.
Source: the neighbour step of k-reciprocal encoding, Zhong et al., CVPR 2017, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmx.kernels import candidates, exact
from dmx.kernels.candidates import Candidates, Scan, capacity_for
from dmx.kernels.cpu import candidates as cpu_candidates
from dmx.kernels.cpu import knn as cpu
from dmx.kernels.device import as_array, takes_triton
from dmx.kernels.distinct import distinct, first_equal_reference, spread
from dmx.kernels.memory import Plan, free_bytes, split
from dmx.kernels.progress import counting
from dmx.kernels.rescore import Best, Side, rescore, select
from dmx.kernels.similarity import GRID, similarity_reference, squared_lengths
from dmx.kernels.unit_rows import WIDTH, UnitRows, mean_of_units, shuffled, unit_rows

MOST = 64  # neighbours on a GPU: candidates have to fit into registers to be ranked
_RESCORED_ROWS = 2**16  # rows rescored at a time
_HASH_BYTES = 64  # a row, while hashes are sorted to find equal rows


@dataclass(frozen=True)
class Neighbours:
    """Nearest rows first; of a set within itself every row itself before all others, whoever equals it.

    Attributes:
        indices: (N, K) int32.
        similarities: (N, K) float64, s of `similarity.py`.
    """

    indices: torch.Tensor
    similarities: torch.Tensor


def self_knn_reference(features: torch.Tensor, k: int) -> Neighbours:
    """The formula, dense: every row first in its own list."""
    first = first_equal_reference(features)
    s = similarity_reference(features, features)[first][:, first]  # equal rows share the values of one
    order = torch.argsort(s.clone().fill_diagonal_(2), dim=1, descending=True, stable=True)[:, :k]
    values = s.gather(1, order)
    values[:, 0] = 1.0
    return Neighbours(order.int(), values)


def plan_knn(queries: int | None, n: int, d: int, k: int, free: int | None = None) -> Plan:
    """What `knn` takes on a GPU beside its arguments; `self_knn` where `queries` is None.

    Args:
        queries: rows sought for; n: rows sought among; d: their width; k: 1 to 64.
        free: bytes the device has left; None for as much as is wanted.

    Returns:
        Plan. A self-join of one pass uses symmetry; passes over parts of the rows take twice the products.

    Raises:
        NotEnoughMemory: not even a pass of 256 rows fits.
    """
    rows = n if queries is None else queries
    fixed = prepared_bytes(n, d) + 24 * rows * k
    if queries is not None:
        fixed += prepared_bytes(queries, d) - queries * _HASH_BYTES
    fixed += finish_bytes(rows, k)
    return split("knn", rows, fixed, row_bytes(k), free, least_rows=candidates.BLOCK)


def prepared_bytes(n: int, d: int) -> int:
    """Rows ready for the product, and what finding equal ones takes."""
    width = -(-d // WIDTH) * WIDTH
    return (n + candidates.BLOCK) * (2 * width + 60) + n * _HASH_BYTES


def row_bytes(k: int) -> int:
    """A row's buffer, count, limit, base and constant, place and turn."""
    return 8 * capacity_for(k) + 48


def finish_bytes(rows: int, k: int) -> int:
    """What rescoring holds at a time."""
    return 12 * min(rows, _RESCORED_ROWS) * capacity_for(k)


def finish(
    queries: Side, others: Side, columns: UnitRows, found: Candidates, targets: torch.Tensor, out: Best,
    k: int, own: bool, all_wanted: bool = True,
) -> None:  # fmt: skip
    """Candidates -> their rows of `out`, (R,) `targets`.

    Fewer than k candidates are enough unless `all_wanted`: nobody else is similar enough.
    """
    visit = torch.argsort(
        targets
    )  # in the order of the features, where images of a person often lie together
    for start in range(0, len(visit), _RESCORED_ROWS):
        some = visit[start : start + _RESCORED_ROWS].int()
        best, counts = rescore(queries, others, found, columns.ids, some, k)
        select(best, counts, targets[some].int(), out, k)
        del best, counts  # before the next are taken
    held = found.counts[: len(visit)]
    lost = torch.nonzero((held > found.packed.shape[1]) | ((held < k) & all_wanted)).flatten()
    for some in torch.split(lost, _RESCORED_ROWS) if len(lost) else ():
        again = exact.search(queries, others, found.rows[some], columns.ids, k, own)
        out.ids[targets[some], :k] = again.ids
        out.steps[targets[some], :k] = again.steps


def _best(queries: Side, others: Side, k: int, own: bool, out: Best) -> None:
    """The k best others of every query, into the first k columns of `out`."""
    mean = mean_of_units(others.features, others.squares)
    targets = shuffled(len(others.rows), others.rows.device)
    columns = unit_rows(others.features, others.squares, others.rows[targets].int(), mean, candidates.BLOCK)
    rows = columns
    if not own:
        rows = unit_rows(queries.features, queries.squares, queries.rows.int(), mean, candidates.BLOCK)
        targets = torch.arange(len(queries.rows), device=queries.rows.device)
    plan = split("knn", len(rows), finish_bytes(len(rows), k), row_bytes(k), free_bytes(columns.low.device),
                 least_rows=candidates.BLOCK)  # fmt: skip
    pairs = cpu_candidates.pairs_within(len(rows)) if own else len(rows) * len(columns)
    with counting(pairs, cpu_candidates.LABEL, cpu_candidates.UNIT) as count:
        for begin in range(0, len(rows), plan.rows_per_pass):
            end = min(begin + plan.rows_per_pass, len(rows))
            scan = Scan(rows, columns, mean, k, own)
            found = scan.ring() if own and plan.passes == 1 else scan(begin, end)
            finish(queries, others, columns, found, targets[begin:end], out, k, own)
            del scan, found  # their buffers, before the next pass takes its own
            count(pairs * end // len(rows) - pairs * begin // len(rows))


def checked(features: torch.Tensor, k: int) -> torch.Tensor:
    if not 1 <= k <= MOST:
        raise ValueError(f'k: wanted 1 to {MOST} neighbours on a GPU, found {k}; use device="cpu" for more')
    return features.detach().contiguous()


def neighbours_of(best: Best) -> Neighbours:
    return Neighbours(best.ids, best.steps.double() / GRID)


def self_knn(features: torch.Tensor, k: int, *, squares: torch.Tensor | None = None) -> Neighbours:
    """The k nearest rows of every row, itself first.

    Args:
        features: (N, D) float16, bfloat16, float32 or float64, finite, no row zero.
        k: columns wanted, >= 1, on a GPU <= 64; min(k, N) are returned.
        squares: (N,) float64 squared lengths where the caller has them already.

    Returns:
        Neighbours of shape (N, min(k, N)), on the device of the features.

    Raises:
        ValueError: k is more than a GPU takes.
        NotEnoughMemory: see `plan_knn`.
    """
    if not takes_triton(features):
        given = None if squares is None else squares.numpy()
        found = cpu.self_knn(as_array(features), k, squares=given)
        return Neighbours(torch.from_numpy(found.indices), torch.from_numpy(found.similarities))
    features, n = checked(features, k), len(features)
    squares = squared_lengths(features) if squares is None else squares
    groups = distinct(features)
    rows = torch.arange(n, device=features.device) if groups is None else groups.rows
    width = min(k, len(rows))
    out = Best.empty(len(rows), width, features.device)
    out.ids[:, 0], out.steps[:, 0] = rows, int(GRID)
    if width > 1:
        side = Side(features, squares, rows)
        _best(side, side, width - 1, True, out.right_of(1))
    if groups is not None:
        out = spread(out, groups, groups.group, min(k, n), True)
    return neighbours_of(out)


def knn(queries: torch.Tensor, features: torch.Tensor, k: int) -> Neighbours:
    """The k nearest rows of `features` (N, D) to every query (Q, D): higher similarity, then lower index.

    Args:
        queries: (Q, D) on the device of the features, finite, no row zero.
        features: (N, D) float16, bfloat16, float32 or float64, likewise.
        k: columns wanted, >= 1, on a GPU <= 64; min(k, N) are returned.

    Returns:
        Neighbours of shape (Q, min(k, N)), on the device of the features.

    Raises:
        ValueError: k is more than a GPU takes.
        NotEnoughMemory: see `plan_knn`.
    """
    if not takes_triton(features):
        x, y = as_array(queries), as_array(features)
        found = cpu.knn(x.astype(y.dtype, copy=False), y, k)
        return Neighbours(torch.from_numpy(found.indices), torch.from_numpy(found.similarities))
    features, queries = checked(features, k), checked(queries, k)
    groups = distinct(features)
    rows = torch.arange(len(features), device=features.device) if groups is None else groups.rows
    wanted = torch.arange(len(queries), device=features.device)
    out = Best.empty(len(queries), min(k, len(rows)), features.device)
    others = Side(features, squared_lengths(features), rows)
    _best(Side(queries, squared_lengths(queries), wanted), others, out.ids.shape[1], False, out)
    if groups is not None:
        out = spread(out, groups, wanted, min(k, len(features)), False)
    return neighbours_of(out)
