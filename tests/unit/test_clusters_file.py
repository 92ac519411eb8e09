"""The clusters that a run keeps: what became of every image, whole files, equal to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dmx.cluster.reliability import Evidence, Fate, reliable
from dmx.errors import DmxError
from dmx.train.clusters import (
    FOLDER,
    EpochClusters,
    cluster_files,
    copy_clusters,
    forget_clusters_from,
    read_clusters,
    write_clusters,
)

KEEP_ALL = None


def labelings(seed: int, images: int = 400) -> tuple[NDArray[np.int64], ...]:
    """Three labelings that differ here and there, the loose one from merged clusters."""
    rng = np.random.default_rng(seed)
    base = rng.integers(-1, 40, images)
    tight, loose = base.copy(), base.copy()
    tight[rng.random(images) < 0.1] = -1
    loose[loose == 3] = 4
    loose[rng.random(images) < 0.05] = 7
    return tuple(np.unique(labels, return_inverse=True)[1] - 1 for labels in (tight, base, loose))


def evidence(seed: int = 0, threshold: float | None = None) -> Evidence:
    return reliable(*labelings(seed), 5, threshold).evidence  # type: ignore[arg-type]


def of_epoch(epoch: int) -> EpochClusters:
    return EpochClusters(epoch, evidence(epoch), 0.25, True)


@pytest.mark.parametrize("least", [1, 5, 12])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.4])
def test_fates_follow_the_method(least: int, threshold: float | None) -> None:
    """Each by its own definition, image by image; the labels are those of kept images alone."""
    tight, base, loose = labelings(3)
    found = reliable(tight, base, loose, least, threshold)
    told = found.evidence
    assert found.independence_threshold is not None
    np.testing.assert_array_equal(told.fates == Fate.KEPT, found.labels >= 0)
    np.testing.assert_array_equal(told.clusters, base)

    def jaccard(row: int, others: NDArray[np.int64]) -> float:
        mine = {row} if base[row] < 0 else set(np.flatnonzero(base == base[row]).tolist())
        theirs = {row} if others[row] < 0 else set(np.flatnonzero(others == others[row]).tolist())
        return 1 - len(mine & theirs) / len(mine | theirs)

    for row in range(0, len(base), 7):
        cluster, fate = base[row], Fate(told.fates[row])
        if cluster < 0:
            assert fate == Fate.OUTLIER or (least == 1 and fate == Fate.KEPT)
            continue
        members = np.flatnonzero(base == cluster)
        independence = min(jaccard(other, loose) for other in members)
        compactness = min(jaccard(other, tight) for other in members)
        assert told.independence[cluster] == pytest.approx(independence)
        assert told.compactness[cluster] == pytest.approx(compactness)
        if independence > found.independence_threshold:
            assert fate == Fate.NOT_INDEPENDENT
        elif jaccard(row, tight) > compactness + 1e-12:
            assert fate == Fate.NOT_COMPACT
        else:
            assert fate in (Fate.KEPT, Fate.TOO_FEW_LEFT)
            assert (fate == Fate.KEPT) == (int((found.labels[members] >= 0).sum()) >= least)


def test_what_is_written_is_read_and_equal_to_the_bit(tmp_path: Path) -> None:
    for run in ("a", "b"):
        write_clusters(tmp_path / run, of_epoch(5), KEEP_ALL)
    (file,) = cluster_files(tmp_path / "a").values()
    assert file.read_bytes() == (tmp_path / "b" / FOLDER / file.name).read_bytes()
    found, wanted = read_clusters(file), of_epoch(5)
    assert (found.epoch, found.independence_threshold, found.used) == (5, 0.25, True)
    for name in Evidence.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(found.evidence, name), getattr(wanted.evidence, name))
    np.testing.assert_array_equal(found.labels, reliable(*labelings(5), 5, None).labels)  # type: ignore[arg-type]
    assert file.stat().st_size < 5 * 400 + 16 * 41 + 600, "five bytes an image and 16 a cluster"


def test_no_more_stay_than_are_kept(tmp_path: Path) -> None:
    for epoch in range(5):
        write_clusters(tmp_path, of_epoch(epoch), 2)
    assert list(cluster_files(tmp_path)) == [3, 4]
    write_clusters(tmp_path, of_epoch(5), 0)
    assert not cluster_files(tmp_path)
    assert not list((tmp_path / FOLDER).iterdir())


def test_a_run_that_goes_on_forgets_what_it_finds_anew(tmp_path: Path) -> None:
    for epoch in range(4):
        write_clusters(tmp_path / "trunk", of_epoch(epoch), KEEP_ALL)
    write_clusters(tmp_path / "branch", of_epoch(9), KEEP_ALL)
    copy_clusters(tmp_path / "trunk", tmp_path / "branch", 2)
    assert list(cluster_files(tmp_path / "branch")) == [0, 1]
    copy_clusters(tmp_path / "trunk", tmp_path / "branch", 0)
    assert not cluster_files(tmp_path / "branch")
    forget_clusters_from(tmp_path / "trunk", 2)
    assert list(cluster_files(tmp_path / "trunk")) == [0, 1]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_clusters(tmp_path, of_epoch(0), KEEP_ALL)
    (file,) = cluster_files(tmp_path).values()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DmxError, match=r"epoch-00000.safetensors: wanted the clusters of an epoch, found"):
        read_clusters(file)
