"""k-reciprocal re-ranking, sparse: no matrix of all images against all images.

Legend: N images, queries first and then the gallery; d(i, j) squared Euclidean distance, d*(i, j) = d(i, j) /
max_j d(i, j); V (N, N) sparse, the k-reciprocal features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array

from dmx.errors import DmxError
from dmx.evaluation.distances import Block, distance_blocks, rows_per_block, squared_distances, squared_norms
from dmx.kernels.knn import MOST, knn, self_knn
from dmx.kernels.progress import counting

TOLD_IMAGES = 8192  # images encoded between two reports of progress
UNIT = 1e-5  # how far a squared norm may be from 1, for distances to be ordered as cosines are

Features = NDArray[np.float32]


def check_parameters(k1: int, k2: int, lambda_: float) -> None:
    """Refuse parameters of re-ranking that are out of their range.

    Raises:
        DmxError: naming the parameter.
    """
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise DmxError(f"{name}: re-ranking wants at least 1, found {value}")
    if not 0 <= lambda_ <= 1:
        raise DmxError(f"lambda: re-ranking wants a share from 0 to 1, found {lambda_}")


def reranked_blocks(
    query: Features,
    gallery: Features,
    k1: int,
    k2: int,
    lambda_: float,
    block_bytes: int,
    device: str = "cpu",
) -> Iterator[Block]:
    """Blocks of re-ranked distances of queries to the gallery.

    1. rank(i): all N images by d(i, .), i itself first, equal distances by index.
    2. R(i): those of the first k1 + 1 of rank(i) that have i among their own first k1 + 1. For each j in
       R(i), with H(j) the same at round(k1 / 2): if |H(j) & R(i)| > 2/3 |H(j)|, add H(j) to the set.
    3. V[i, e] = exp(-d*(i, e)) over the set, divided by their sum; then V[i] <- mean of V over the first k2
       of rank(i).
    4. s(q, g) = sum_e min(V[q, e], V[g, e]); result (1 - lambda) (1 - s / (2 - s)) + lambda d*(q, g).

    Only the k1 + 1 neighbours and the nonzeros of V are kept: O(N k) memory beside one block of distances.
    The sums of step 4 run over an inverted index of the gallery.

    Args:
        query: (Q, D), gallery: (G, D).
        k1, k2: neighbourhood sizes of encoding and of query expansion, at least 1.
        lambda_: share of the original distance, in [0, 1].
        block_bytes: bytes of distances held at a time.
        device: where the neighbours of unit features are sought, as torch names it.

    Returns:
        Pairs (first query, distances (B, G) float32), as `distance_blocks`; V is there when they are.

    Raises:
        DmxError: a parameter out of its range.

    Source: Zhong, Zheng, Cao, Li, "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR
    2017, and its published code, for Euclidean distances.
    """
    check_parameters(k1, k2, lambda_)
    neighbours, farthest = _neighbours(query, gallery, max(k1 + 1, k2), block_bytes, device)
    V = _expand_queries(_encode(query, gallery, neighbours, farthest, k1), neighbours[:, :k2])
    blocks = distance_blocks(query, gallery, block_bytes)
    return _reranked(blocks, V[: len(query)], csc_array(V[len(query) :]), farthest, lambda_)


def _reranked(
    blocks: Iterator[Block],
    encoded_query: csr_array,
    inverted: csc_array,
    farthest: NDArray[np.float32],
    lambda_: float,
) -> Iterator[Block]:
    """Blocks of distances with the Jaccard distance mixed in, in place."""
    for start, block in blocks:
        rows = slice(start, start + len(block))
        block /= farthest[rows, None]
        part = encoded_query[rows]
        _mix_jaccard(
            part.indptr,
            part.indices,
            part.data,
            inverted.indptr,
            inverted.indices,
            inverted.data,
            float(lambda_),
            block,
        )
        yield start, block


def _neighbours(
    query: Features, gallery: Features, k: int, block_bytes: int, device: str
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The k nearest of all N images (N, k), themselves first, and the largest distance (N,), never 0."""
    norms = squared_norms(query), squared_norms(gallery)
    unit = all(np.abs(part - 1).max() <= UNIT for part in norms)
    k = min(k, len(query) + len(gallery))
    if unit and k <= MOST:
        nearest, farthest = _by_angle(query, gallery, k, device)
    else:
        nearest, farthest = _by_distance(query, gallery, norms, k, block_bytes)
    farthest[farthest == 0] = 1  # All images coincide: their distances are 0 by any measure.
    return nearest, farthest


def _by_angle(
    query: Features, gallery: Features, k: int, device: str
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Of unit features, by the kernels that clustering uses: exact, and faster."""
    x = torch.from_numpy(np.concatenate((query, gallery))).to(device)
    opposite = knn(-x, x, 1).similarities[:, 0]  # who is nearest to -x is farthest from x
    return self_knn(x, k).indices.cpu().numpy(), (2 + 2 * opposite).float().cpu().numpy()


def _by_distance(
    query: Features, gallery: Features, norms: tuple[Features, Features], k: int, block_bytes: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Of features of any length, from blocks of float32 distances."""
    Q, N = len(query), len(query) + len(gallery)
    rows = min(rows_per_block(N, block_bytes), N)
    buffer = np.empty((rows, N), dtype=np.float32)
    nearest = np.empty((N, k), dtype=np.int32)
    farthest = np.empty(N, dtype=np.float32)
    with counting(N, "re-ranking: neighbours", "images") as count:
        for base, part in ((0, query), (Q, gallery)):
            for start in range(0, len(part), rows):
                x = part[start : start + rows]
                block = buffer[: len(x)]
                # The two parts of a row are computed apart: a joint copy of the features would double them.
                squared_distances(x, query, norms[0], block[:, :Q])
                squared_distances(x, gallery, norms[1], block[:, Q:])
                first = base + start
                own = slice(first, first + len(x))
                _select(block, first, nearest[own], farthest[own])
                count(len(x))
    return nearest, farthest


@njit(cache=True, parallel=True)
def _select(distances, first, nearest, farthest):  # type: ignore[no-untyped-def]
    """Rows of `nearest`: own index, then by (distance, index). One pass, keeping a sorted list of k."""
    rows, N = distances.shape
    k = nearest.shape[1]
    for r in prange(rows):
        row = distances[r]
        own = first + r
        best = np.empty(k, dtype=np.float32)
        index = np.empty(k, dtype=np.int32)
        best[0], index[0] = -1.0, own
        held = 1
        largest = np.float32(0)
        for j in range(N):
            d = row[j]
            if j == own:
                continue
            if d > largest:
                largest = d
            if held == k and (k == 1 or d >= best[k - 1]):
                continue
            at = held if held < k else k - 1
            while best[at - 1] > d:
                best[at], index[at] = best[at - 1], index[at - 1]
                at -= 1
            best[at], index[at] = d, j
            if held < k:
                held += 1
        for t in range(k):  # a slice assignment would take seconds to compile
            nearest[r, t] = index[t]
        farthest[r] = largest


def _encode(
    query: Features,
    gallery: Features,
    neighbours: NDArray[np.int32],
    farthest: NDArray[np.float32],
    k1: int,
) -> csr_array:
    """V before query expansion: (N, N) sparse float32, rows sum to 1."""
    N = len(neighbours)
    half = round(k1 / 2) + 1  # Python rounds halves to even, as NumPy does.
    near, near_half = (np.ascontiguousarray(neighbours[:, :k]) for k in (k1 + 1, half))
    counts = np.empty(N, dtype=np.int64)
    for begin, end in _told(N, "re-ranking: sets"):
        _count_expanded(near, near_half, counts, begin, end)
    indptr = np.concatenate(([0], np.cumsum(counts)))
    indices = np.empty(int(indptr[-1]), dtype=np.int32)
    data = np.empty(int(indptr[-1]), dtype=np.float32)
    for begin, end in _told(N, "re-ranking: weights"):
        _weigh_expanded(near, near_half, query, gallery, farthest, indptr, indices, data, begin, end)
    return csr_array((data, indices, indptr), shape=(N, N))


def _told(images: int, label: str) -> Iterator[tuple[int, int]]:
    """Blocks [begin, end) of images, each counted when the next is asked for."""
    with counting(images, label, "images") as count:
        for begin in range(0, images, TOLD_IMAGES):
            end = min(begin + TOLD_IMAGES, images)
            yield begin, end
            count(end - begin)


@njit(cache=True)
def _contains(row, value):  # type: ignore[no-untyped-def]
    for entry in row:  # noqa: SIM110 - numba compiles no generator expression
        if entry == value:
            return True
    return False


@njit(cache=True)
def _reciprocal(neighbours, i):  # type: ignore[no-untyped-def]
    """Those neighbours of i that have i as a neighbour."""
    found = np.empty(neighbours.shape[1], dtype=np.int32)
    n = 0
    for j in neighbours[i]:
        if _contains(neighbours[j], i):
            found[n] = j
            n += 1
    return found[:n]


@njit(cache=True)
def _expanded(near, near_half, i):  # type: ignore[no-untyped-def]
    """The expanded k-reciprocal set of i, in no order."""
    R = _reciprocal(near, i)
    members = np.empty(len(R) * (1 + near_half.shape[1]), dtype=np.int32)
    n = 0
    for j in R:
        members[n] = j
        n += 1
    for j in R:
        H = _reciprocal(near_half, j)
        common = 0
        for e in H:
            if _contains(R, e):
                common += 1
        if 3 * common > 2 * len(H):
            for e in H:
                if not _contains(members[:n], e):
                    members[n] = e
                    n += 1
    return members[:n]


@njit(cache=True, parallel=True)
def _count_expanded(near, near_half, counts, begin, end):  # type: ignore[no-untyped-def]
    for i in prange(begin, end):
        counts[i] = len(_expanded(near, near_half, i))


@njit(cache=True, parallel=True)
def _weigh_expanded(  # type: ignore[no-untyped-def]
    near, near_half, query, gallery, farthest, indptr, indices, data, begin, end
):
    Q = len(query)
    for i in prange(begin, end):
        members = _expanded(near, near_half, i)
        weights = np.empty(len(members), dtype=np.float64)
        x = query[i] if i < Q else gallery[i - Q]
        for m in range(len(members)):
            e = members[m]
            y = query[e] if e < Q else gallery[e - Q]
            d = 0.0
            for c in range(len(x)):
                d += (np.float64(x[c]) - y[c]) ** 2
            weights[m] = np.exp(-d / farthest[i])
        total = 0.0
        for m in range(len(members)):
            total += weights[m]
        for m in range(len(members)):
            indices[indptr[i] + m] = members[m]
            data[indptr[i] + m] = weights[m] / total


def _expand_queries(V: csr_array, neighbours: NDArray[np.int32]) -> csr_array:
    """Mean of V over each image's first neighbours."""
    N, k2 = neighbours.shape
    if k2 == 1:
        return V
    share = np.full(N * k2, 1 / k2, dtype=np.float32)
    mean = csr_array((share, neighbours.ravel(), np.arange(N + 1) * k2), shape=(N, N))
    return csr_array(mean @ V)


@njit(cache=True, parallel=True)
def _mix_jaccard(  # type: ignore[no-untyped-def]
    query_starts, query_entries, query_values, column_starts, column_rows, column_values, lambda_, distances
):
    """distances <- (1 - lambda) (1 - s / (2 - s)) + lambda distances, in place."""
    rows, gallery = distances.shape
    for q in prange(rows):
        s = np.zeros(gallery, dtype=np.float64)
        for t in range(query_starts[q], query_starts[q + 1]):
            e, v = query_entries[t], query_values[t]
            for u in range(column_starts[e], column_starts[e + 1]):
                s[column_rows[u]] += min(v, column_values[u])
        for g in range(gallery):
            distances[q, g] = (1 - lambda_) * (1 - s[g] / (2 - s[g])) + lambda_ * distances[q, g]
