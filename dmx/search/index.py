"""A gallery in a faiss index: exact, or in inverted lists with a recall that is measured.

    sim(q, g) = <q, g>        q, g unit embeddings: the cosine of their angle

Symbols: N rows, D their width, Q queries, k hits; L lists, P of which are searched for a query.
Memory: 4 N D bytes, for a moment twice that while they grow or are put into lists; images are embedded a part
at a time. Time of a query: N D products, N D P / L with lists.
Source: faiss's IndexFlatIP and IndexIVFFlat; centroids and recall as `dmx.cluster.approximate` has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dmx.cluster.approximate import PROBES, RECALL, default_lists
from dmx.cluster.inverted_lists import ROWS, import_faiss, train_centroids
from dmx.data.layouts import Unreadable
from dmx.errors import DmxError
from dmx.kernels.progress import counting
from dmx.search.encoder import Encoder, ModelRecord
from dmx.search.gallery import Gallery, Part
from dmx.search.images import Origin

Kind = Literal["flat", "ivf"]
KINDS: tuple[Kind, ...] = ("flat", "ivf")
# Rows of a gallery that the recall is measured on, and rows a list that centroids are trained on: as in
# clustering.
RECALL_ROWS, ROWS_PER_LIST = 1000, 64
SCHEMA = pa.schema(
    [("row", pa.int64()), ("key", pa.string()), ("identity", pa.int64()), ("camera", pa.int32())]
)


def require_faiss() -> ModuleType:
    """faiss, which is not among the dependencies of DMX.

    Raises:
        DmxError: it is not installed.
    """
    try:
        return import_faiss()
    except ImportError as error:
        raise DmxError(
            "wanted faiss, found that it is not installed; `pip install 'dmx[search]'` brings it, as does "
            "`pip install faiss-cpu`"
        ) from error


@dataclass(frozen=True)
class Lists:
    """How an approximate index searches, and how well.

    Attributes:
        lists: L; probes: P.
        recall: share of the exact `neighbours` nearest others that were found, for `sampled` rows.
    """

    lists: int
    probes: int
    recall: float
    neighbours: int
    sampled: int

    def told(self) -> tuple[str, bool]:
        """What to say of the recall, and whether it is below 0.98: a warning then."""
        text = (
            f"{self.probes} of {self.lists} lists are searched; recall {self.recall:.4f} of the "
            f"{self.neighbours} nearest others, measured on {self.sampled} rows"
        )
        if self.recall >= RECALL:
            return text, False
        return f"{text}: below {RECALL}; search more lists with --probes, or build an exact index", True


@dataclass(frozen=True)
class Index:
    """Embeddings of a gallery, whose they are, and what they were made of.

    Attributes:
        vectors: the faiss index.
        rows: a `pyarrow.Table` of N rows: row in the gallery, key, identity and camera (-1 unknown).
        model: what embedded them.
        gallery: where they come from; fingerprint: what it is known by.
        origin: of the images, if known.
        lists: None for an exact index.
        left_out: images of the gallery that cannot be decoded.
    """

    vectors: Any
    rows: Any
    model: ModelRecord
    gallery: str
    fingerprint: str
    origin: Origin | None
    lists: Lists | None
    left_out: tuple[Unreadable, ...]

    def __len__(self) -> int:
        """Rows, N."""
        return int(self.vectors.ntotal)

    @property
    def kind(self) -> Kind:
        """`flat` or `ivf`."""
        return "flat" if self.lists is None else "ivf"

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The rows most similar to each query, best first, equal ones by row.

        Args:
            queries: (Q, D) unit embeddings.
            k: hits wanted, at least 1; min(k, N) are returned.

        Returns:
            rows (Q, min(k, N)) of the index, similarities of the same shape.
        """
        k = min(k, len(self))
        if self.lists is None:
            similarities, rows = self.vectors.search(queries, k)
        else:
            similarities, rows = search_lists(self.vectors, queries, k, self.lists.probes)
        order = np.lexsort((rows, -similarities))
        return np.take_along_axis(rows, order, 1), np.take_along_axis(similarities, order, 1)


def build(gallery: Gallery, encoder: Encoder, kind: Kind, probes: int | None, neighbours: int) -> Index:
    """Embed a gallery into an index.

    Args:
        gallery: what to search.
        encoder: its model.
        kind: exact, or inverted lists.
        probes: lists searched for a query; None for 256, all where there are fewer.
        neighbours: how many the recall is measured for.

    Raises:
        DmxError: no image that can be decoded, or one without a direction; faiss is not installed.
    """
    faiss = require_faiss()
    vectors, tables = faiss.IndexFlatIP(encoder.record.width), []
    for part in gallery.parts(encoder):
        vectors.add(part.features)
        tables.append(_table(part))
    if not vectors.ntotal:
        raise DmxError(
            f"{gallery.path}: wanted images to search, found {len(gallery.left_out)}, none of which can be "
            "decoded; choose another gallery"
        )
    lists = None
    if kind == "ivf":
        vectors = into_lists(vectors, default_lists(vectors.ntotal))
        probes = min(PROBES if probes is None else probes, vectors.nlist)
        lists = measured(vectors, probes, neighbours)
    return Index(
        vectors,
        pa.concat_tables(tables).combine_chunks(),
        encoder.record,
        gallery.path,
        gallery.fingerprint,
        gallery.origin,
        lists,
        tuple(gallery.left_out),
    )


def _table(part: Part) -> Any:
    # A file name may hold bytes that are no text, which Parquet does not take.
    keys = [key.encode("utf-8", "backslashreplace").decode() for key in part.keys]
    columns = [part.rows, pa.array(keys, pa.string()), part.identities, part.cameras]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)


def into_lists(flat: Any, lists: int, seed: int = 0) -> Any:
    """The rows of an exact index in inverted lists.

    Args:
        flat: a faiss `IndexFlatIP`.
        lists: L, at most N.
        seed: draws the rows that centroids are trained on.

    Returns:
        A faiss `IndexIVFFlat`.
    """
    faiss = require_faiss()
    chosen = np.random.default_rng(seed).choice(
        flat.ntotal, min(ROWS_PER_LIST * lists, flat.ntotal), replace=False
    )
    quantizer = faiss.IndexFlatIP(flat.d)
    quantizer.add(train_centroids(flat.reconstruct_batch(np.sort(chosen)), lists, seed))
    index = faiss.IndexIVFFlat(quantizer, flat.d, lists, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    with counting(flat.ntotal, "lists", "rows") as count:
        for begin in range(0, flat.ntotal, ROWS):
            rows = min(ROWS, flat.ntotal - begin)
            index.add(flat.reconstruct_n(begin, rows))
            count(rows)
    return index


def search_lists(
    index: Any, queries: NDArray[np.float32], k: int, probes: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Similarities and rows (Q, k), best first, in the `probes` lists nearest to each query.

    A query whose lists hold fewer than k rows has twice as many searched, and so on.
    """
    index.nprobe = min(probes, index.nlist)
    similarities, rows = index.search(queries, k)
    while index.nprobe < index.nlist and (short := np.flatnonzero(rows[:, -1] < 0)).size:
        index.nprobe = min(2 * index.nprobe, index.nlist)
        similarities[short], rows[short] = index.search(queries[short], k)
    return similarities, rows


def with_probes(index: Index, probes: int, neighbours: int) -> Index:
    """An index of lists that searches `probes` of them for a query, its recall measured anew."""
    if index.lists is None or index.lists.probes == min(probes, index.lists.lists):
        return index
    return replace(index, lists=measured(index.vectors, min(probes, index.lists.lists), neighbours))


def measured(index: Any, probes: int, neighbours: int, seed: int = 0) -> Lists:
    """Compare what an approximate index finds, for some of its own rows, with what all of its lists hold.

    Who is as similar as the last of the exact neighbours is as right as that one; the row itself does not
    count.

    Args:
        index: a faiss `IndexIVFFlat` of N rows.
        probes: lists searched for a row.
        neighbours: others that are sought, at most N - 1.
        seed: draws the rows.
    """
    count = index.ntotal
    k = min(neighbours, count - 1)
    chosen = np.sort(np.random.default_rng(seed).choice(count, min(RECALL_ROWS, count), replace=False))
    recall = 1.0
    if k:
        index.make_direct_map()  # to find rows in their lists
        queries = index.reconstruct_batch(chosen)
        index.set_direct_map_type(require_faiss().DirectMap.NoMap)
        exact, _ = search_lists(index, queries, k + 1, index.nlist)
        similarities, rows = search_lists(index, queries, k + 1, probes)
        right = (similarities >= exact[:, -1:]) & (rows != chosen[:, None])
        # Where many rows are equal, the row itself may be missing among its own.
        recall = float(np.minimum(right.sum(1), k).mean() / k)
    return Lists(index.nlist, probes, recall, k, len(chosen))
