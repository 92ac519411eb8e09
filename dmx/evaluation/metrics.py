"""mAP, CMC and mINP from the ranks of the right answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

AveragePrecision = Literal["default", "trapezoid"]


@dataclass(frozen=True)
class Metrics:
    """Means over valid queries, as fractions of 1.

    Args:
        map: mean average precision.
        rank1, rank5, rank10: share of queries with a right answer among the first 1, 5, 10.
        minp: mean inverse negative penalty, right answers / rank of the last one.
        valid_queries: queries with at least one right answer in the gallery.
        num_queries: all queries.

    Source: mINP: Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2021.
    """

    map: float
    rank1: float
    rank5: float
    rank10: float
    minp: float
    valid_queries: int
    num_queries: int


def metrics_from_ranks(
    ranks: NDArray[np.int64], counts: NDArray[np.int64], ap: AveragePrecision = "default"
) -> Metrics:
    """Average over the queries that have right answers.

    Args:
        ranks: from 1, ascending within a query, query after query.
        counts: (Q,) how many of them belong to each query; at least one is not 0.
        ap: which average precision, see `average_precisions`.
    """
    valid = counts[counts > 0]
    starts = np.cumsum(valid) - valid
    first, last = ranks[starts], ranks[starts + valid - 1]
    return Metrics(
        map=float(np.mean(average_precisions(ranks, counts, ap))),
        rank1=float(np.mean(first <= 1)),
        rank5=float(np.mean(first <= 5)),
        rank10=float(np.mean(first <= 10)),
        minp=float(np.mean(valid / last)),
        valid_queries=len(valid),
        num_queries=len(counts),
    )


def average_precisions(
    ranks: NDArray[np.int64], counts: NDArray[np.int64], ap: AveragePrecision = "default"
) -> NDArray[np.float64]:
    """Average precision of each query that has right answers, (valid,), in order.

    With r_1 < ... < r_n the ranks of a query's right answers:

        default:    AP = 1/n sum_i i / r_i
        trapezoid:  AP = 1/n sum_i (i / r_i + (i - 1) / (r_i - 1)) / 2, where the second term is 1 for r_i = 1

    The trapezoid is the data sets' own evaluation code: precision is interpolated between the entry before
    a hit and the hit.

    Args:
        ranks: from 1, ascending within a query, query after query.
        counts: (Q,) how many of them belong to each query; at least one is not 0.
        ap: which of both.

    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015 (its evaluation code).
    """
    valid = counts[counts > 0]
    starts = np.cumsum(valid) - valid
    position = np.arange(len(ranks)) - np.repeat(starts, valid) + 1
    precision = position / ranks
    if ap == "trapezoid":
        before = np.where(ranks > 1, (position - 1) / np.maximum(ranks - 1, 1), 1.0)
        precision = (precision + before) / 2
    means: NDArray[np.float64] = np.add.reduceat(precision, starts) / valid
    return means
