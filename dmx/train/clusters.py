"""The clusters of each epoch, kept in RUN/clusters to look at afterwards. Training itself never reads them.

    epoch-00005.safetensors    (epochs count from 0)
        clusters      (N,) int32    DBSCAN's clusters of the target's images, -1 for outliers
        fates         (N,) uint8    kept, or why not: `dmx.cluster.reliability.Fate`
        independence  (B,) float64  of each cluster, 0 is the most reliable
        compactness   (B,) float64

Pseudo-identities follow from them (`labels_of`). Five bytes an image and 16 a cluster: about 6 MB for a
million images, 1.4 GB for 60 epochs of four million. `schedule.keep_clusters` limits how many stay.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dmx.cluster.reliability import Evidence, labels_of
from dmx.errors import DmxError
from dmx.writing import whole_file

FOLDER = "clusters"
FORMAT = 1


@dataclass(frozen=True)
class EpochClusters:
    """The clusters of one epoch.

    Attributes:
        epoch: from 0.
        evidence: why images were kept and dropped.
        independence_threshold: the one applied; None when there was none yet.
        used: whether the epoch trained on them; it does not when they are too few.
    """

    epoch: int
    evidence: Evidence
    independence_threshold: float | None
    used: bool

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) pseudo-identities that clustering found, -1 for what was dropped."""
        return labels_of(self.evidence)


def write_clusters(run: Path, found: EpochClusters, keep: int | None) -> None:
    """Write the clusters of an epoch, whole or not at all. One process calls this.

    Args:
        run: the run folder.
        found: what is written.
        keep: how many of the last epochs stay; None keeps all, 0 writes nothing.
    """
    folder = run / FOLDER
    if keep != 0:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "format": FORMAT,
            "epoch": found.epoch,
            "independence_threshold": found.independence_threshold,
            "used": found.used,
        }
        with whole_file(folder / _name(found.epoch), "the epoch's clusters") as temporary:
            # One entry of metadata: safetensors writes several in any order; files shall be equal to the bit.
            save_file(asdict(found.evidence), temporary, {"dmx": json.dumps(facts)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
    if keep is not None:
        kept = cluster_files(run)
        for epoch in sorted(kept)[: max(0, len(kept) - keep)]:
            kept[epoch].unlink()


def cluster_files(run: Path) -> dict[int, Path]:
    """Epoch to file, of all clusters that a run has kept."""
    found = (run / FOLDER).glob("epoch-*.safetensors")
    return {int(file.stem.removeprefix("epoch-")): file for file in sorted(found)}


def read_clusters(file: Path) -> EpochClusters:
    """Read one of `cluster_files`.

    Raises:
        DmxError: it is broken; names it.
    """
    try:
        with safe_open(file, "np") as saved:
            facts = json.loads((saved.metadata() or {})["dmx"])
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 - no mapping
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']!r}, not {FORMAT}")
        return EpochClusters(
            int(facts["epoch"]), Evidence(**tensors), facts["independence_threshold"], bool(facts["used"])
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DmxError(
            f"{file}: wanted the clusters of an epoch, found {error!r}; remove the file, or train that epoch "
            "again"
        ) from error


def forget_clusters_from(run: Path, epoch: int) -> None:
    """Remove the clusters of `epoch` and later ones, which a run that goes on there finds anew."""
    for found, file in cluster_files(run).items():
        if found >= epoch:
            file.unlink()


def copy_clusters(trunk: Path, run: Path, epochs: int) -> None:
    """Take over the clusters of another run's first `epochs` epochs, and no others."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
    for epoch, file in cluster_files(trunk).items():
        if epoch < epochs:
            (run / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(file, run / FOLDER / file.name)


def _name(epoch: int) -> str:
    return f"epoch-{epoch:05d}.safetensors"
