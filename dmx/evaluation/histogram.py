"""How far apart images of one person and of different people are, counted a block of distances at a time.

A million galleries' distances to ten thousand queries would be 40 GB; their histogram is a few kilobytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dmx.errors import DmxError
from dmx.evaluation.distances import distance_blocks
from dmx.evaluation.embedded import UNKNOWN, Embedded
from dmx.kernels.progress import counting

# Cosine distance 1 - cos of unit vectors lies in [0, 2]. The error of a threshold is half a bin: 0.0005.
BINS = 2000
LARGEST = 2.0


@dataclass
class DistanceHistogram:
    """Counts of pairs of a query and a gallery image of other cameras, by cosine distance.

    Pairs of one camera are left out, as the protocol leaves them out of the right answers, and so is
    identity -1. An unknown camera (-1) is another than any.

    Attributes:
        same, different: (BINS,) int64, pairs of one identity and of two.
    """

    same: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    different: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(
        self,
        squared_distances: NDArray[np.float32],
        query_identities: NDArray[np.int64],
        query_cameras: NDArray[np.int32],
        gallery_identities: NDArray[np.int64],
        gallery_cameras: NDArray[np.int32],
    ) -> None:
        """Count a block.

        Args:
            squared_distances: (B, G) Euclidean, of unit vectors: 2 - 2 cos.
            query_identities, query_cameras: (B,).
            gallery_identities, gallery_cameras: (G,).
        """
        labels = query_identities, query_cameras, gallery_identities, gallery_cameras
        _count(squared_distances, *labels, self.same, self.different)

    def drawn(self, bins: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Edges (bins + 1,), and the shares of same and different pairs in each bin; `bins` divides BINS."""
        edges = np.linspace(0, LARGEST, bins + 1)
        same, different = (_shares(side.reshape(bins, -1).sum(1)) for side in (self.same, self.different))
        return edges, same, different

    @property
    def is_complete(self) -> bool:
        """Whether there are pairs of both kinds."""
        return bool(self.same.any() and self.different.any())

    def overlap(self, bins: int = 100) -> float:
        """The area that both histograms share, of `bins` bins: 0 apart, 1 indistinguishable."""
        _, same, different = self.drawn(bins)
        return float(np.minimum(same, different).sum())

    def equal_error(self) -> tuple[float, float]:
        """Equal error rate, and the cosine distance that has it.

        There, as large a share of same pairs lies beyond as of different pairs within.
        """
        missed = 1 - np.cumsum(_shares(self.same))
        accepted = np.cumsum(_shares(self.different))
        place = int(np.argmin(np.abs(missed - accepted)))
        return float((missed[place] + accepted[place]) / 2), (place + 1) * LARGEST / BINS

    def true_positive_rate(self, false_positive_rate: float) -> tuple[float, float]:
        """The share of same pairs within the largest threshold that this share of different pairs is within.

        Args:
            false_positive_rate: at most this share of different pairs is taken for the same, 0 to 1.

        Returns:
            The rate, and the threshold, a cosine distance; 0 and 0 where no threshold is strict enough.
        """
        accepted = np.cumsum(self.different)
        bins = int(np.searchsorted(accepted, false_positive_rate * accepted[-1], side="right"))
        return int(self.same[:bins].sum()) / max(int(self.same.sum()), 1), bins * LARGEST / BINS


def distance_histogram(query: Embedded, gallery: Embedded, block_bytes: int) -> DistanceHistogram:
    """All distances of a query and a gallery, counted.

    Args:
        query, gallery: embeddings of unit length.
        block_bytes: bytes of distances held at a time.

    Raises:
        DmxError: there are no pairs of one identity, or none of two.
    """
    histogram = DistanceHistogram()
    with counting(len(query), "distances", "queries") as count:
        for start, block in distance_blocks(query.features, gallery.features, block_bytes):
            part = slice(start, start + len(block))
            histogram.add(
                block, query.identities[part], query.cameras[part], gallery.identities, gallery.cameras
            )
            count(len(block))
    if not histogram.is_complete:
        lacking = "different people" if histogram.same.any() else "one person"
        raise DmxError(
            f"wanted pairs of one person and of different people under different cameras, found none of "
            f"{lacking}"
        )
    return histogram


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return counts / max(int(counts.sum()), 1)


@njit(cache=True)
def _count(distances, query_ids, query_cameras, gallery_ids, gallery_cameras, same, different):  # type: ignore[no-untyped-def]
    """Add to both counts, in one pass; the product that made the distances takes many times as long."""
    scale = np.float32(BINS / (2 * LARGEST))
    for i in range(distances.shape[0]):
        if query_ids[i] == UNKNOWN:
            continue
        for j in range(distances.shape[1]):
            if gallery_ids[j] == UNKNOWN:
                continue
            if query_cameras[i] == gallery_cameras[j] and query_cameras[i] != UNKNOWN:
                continue
            place = min(int(distances[i, j] * scale), BINS - 1)
            if query_ids[i] == gallery_ids[j]:
                same[place] += 1
            else:
                different[place] += 1
