"""Rows of one worker in inverted lists, by faiss; what is found in the lists that are searched is exact.

    found(q) = the k rows j with the largest (s(q, j), -j) among the rows of the lists searched for q

A row lies in the list of the centroid most similar to it. Which list that is, and which lists are nearest to
a query, is found exactly by `kernels/cpu/knn.py` and handed to faiss: products in float32 depend on the shape
of a block, and a row between two centroids would change lists with the number of workers. faiss scans the
lists in float32 and returns a few rows more than are wanted; these are compared in float64. Where the float32
value of the last one returned does not prove that nobody better was left out, all rows of the lists are
compared (many rows alike).

Equal rows are one row to faiss. faiss works on one thread at a time here, and blocks of queries run side by
side: no OpenMP team stays behind in a process that may fork later, and nothing depends on how many there are.

Symbols: n rows of this worker, D their width, L lists, P lists searched for a query, k neighbours.
Memory: 4 n D bytes for the lists beside the rows. Time: n P / L products of width D a query.
Source: Sivic and Zisserman, "Video Google", ICCV 2003; faiss's IndexIVFFlat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.kernels.cpu.blocks import run_blocks
from dmx.kernels.cpu.knn import Distinct, Neighbours, distinct_rows, knn, nobody
from dmx.kernels.cpu.listed import listed_knn
from dmx.kernels.sparse import places_of, starts_of

ROWS = 8192  # rows of a block: 64 MB in float64 at D = 1024
_ROUNDS = 10  # of k-means: later rounds move few rows
_SPARE = 24  # rows that faiss returns beyond those wanted
_QUERIES = 256  # queries a call of faiss gets on the CPU
_GPU_MOST = 2048  # rows and lists that faiss takes a query on a GPU
_ENTRIES = 2**22  # listed rows that are compared at a time

Floats = NDArray[Any]


def import_faiss() -> ModuleType:
    """faiss, which is not among the dependencies of this package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "knn: ivf wants faiss, which is not installed: `pip install faiss-cpu`, or `pip install "
            "faiss-gpu-cu12` to search on a GPU; or use the exact neighbours"
        ) from error
    module: ModuleType = faiss
    return module


@contextmanager
def _one_thread(faiss: ModuleType) -> Iterator[None]:
    """faiss computes on the calling thread alone."""
    before = faiss.omp_get_max_threads()  # the setting is that of the calling thread
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def unit_float32(rows: Floats, squares: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows (n, D) divided by their length in float64, then rounded to float32."""
    return (rows.astype(np.float64) / np.sqrt(squares)[:, None]).astype(np.float32)


def train_centroids(rows: NDArray[np.float32], lists: int, seed: int) -> NDArray[np.float32]:
    """Spherical k-means.

    Args:
        rows: (M, D), unit rows; lists: L, 1 to M.
        seed: draws the rows that the centroids begin as.

    Returns:
        (L, D), unit rows, the same for any number of threads: rows are assigned exactly, sums go in order.
    """
    chosen = np.random.default_rng(seed).choice(len(rows), lists, replace=False)
    centroids = rows[np.sort(chosen)]
    for _ in range(_ROUNDS):
        near = knn(rows, centroids, 1)
        label = near.indices[:, 0]
        sizes = np.bincount(label, minlength=lists)
        filled = sizes > 0
        order = np.argsort(label, kind="stable")
        begins = (np.cumsum(sizes) - sizes)[filled]
        sums = np.add.reduceat(rows[order], begins, axis=0, dtype=np.float64)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        # Rows that cancel out have no mean direction: their centroid stays.
        centroids[filled] = np.divide(
            sums, length, out=centroids[filled].astype(np.float64), where=length > 0
        )
        # Who nobody is near to moves to the rows that are worst off.
        worst = np.argsort(near.similarities[:, 0], kind="stable")
        centroids[~filled] = rows[worst[: lists - len(begins)]]
    return centroids


def nearest_lists(
    rows: NDArray[np.float32], centroids: NDArray[np.float32], sizes: NDArray[np.int64], probes: int,
    enough: int,
) -> NDArray[np.int32]:  # fmt: skip
    """The lists to search for every row, nearest first.

    Args:
        rows: (Q, D), unit rows; centroids: (L, D).
        sizes: (L,), rows in each list, over all workers.
        probes: lists wanted; twice as many, and so on, for a row whose lists hold fewer than `enough` rows.

    Returns:
        (Q, P), rows end with -1.
    """
    count = min(probes, len(centroids))
    out = np.empty((len(rows), 0), np.int32)
    short = np.arange(len(rows))
    while True:
        out = np.pad(out, ((0, 0), (0, count - out.shape[1])), constant_values=-1)
        if len(short):
            out[short] = knn(rows[short], centroids, count).indices
            short = short[sizes[out[short]].sum(1) < enough]
        if len(short) == 0 or count == len(centroids):
            return out
        count = min(2 * count, len(centroids))


@dataclass(frozen=True)
class Queries:
    """Rows that seek neighbours; tensors on the CPU, so that they can be sent.

    Attributes:
        rows: (Q, D) float32 or float64; squares: (Q,) float64, squared lengths.
        lists: (Q, P) int32, of `nearest_lists`.
        least: (Q,) float64, who is less similar is not wanted.
    """

    rows: torch.Tensor
    squares: torch.Tensor
    lists: torch.Tensor
    least: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.rows, self.squares, self.lists, self.least


@dataclass(frozen=True)
class Shard:
    """This worker's rows in lists.

    Attributes:
        rows: (n, D) float32 or float64; squares: (n,) float64.
        groups: which rows are equal: U groups.
        list_starts: (L + 1,) int64; list_groups: (U,) int64, the groups in each list.
        index: faiss's on the CPU; gpu_index: its copy on a GPU, or None.
    """

    rows: Floats
    squares: NDArray[np.float64]
    groups: Distinct
    list_starts: torch.Tensor
    list_groups: torch.Tensor
    index: Any
    gpu_index: Any

    @staticmethod
    def of(
        rows: Floats, squares: NDArray[np.float64], centroids: NDArray[np.float32], device: torch.device
    ) -> Shard:
        """Build the lists; (n, D) `rows`, (L, D) `centroids`, `device` where the features came from."""
        faiss = import_faiss()
        from faiss.contrib.ivf_tools import add_preassigned

        groups = distinct_rows(rows)
        label = np.empty(len(groups.rows), np.int64)
        with _one_thread(faiss):
            quantizer = faiss.IndexFlatIP(rows.shape[1])
            quantizer.add(centroids)
            index = faiss.IndexIVFFlat(quantizer, rows.shape[1], len(centroids), faiss.METRIC_INNER_PRODUCT)
            index.is_trained = True
            for begin in range(0, len(label), ROWS):
                numbers = np.arange(begin, min(begin + ROWS, len(label)))
                some = groups.rows[numbers]
                units = unit_float32(rows[some], squares[some])
                label[numbers] = knn(units, centroids, 1).indices[:, 0]
                add_preassigned(index, units, label[begin : begin + ROWS], numbers)
        starts = starts_of(torch.from_numpy(np.bincount(label, minlength=len(centroids))))
        members = torch.from_numpy(np.argsort(label, kind="stable"))
        return Shard(rows, squares, groups, starts, members, index, _on_gpu(index, device))

    def sizes(self) -> torch.Tensor:
        """(L,) int64, this worker's rows in each list, equal ones too."""
        copies = torch.from_numpy(np.diff(self.groups.starts))[self.list_groups]
        ends = torch.cat([copies.new_zeros(1), copies.cumsum(0)])
        return ends[self.list_starts].diff()

    def search(self, queries: Queries, k: int) -> Neighbours:
        """The k nearest rows in the lists of each query.

        Returns:
            Neighbours (Q, k) by numbers among this worker's rows. A list ends with -1 and `NOBODY` where
            fewer rows are as similar as is wanted.
        """
        if len(queries.rows) == 0 or len(self.rows) == 0:
            return nobody(len(queries.rows), k)
        least = queries.least.numpy()
        most = min(k + _SPARE, len(self.groups.rows))
        values, groups = self._scan(queries, most)
        # Two rounded unit rows, their products and sums: no float32 value is further from s.
        at_most = values + 1.01 * (self.rows.shape[1] + 8) * 2.0**-24
        wanted = (groups >= 0) & (at_most >= least[:, None])
        starts = np.concatenate([[0], np.cumsum(wanted.sum(1))])
        found = self._compare(queries, np.arange(len(least)), starts, groups[wanted], k)
        left = np.where(groups[:, -1] >= 0, at_most[:, -1], -np.inf)  # at least s of all left out
        lost = np.flatnonzero((left >= found.similarities[:, -1]) & (left >= least))
        self._compare_all(queries, lost, k, found)
        return found

    def _scan(self, queries: Queries, most: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(Q, most) float32 inner products as float64, and groups, best first; -1 where there are no more."""
        faiss = import_faiss()
        lists = queries.lists.numpy().astype(np.int64)
        on_gpu = self.gpu_index is not None and max(most, lists.shape[1]) <= _GPU_MOST
        index = self.gpu_index if on_gpu else self.index
        index.nprobe = lists.shape[1]
        rows, squares = queries.rows.numpy(), queries.squares.numpy()

        def scan(begin: int, end: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            units = unit_float32(rows[begin:end], squares[begin:end])
            with _one_thread(faiss):
                found: tuple[NDArray[np.float32], NDArray[np.int64]] = index.search_preassigned(
                    units, most, lists[begin:end], None
                )
            return found

        # A GPU's index serves one thread at a time.
        parts = [scan(0, len(rows))] if on_gpu else run_blocks(scan, len(rows), _QUERIES)
        values, groups = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return values.astype(np.float64), groups

    def _compare(
        self, queries: Queries, some: NDArray[np.int64], starts: NDArray[np.int64],
        entries: NDArray[np.int64], k: int,
    ) -> Neighbours:  # fmt: skip
        """The k nearest of the groups listed for `some` of the queries."""
        rows, squares, _, least = (tensor.numpy() for tensor in queries.tensors)
        return listed_knn(
            rows[some], squares[some], self.rows, self.squares, self.groups, starts, entries, least[some], k
        )

    def _compare_all(self, queries: Queries, lost: NDArray[np.int64], k: int, out: Neighbours) -> None:
        """The k nearest of all rows in the lists of the queries `lost`, into their rows of `out`."""
        lists = queries.lists[torch.from_numpy(lost)].long()
        begins = self.list_starts[lists]  # of list -1 it does not matter: it has no entries
        sizes = (self.list_starts[lists + 1] - begins).masked_fill(lists < 0, 0)
        step = 1 if len(lost) == 0 else max(1, _ENTRIES // max(1, int(sizes.sum(1).max())))
        for begin in range(0, len(lost), step):
            part = slice(begin, begin + step)
            entries = self.list_groups[places_of(begins[part].flatten(), sizes[part].flatten())]
            starts = starts_of(sizes[part].sum(1))
            found = self._compare(queries, lost[part], starts.numpy(), entries.numpy(), k)
            out.indices[lost[part]], out.similarities[lost[part]] = found.indices, found.similarities


def _on_gpu(index: Any, device: torch.device) -> Any:
    """A copy of the index (GpuIndexIVFFlat) on the GPU of the features, where this faiss can; else None.

    What faiss offers decides: its package for the CPU has no `StandardGpuResources`, and features on a GPU
    are then searched on the CPU. Lists, and which to search, come from the CPU all the same.
    """
    faiss = import_faiss()
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return None
    number = torch.cuda.current_device() if device.index is None else device.index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index)
