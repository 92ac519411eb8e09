"""Nearest neighbours between two sets of rows, both ways, on the CPU, as `dmx.kernels.cross` defines them.

Method: as `knn.py`, with each tile of products tested against the thresholds of its rows and of its columns,
which start from what is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import Workers
from dmx.kernels.cpu.candidates import (
    LABEL,
    TILE,
    UNIT,
    Buffers,
    Candidates,
    bound_errors,
    constants_of,
    mean_of_some,
    prepare,
    product_dtype,
    rounding_of,
    tile_of,
)
from dmx.kernels.cpu.knn import Distinct, Neighbours, again_in_float32, distinct_rows, rescored, spread_all
from dmx.kernels.progress import counting


@dataclass(frozen=True)
class Wanted:
    """Rows that seek neighbours among others.

    Attributes:
        features: (N, D) float32 or float64; squares: (N,) float64, their squared lengths.
        least: (N,) float64, who is less similar is not wanted.
    """

    features: NDArray[Any]
    squares: NDArray[np.float64]
    least: NDArray[np.float64]


def cross_candidates(a: Wanted, b: Wanted, k: int) -> tuple[Candidates, Candidates]:
    """Candidates for the k nearest rows of `b` to every row of `a`, and of `a` to every row of `b`.

    Every product is computed once and tested against the thresholds of its row and of its column.
    """
    dtype = product_dtype(a.features.shape[1])
    mean = (mean_of_some(a.features, a.squares) + mean_of_some(b.features, b.squares)) / 2
    rows, columns = (prepare(side.features, side.squares, mean, dtype) for side in (a, b))
    constants = constants_of(rows, columns, mean), constants_of(columns, rows, mean)
    buffers = []
    for side, own, other, constant in ((a, rows, columns, constants[0]), (b, columns, rows, constants[1])):
        width = min(k, len(other.low))
        some = Buffers(
            len(side.features), width, bound_errors(own, other, rounding_of(dtype)), rounding_of(dtype)
        )
        some.want(side.least, constant)
        buffers.append(some)
    by_row, by_column = buffers
    down, across = (-(-len(side.low) // TILE) for side in (rows, columns))
    around = max(down, across)

    def both(block: int) -> int:
        tile = tile_of(rows, columns, block * TILE, (block + distance) % around * TILE)
        by_row.scan(tile, True, columns.offset)
        by_column.scan(tile, False, rows.offset)
        return tile.scores.size

    with Workers() as workers, counting(len(a.features) * len(b.features), LABEL, UNIT) as count:
        # Along a diagonal of tiles all rows differ, and so do all columns: no two threads feed one buffer.
        for distance in range(around):
            count(sum(workers.each(both, [i for i in range(down) if (i + distance) % around < across])))
    return by_row.finish(constants[0]), by_column.finish(constants[1])


@dataclass(frozen=True)
class _Side:
    """Distinct rows of one side of `cross_knn`, and the group of each of its rows."""

    distinct: Distinct
    wanted: Wanted

    @staticmethod
    def of(side: Wanted) -> _Side:
        distinct = distinct_rows(side.features)
        least = np.full(len(distinct.rows), np.inf)
        np.minimum.at(least, distinct.group, side.least)
        features = side.features
        if len(distinct.rows) < len(features):
            features = features[distinct.rows]
        return _Side(distinct, Wanted(features, side.squares[distinct.rows], least))


def cross_knn(a: Wanted, b: Wanted, k: int) -> tuple[Neighbours, Neighbours]:
    """The k nearest rows of `b` to every row of `a`, and of `a` to every row of `b`.

    Args:
        a: (A, D) float32 or float64, C-contiguous, finite, no row zero.
        b: (B, D) of the same type, likewise.
        k: columns wanted, >= 1.

    Returns:
        Neighbours (A, min(k, B)) and (B, min(k, A)). Lists end with -1 and `NOBODY` where fewer rows are as
        similar as is wanted; some that are less similar may be listed all the same.
    """
    sides = _Side.of(a), _Side.of(b)
    found = cross_candidates(sides[0].wanted, sides[1].wanted, k)
    lists = []
    for own, other, candidates in ((*sides, found[0]), (*sides[::-1], found[1])):
        rows, others = own.wanted, other.wanted
        width = min(k, len(others.features))
        again_in_float32(candidates, rows.features, rows.squares, others.features, others.squares, width)
        near = rescored(
            rows.features, rows.squares, others.features, others.squares, candidates, width, False
        )
        if len(rows.features) == len(own.distinct.group) and len(others.features) == len(
            other.distinct.group
        ):
            lists.append(near)
            continue
        columns = min(k, len(other.distinct.group))
        lists.append(spread_all(near, other.distinct, own.distinct.group, columns, False))
    return lists[0], lists[1]
