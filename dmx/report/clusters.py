"""Which clusters of an epoch are worth a look: the largest, the least reliable, the dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmx.cluster.reliability import Fate
from dmx.train.clusters import EpochClusters

SHOWN = 3  # clusters of each kind
IMAGES = 8  # of each cluster
UNKNOWN = -1


@dataclass(frozen=True)
class Cluster:
    """One of DBSCAN's clusters.

    Attributes:
        number: as DBSCAN numbers it.
        size, kept: its images, and those of them that train.
        independence, compactness: 0 is the most reliable.
        fate: of the cluster: kept, or what befell most of its images.
        purity: share of its images of known identity that are of the most frequent one; None where no
            identity is known.
        identity: the most frequent one, -1 where none is known.
        rows, dropped: some of its images that train, and some that do not.
    """

    number: int
    size: int
    kept: int
    independence: float
    compactness: float
    fate: Fate
    purity: float | None
    identity: int
    rows: NDArray[np.int64]
    dropped: NDArray[np.int64]


@dataclass(frozen=True)
class Sheet:
    """What is shown of an epoch.

    Attributes:
        epoch: from 0.
        threshold: the largest independence that is kept; None when there was none yet.
        used: whether the epoch trained on the clusters.
        clusters, identities: how many DBSCAN found, and how many stayed.
        fates: how many images had which fate.
        largest, least_reliable, dropped: some clusters.
        outliers: rows of some images that belong to no cluster.
    """

    epoch: int
    threshold: float | None
    used: bool
    clusters: int
    identities: int
    fates: dict[Fate, int]
    largest: list[Cluster]
    least_reliable: list[Cluster]
    dropped: list[Cluster]
    outliers: NDArray[np.int64]


def fates_of(found: EpochClusters) -> dict[Fate, int]:
    """How many images had which fate."""
    counts = np.bincount(found.evidence.fates, minlength=len(Fate))
    return {fate: int(counts[fate]) for fate in Fate}


def sheet_of(found: EpochClusters, identities: NDArray[np.int64] | None) -> Sheet:
    """Choose what to show.

    Args:
        found: the clusters of an epoch, N images.
        identities: (N,) true ones, -1 unknown; None where the target is not at hand.
    """
    evidence = found.evidence
    count = len(evidence.independence)
    inside = evidence.clusters >= 0
    sizes = np.bincount(evidence.clusters[inside], minlength=count)
    kept = np.bincount(evidence.clusters[inside & (evidence.fates == Fate.KEPT)], minlength=count)
    numbers = np.arange(count)
    stays = numbers[kept > 0]
    # Lexsort's last key decides first; equal clusters come by their number.
    by_size = stays[np.lexsort((stays, -kept[stays]))]
    by_doubt = stays[np.lexsort((stays, -evidence.compactness[stays], -evidence.independence[stays]))]
    gone = numbers[kept == 0]
    gone = gone[np.lexsort((gone, -sizes[gone]))]

    def looked_at(chosen: NDArray[np.int64]) -> list[Cluster]:
        return [_cluster(found, int(number), int(sizes[number]), identities) for number in chosen[:SHOWN]]

    return Sheet(
        found.epoch,
        found.independence_threshold,
        found.used,
        count,
        len(stays),
        fates_of(found),
        looked_at(by_size),
        looked_at(by_doubt),
        looked_at(gone),
        spread(np.flatnonzero(evidence.fates == Fate.OUTLIER), IMAGES),
    )


def _cluster(found: EpochClusters, number: int, size: int, identities: NDArray[np.int64] | None) -> Cluster:
    evidence = found.evidence
    rows = np.flatnonzero(evidence.clusters == number)
    fates = evidence.fates[rows]
    kept = rows[fates == Fate.KEPT]
    fate = Fate.KEPT if len(kept) else Fate(int(np.argmax(np.bincount(fates))))
    known = np.array([], np.int64) if identities is None else identities[rows]
    names, counts = np.unique(known[known != UNKNOWN], return_counts=True)
    shown = spread(kept, IMAGES)
    return Cluster(
        number,
        size,
        len(kept),
        float(evidence.independence[number]),
        float(evidence.compactness[number]),
        fate,
        float(counts.max() / counts.sum()) if len(counts) else None,
        int(names[np.argmax(counts)]) if len(counts) else UNKNOWN,
        shown,
        spread(rows[fates != Fate.KEPT], IMAGES if not len(kept) else IMAGES // 2),
    )


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of them, evenly spread."""
    if len(rows) <= count:
        return rows
    chosen: NDArray[np.int64] = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    return chosen


def chosen_epochs(epochs: Sequence[int], count: int) -> list[int]:
    """At most `count` epochs, evenly spread; the last is among them, and with two or more the first."""
    if count < 2:
        return list(epochs[-count:]) if count else []
    return [int(epoch) for epoch in spread(np.array(epochs, np.int64), count)]
