"""Runs one public operation on a small input and compares the result with that of its reference.

Every operation starts from what the references make of the steps before it, so that a fault shows where it
is. Imported only in the processes of `trials`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from dmx.cluster import PseudoLabels, pseudo_labels
from dmx.cluster.reliability import reliable
from dmx.kernels.dbscan import dbscan, dbscan_reference
from dmx.kernels.distinct import first_equal_reference
from dmx.kernels.jaccard import jaccard_pairs, jaccard_reference
from dmx.kernels.k_reciprocal import k_reciprocal, k_reciprocal_reference
from dmx.kernels.knn import Neighbours, knn, self_knn, self_knn_reference
from dmx.kernels.similarity import similarity_reference
from dmx.kernels.sparse import SparseRows, starts_of

K1, K2, RADII, MIN_SAMPLES, MIN_CLUSTER_SIZE = 30, 6, (0.58, 0.60, 0.62), 4, 5
# More than one block of rows, and a width that fills none of columns.
PEOPLE, IMAGES, WIDTH, QUERIES = 25, 12, 72, 40
_TIMED = 3  # calls, of which the fastest is told

# As the kernels' own files bound them: a step of the similarity's grid; sums of k1 numbers in another order;
# the 12 decimals of distances; float32.
_SIMILARITY, _WEIGHT, _DISTANCE, _CENTROID = 2.0**-44, 1e-12, 1.1e-12, 1e-6


class WrongResult(Exception):  # noqa: N818 - it is the result that is wrong
    """An operation returned something else than its reference."""


@dataclass(frozen=True)
class Sample:
    """The input, and what the references make of it; N images, Q queries.

    Attributes:
        features: (N, WIDTH) float32, the last two rows equal; queries: (Q, WIDTH).
        own: neighbours of the features, (N, K1); near: of the queries, (Q, K1).
        encoded: V, (N, N) float64.
        distances: (N, N) float64.
        labelings: (3, N) int64, one for each of RADII.
    """

    features: torch.Tensor
    queries: torch.Tensor
    own: Neighbours
    near: Neighbours
    encoded: torch.Tensor
    distances: torch.Tensor
    labelings: torch.Tensor

    @property
    def close(self) -> torch.Tensor:
        """(N, N) bool: pairs i < j within the largest radius."""
        return (self.distances <= RADII[-1]).triu(1)


@cache
def sample() -> Sample:
    """The same on every machine: people with several images each, of which some look like nobody's."""
    rng = np.random.default_rng(0)
    people = np.repeat(rng.standard_normal((PEOPLE, WIDTH)), IMAGES, 0)
    noisy = people + rng.uniform(0.5, 3.0, (len(people), 1)) * rng.standard_normal(people.shape)
    features = torch.from_numpy(noisy.astype(np.float32))
    features[-1] = features[-2]
    return sample_of(features, torch.from_numpy(rng.standard_normal((QUERIES, WIDTH)).astype(np.float32)))


def sample_of(features: torch.Tensor, queries: torch.Tensor) -> Sample:
    """What the references make of features and queries, (N, D) and (Q, D), N at least K1."""
    own = self_knn_reference(features, K1)
    encoded = k_reciprocal_reference(features, own.indices, K1, K2)
    distances = jaccard_reference(encoded)
    labelings = torch.stack([dbscan_reference(distances, eps, MIN_SAMPLES) for eps in RADII])
    return Sample(features, queries, own, _nearest(queries, features), encoded, distances, labelings)


def _nearest(queries: torch.Tensor, features: torch.Tensor) -> Neighbours:
    s = similarity_reference(queries, features)[:, first_equal_reference(features)]
    values, order = torch.sort(s, dim=1, descending=True, stable=True)
    return Neighbours(order[:, :K1].int(), values[:, :K1])


# What to call, and what raises WrongResult where the result is not what it should be.
Trial = tuple[Callable[[], Any], Callable[[Any], None]]


def _self_knn(given: Sample, device: torch.device) -> Trial:
    features = given.features.to(device)
    return lambda: self_knn(features, K1), partial(_compare_neighbours, given.own)


def _knn(given: Sample, device: torch.device) -> Trial:
    queries, features = given.queries.to(device), given.features.to(device)
    return lambda: knn(queries, features, K1), partial(_compare_neighbours, given.near)


def _k_reciprocal(given: Sample, device: torch.device) -> Trial:
    features = given.features.to(device)
    own = Neighbours(given.own.indices.to(device), given.own.similarities.to(device))
    check = partial(_compare_rows, given.encoded, given.encoded > 0, _WEIGHT)
    return lambda: k_reciprocal(features, own, K1, K2), check


def _jaccard_pairs(given: Sample, device: torch.device) -> Trial:
    encoded = _sparse(given.encoded, given.encoded > 0, device)
    check = partial(_compare_rows, given.distances, given.close, _DISTANCE)
    return lambda: jaccard_pairs(encoded, RADII[-1]), check


def _dbscan(given: Sample, device: torch.device) -> Trial:
    pairs = _sparse(given.distances, given.close, device)
    return lambda: dbscan(pairs, RADII, MIN_SAMPLES), partial(_compare_labels, given.labelings)


def _pseudo_labels(given: Sample, device: torch.device) -> Trial:
    features = given.features.to(device)
    return lambda: pseudo_labels(features, device=device.type), partial(_compare_pseudo_labels, given)


TRIALS: dict[str, Callable[[Sample, torch.device], Trial]] = {
    "self_knn": _self_knn,
    "knn": _knn,
    "k_reciprocal": _k_reciprocal,
    "jaccard_pairs": _jaccard_pairs,
    "dbscan": _dbscan,
    "pseudo_labels": _pseudo_labels,
}


def try_operation(name: str, device_name: str) -> dict[str, float]:
    """Run an operation.

    Args:
        name: one of TRIALS.
        device_name: `cpu`, `cuda:0`, ...

    Returns:
        Milliseconds of a call, and seconds of the first, which compiles.

    Raises:
        WrongResult: the result is not that of the reference.
    """
    device = torch.device(device_name)
    call, check = TRIALS[name](sample(), device)
    first_s, result = _timed(call, device)
    check(result)
    times_s = []
    for _ in range(_TIMED):
        seconds, result = _timed(call, device)
        times_s.append(seconds)
        check(result)
    return {"ms": round(1e3 * min(times_s), 3), "first_call_s": round(first_s, 6)}


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    _wait_for(device)
    start = time.perf_counter()
    result = call()
    _wait_for(device)
    return time.perf_counter() - start, result


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sparse(values: torch.Tensor, there: torch.Tensor, device: torch.device) -> SparseRows:
    """The entries of a dense matrix that are there."""
    columns = there.nonzero()[:, 1].int()
    return SparseRows(starts_of(there.sum(1)).to(device), columns.to(device), values[there].to(device))


def _compare_neighbours(wanted: Neighbours, found: Neighbours) -> None:
    indices, similarities = found.indices.cpu(), found.similarities.cpu()
    _compare_shapes(wanted.indices, indices)
    if others := int((indices != wanted.indices).any(1).sum()):
        raise WrongResult(f"other neighbours in {others} of {len(indices)} rows")
    _compare_values("similarities", wanted.similarities, similarities, _SIMILARITY)


def _compare_rows(wanted: torch.Tensor, there: torch.Tensor, tolerance: float, found: SparseRows) -> None:
    rows = SparseRows.of(found.on_cpu())
    places = (rows.rows, rows.indices.long())
    held = torch.zeros_like(there)
    held[places] = True
    missing, count = int((there & ~held).sum()), int(there.sum())
    if missing or len(rows.indices) != count:
        raise WrongResult(f"{len(rows.indices)} entries instead of {count}, {missing} of which are missing")
    _compare_values("entries", wanted[places], rows.values, tolerance)


def _compare_labels(wanted: torch.Tensor, found: torch.Tensor) -> None:
    labels = found.cpu()
    _compare_shapes(wanted, labels)
    if others := int((labels != wanted).sum()):
        raise WrongResult(f"other labels at {others} of {labels.numel()} places")


def _compare_pseudo_labels(given: Sample, found: PseudoLabels) -> None:
    tight, base, loose = given.labelings.numpy()
    _compare_labels(given.labelings, torch.from_numpy(np.stack([found.tight, found.base, found.loose])))
    wanted = torch.from_numpy(reliable(tight, base, loose, MIN_CLUSTER_SIZE, None).labels)
    _compare_labels(wanted, torch.from_numpy(found.labels))
    unit = torch.nn.functional.normalize(given.features.double(), dim=1, eps=1e-150)
    means = [unit[wanted == label].mean(0) for label in range(int(wanted.max()) + 1)]
    centroids = torch.nn.functional.normalize(torch.stack(means), dim=1)
    _compare_values("centroids", centroids, torch.from_numpy(found.centroids).double(), _CENTROID)


def _compare_shapes(wanted: torch.Tensor, found: torch.Tensor) -> None:
    if found.shape != wanted.shape:
        raise WrongResult(f"shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")


def _compare_values(what: str, wanted: torch.Tensor, found: torch.Tensor, tolerance: float) -> None:
    """All within the tolerance; NaN is within none."""
    _compare_shapes(wanted, found)
    error = (found - wanted).abs()
    if wrong := int((~(error <= tolerance)).sum()):
        raise WrongResult(f"{wrong} of {error.numel()} {what} off by up to {float(error.max()):.2g}")
