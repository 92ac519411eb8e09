"""Protocol and metrics: by hand, against full sorting, at full size."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmx.errors import DmxError
from dmx.evaluation import Embedded, Metrics, evaluate
from dmx.evaluation.ranking import ranks_of_hits

MIB = 2**20


def line(positions: list[float], identities: list[int], cameras: list[int]) -> Embedded:
    """Images on a line, so that distances can be read off."""
    return Embedded(np.array(positions, np.float32)[:, None], np.array(identities), np.array(cameras))


def test_by_hand() -> None:
    """One query at 0, identity 7, camera 0; the gallery in order of distance:

    position  1   2   3   4   5   6   7
    identity  7   5   7   -1  7   0   7
    camera    0   1   1   1   2   1   3
    kept?     no  yes yes no  yes yes yes      (same identity and camera; identity -1)
    rank          1   2       3   4   5

    Hits at 2, 3, 5: AP = (1/2 + 2/3 + 3/5) / 3 = 0.588889, mINP = 3/5.
    Trapezoid: precision before the hits is 0/1, 1/2, 2/4: AP = ((1/2 + 0) + (2/3 + 1/2) + (3/5 + 1/2)) / 6.
    """
    query = line([0], [7], [0])
    gallery = line([1, 2, 3, 4, 5, 6, 7], [7, 5, 7, -1, 7, 0, 7], [0, 1, 1, 1, 2, 1, 3])
    found = evaluate(query, gallery)
    assert found.map == pytest.approx(0.5888889, abs=1e-7)
    assert (found.rank1, found.rank5, found.rank10) == (0.0, 1.0, 1.0)
    assert found.minp == pytest.approx(0.6)
    assert (found.valid_queries, found.num_queries) == (1, 1)
    assert evaluate(query, gallery, ap="trapezoid").map == pytest.approx(2.7666667 / 6, abs=1e-7)


def test_mean_is_over_valid_queries_only() -> None:
    """Query 0 has its answer first (AP 1), query 1 second (AP 1/2), 2 is not in the gallery, 3 is junk."""
    query = line([0, 10, 20, 30], [1, 2, 3, -1], [0, 0, 0, 0])
    gallery = line([0.5, 9, 12, 30], [1, 1, 2, -1], [1, 1, 1, 1])
    found = evaluate(query, gallery)
    assert found == Metrics(
        map=0.75, rank1=0.5, rank5=1.0, rank10=1.0, minp=0.75, valid_queries=2, num_queries=4
    )
    assert evaluate(query, gallery, ap="trapezoid").map == pytest.approx((1 + (1 / 2 + 0) / 2) / 2)


def test_unknown_cameras_are_never_the_same() -> None:
    query = line([0], [1], [-1])
    gallery = line([1, 2], [1, 2], [-1, -1])
    assert evaluate(query, gallery).rank1 == 1.0
    with pytest.raises(DmxError, match="1 of identities that it has under the query's own camera only"):
        evaluate(line([0], [1], [4]), line([1, 2], [1, 2], [4, 4]))


def test_equal_distances_keep_gallery_order() -> None:
    query = line([0], [1], [0])
    assert evaluate(query, line([1, -1, 1], [1, 2, 3], [1, 1, 1])).map == 1.0
    assert evaluate(query, line([1, -1, 1], [2, 1, 3], [1, 1, 1])).map == 0.5
    assert evaluate(query, line([1, -1, 1], [2, 3, 1], [1, 1, 1])).map == pytest.approx(1 / 3)


def oracle(d: np.ndarray, query: Embedded, gallery: Embedded, ap: str) -> Metrics | None:
    """Every definition in full: sort, drop, walk down the list. None without a valid query."""
    aps, firsts, inps = [], [], []
    for row, identity, camera in zip(d, query.identities, query.cameras, strict=True):
        order = np.argsort(row, kind="stable")
        same = (gallery.identities == identity) & (gallery.cameras == camera) & (camera != -1)
        order = [j for j in order if not same[j] and gallery.identities[j] != -1]
        matches = [gallery.identities[j] == identity and identity != -1 for j in order]
        if not any(matches):
            continue
        hits, total, old_recall, old_precision = 0, 0.0, 0.0, 1.0
        for rank, match in enumerate(matches, start=1):
            hits += match
            precision, recall = hits / rank, hits / sum(matches)
            height = precision if ap == "default" else (old_precision + precision) / 2
            total += (recall - old_recall) * height
            old_recall, old_precision = recall, precision
        aps.append(total)
        firsts.append(matches.index(True) + 1)
        inps.append(sum(matches) / (len(matches) - matches[::-1].index(True)))
    if not aps:
        return None
    f = np.array(firsts)
    return Metrics(*(float(np.mean(v)) for v in (aps, f <= 1, f <= 5, f <= 10, inps)), len(aps), len(query))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([2, 5, 1000]),
    ap=st.sampled_from(["default", "trapezoid"]),
)
def test_equals_sorting_the_whole_gallery(seed: int, levels: int, ap: str) -> None:
    """Few levels make ties, which must fall as a stable sort lets them."""
    rng = np.random.default_rng(seed)
    Q, G = rng.integers(1, 9), rng.integers(1, 60)
    query = line(
        rng.integers(0, levels, Q).tolist(), rng.integers(-1, 6, Q).tolist(), rng.integers(-1, 3, Q).tolist()
    )
    gallery = line(
        rng.integers(0, levels, G).tolist(), rng.integers(-1, 6, G).tolist(), rng.integers(-1, 3, G).tolist()
    )
    d = np.square(query.features - gallery.features.T)  # integers below 2^24: exact in float32
    expected = oracle(d, query, gallery, ap)
    if expected is None:
        with pytest.raises(DmxError):
            evaluate(query, gallery)
        return
    found = evaluate(query, gallery, ap=ap, block_bytes=int(rng.integers(1, 2000)))
    for name in Metrics.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12), name


def test_ranks_are_counted_within_what_is_kept() -> None:
    distances = np.array([[3, 1, 1, 2, 1]], np.float32)
    identities = np.array([1, 1, 2, -1, 1])
    ranks, counts = ranks_of_hits(
        distances, np.array([1]), np.array([0], np.int32), identities, np.array([1, 0, 1, 1, 2], np.int32)
    )
    assert counts.tolist() == [2]
    assert ranks.tolist() == [2, 3]  # order 2, 4, 0: index 1 is the query's camera, index 3 is junk


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ap": "interpolated"}, "ap: wanted one of default, trapezoid"),
        ({"rerank": True, "k1": 0}, "k1: re-ranking wants at least 1, found 0"),
        ({"rerank": True, "lambda_": 1.5}, "lambda: re-ranking wants a share"),
    ],
)
def test_parameters_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(DmxError, match=message):
        evaluate(line([0], [1], [0]), line([1], [1], [1]), **change)  # type: ignore[arg-type]


def test_unusable_inputs_are_named() -> None:
    good = line([0, 1], [1, 2], [0, 0])
    with pytest.raises(DmxError, match="no valid query among 2: 2 are of identities that the gallery lacks"):
        evaluate(good, line([0], [5], [1]))
    with pytest.raises(DmxError, match="gallery: wanted images of known identity"):
        evaluate(good, line([0], [-1], [1]))
    with pytest.raises(DmxError, match="one width, found 1 and 2"):
        evaluate(good, Embedded(np.zeros((1, 2)), np.ones(1), np.ones(1)))
    with pytest.raises(DmxError, match="NaN or infinity in row 1"):
        line([0, np.nan], [1, 2], [0, 0])
    with pytest.raises(DmxError, match=r"squared distances fit float32, found length 1\.5e\+19 in row 1"):
        line([0, 1.5e19], [1, 2], [0, 0])
    with pytest.raises(DmxError, match=r"cameras: wanted one for each of the 2 features, found shape \(1,\)"):
        Embedded(np.zeros((2, 1)), np.ones(2), np.ones(1))


FULL_SIZE = """
import pathlib, re, time
import numpy as np
from dmx.evaluation import Embedded, evaluate
rng = np.random.default_rng(0)
Q, G, D, ids, cams = 11_659, 82_161, 64, 3_060, 15
centres = rng.standard_normal((ids, D), dtype=np.float32)
def split(n):
    identities = rng.integers(0, ids, n)
    x = centres[identities] + 2 * rng.standard_normal((n, D), dtype=np.float32)
    return Embedded(x / np.linalg.norm(x, axis=1, keepdims=True), identities, rng.integers(0, cams, n))
query, gallery = split(Q), split(G)
def peak_kib():
    return re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
before = peak_kib()
start = time.perf_counter()
metrics = evaluate(query, gallery)
seconds = time.perf_counter() - start
print(metrics.valid_queries, metrics.map, before, peak_kib(), seconds)
"""


def test_msmt17_size_stays_within_memory() -> None:
    """11,659 x 82,161: the distances alone would be 3.8 GB; a block and what ranks it are under 500 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_SIZE],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ),
    )
    valid, mean_ap, before_kib, peak_kib, seconds = done.stdout.split()
    assert int(valid) > 11_600
    assert 0.01 < float(mean_ap) < 0.9
    added = (int(peak_kib) - int(before_kib)) * 1024
    print(
        f"peak {int(peak_kib) / 1024:.0f} MiB, of it evaluation {added / MIB:.0f} MiB, {float(seconds):.1f} s"
    )
    assert added < 500 * MIB
    assert int(peak_kib) * 1024 < 2 * 10**9
