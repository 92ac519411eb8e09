"""Cluster purity against counting pairs one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dmx.train.purity import cluster_report


def test_report_equals_counting() -> None:
    """On random labels with dropped images and unknown identities."""
    rng = np.random.default_rng(0)
    labels, identities = rng.integers(-1, 6, 60), rng.integers(-1, 8, 60)
    report = cluster_report(labels, identities)
    known = [i for i in range(60) if identities[i] >= 0]
    pairs = list(itertools.combinations(known, 2))
    together = {p for p in pairs if labels[p[0]] == labels[p[1]] >= 0}
    same = {p for p in pairs if identities[p[0]] == identities[p[1]]}
    assert report["pair_precision"] == pytest.approx(len(together & same) / len(together))
    assert report["pair_recall"] == pytest.approx(len(together & same) / len(same))
    majority = 0
    for cluster in range(6):
        members = [identities[i] for i in known if labels[i] == cluster]
        majority += max(members.count(identity) for identity in set(members))
    assert report["purity"] == pytest.approx(majority / sum(labels[i] >= 0 for i in known))
    assert report["kept"] == (labels >= 0).sum()
    assert report["clusters"] == 6


def test_nothing_known_and_nothing_kept() -> None:
    """No purity is claimed without identities, and none divides by zero."""
    unknown = cluster_report(np.array([0, 0, -1]), np.array([-1, -1, -1]))
    assert unknown == {"clusters": 1, "kept": 2, "kept_share": pytest.approx(2 / 3)}
    nothing = cluster_report(np.array([-1, -1]), np.array([4, 4]))
    assert (nothing["purity"], nothing["pair_precision"], nothing["pair_recall"]) == (0, 0, 0)
