"""Are the results right? Neighbours against float64, labels against dense references and the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dmx.cluster import pseudo_labels
from dmx.cluster.reliability import reliable
from dmx.kernels.cpu import jaccard as cpu_jaccard
from dmx.kernels.cpu import k_reciprocal as cpu_k_reciprocal
from dmx.kernels.cpu import knn as cpu_knn
from dmx.kernels.dbscan import dbscan, dbscan_reference
from dmx.kernels.device import as_array
from dmx.kernels.jaccard import jaccard_reference
from dmx.kernels.k_reciprocal import k_reciprocal_reference
from dmx.kernels.knn import Neighbours, self_knn
from dmx.kernels.similarity import similarity_reference, squared_lengths
from dmx.kernels.sparse import SparseRows

TIE = 1e-6  # neighbours closer than this may come in either order
_CHUNK = 65536
MIN_SIZE = 5


def sample(n: int, count: int, device: torch.device) -> torch.Tensor:
    """`count` rows, the first and the last among them."""
    return torch.linspace(0, n - 1, min(count, n), device=device, dtype=torch.float64).round().long()


def similarities(queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Float64 similarities (Q, N), by brute force."""
    parts = features.split(_CHUNK)
    return torch.cat([similarity_reference(queries, part) for part in parts], 1)


def nearest(s: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of the k largest in every row, ties by the lower column."""
    return s.sort(dim=1, descending=True, stable=True).indices[:, :k]


def _compare(
    s: torch.Tensor, first: torch.Tensor, found: torch.Tensor, values: torch.Tensor
) -> dict[str, Any]:
    """Found neighbours against similarities s; `first` is s with every row's own column on top."""
    expected = nearest(first, found.shape[1])
    found = found.long()
    differs = found != expected
    gap = (s.gather(1, found) - s.gather(1, expected)).abs()
    ordered = found.sort(1).values
    repeated = int((ordered[:, 1:] == ordered[:, :-1]).sum())
    beyond = int((differs & (gap >= TIE)).sum())
    error = float((values - s.gather(1, found)).abs().max())
    return {
        "rows_checked": len(s), "differing": int(differs.sum()), "differing_beyond_ties": beyond,
        "repeated": repeated, "largest_similarity_error": error,
        "passed": beyond == 0 and repeated == 0 and error < 1e-9,
    }  # fmt: skip


def check_neighbours(features: torch.Tensor, near: Neighbours, rows: torch.Tensor) -> dict[str, Any]:
    """Neighbours of `rows` of a self-join."""
    s = similarities(features[rows], features)
    first = s.clone()
    first[torch.arange(len(rows), device=rows.device), rows] = 2.0
    return _compare(s, first, near.indices[rows], near.similarities[rows])


def check_queries(
    queries: torch.Tensor, features: torch.Tensor, near: Neighbours, rows: torch.Tensor
) -> dict[str, Any]:
    """Neighbours of `rows` of the queries."""
    s = similarities(queries[rows], features)
    return _compare(s, s, near.indices[rows], near.similarities[rows])


def array(labels: Any) -> np.ndarray:
    """Labels as they are compared, from a tensor or an array."""
    return labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)


def _labels_differ(found: Any, three: Sequence[Any]) -> dict[str, Any]:
    """Labels of `pseudo_labels` against three labelings, and what the reliability criterion makes of them."""
    tight, base, loose = (
        torch.as_tensor(labels, device=found.base.device) if isinstance(found.base, torch.Tensor)
        else array(labels)
        for labels in three
    )  # fmt: skip
    expected = {"tight": tight, "base": base, "loose": loose}
    expected["labels"] = reliable(tight, base, loose, MIN_SIZE, None).labels
    differing = {name: int((array(getattr(found, name)) != array(e)).sum()) for name, e in expected.items()}
    return {"differing": differing, "identities": found.num_identities, "passed": not any(differing.values())}


def check_labels(
    features: torch.Tensor, k1: int, k2: int, radii: Sequence[float], min_samples: int
) -> dict[str, Any]:
    """`pseudo_labels` against the dense float64 references, step by step from the oracle's neighbours."""
    s = similarities(features, features)
    s.fill_diagonal_(2.0)
    v = k_reciprocal_reference(features, nearest(s, k1), k1, k2)
    distances = torch.round(jaccard_reference(v), decimals=12)
    three = [dbscan_reference(distances, eps, min_samples) for eps in radii]
    found = pseudo_labels(features, k1=k1, k2=k2, min_samples=min_samples, device=features.device.type)
    return {"rows_checked": len(features), **_labels_differ(found, three)}


def check_with_cpu(
    features: torch.Tensor, k1: int, k2: int, radii: Sequence[float], min_samples: int
) -> dict[str, Any]:
    """`pseudo_labels` against the numba implementations, from the device's neighbours on."""
    near = self_knn(features, k1)
    lists = cpu_knn.Neighbours(near.indices.cpu().numpy(), near.similarities.cpu().numpy())
    squares = squared_lengths(features).cpu().numpy()
    v = cpu_k_reciprocal.k_reciprocal(as_array(features), squares, lists, k1, k2)
    pairs = SparseRows.of(cpu_jaccard.jaccard_pairs(v, radii[-1]))
    three = list(dbscan(pairs, radii, min_samples).numpy())
    found = pseudo_labels(features, k1=k1, k2=k2, min_samples=min_samples, device=features.device.type)
    return {"rows_checked": len(features), **_labels_differ(found, three)}
