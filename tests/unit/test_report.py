"""The parts of a report: distances counted, heads taken off, charts, maps, what is chosen to be looked at."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from dmx.cluster.reliability import Evidence, Fate
from dmx.config import Config, to_tree
from dmx.errors import DmxError
from dmx.evaluation.distances import distance_blocks
from dmx.evaluation.histogram import BINS, LARGEST, DistanceHistogram
from dmx.model import build_model
from dmx.report.activation import activation_maps, drawn_over
from dmx.report.charts import (
    Axis,
    Mark,
    Series,
    apart,
    area_chart,
    fitted,
    line_chart,
    nice_step,
    short,
    thinned,
)
from dmx.report.clusters import chosen_epochs, sheet_of
from dmx.report.curves import curves, timings
from dmx.report.faces import blurred_rows, without_face
from dmx.report.record import RunRecord
from dmx.sections import ModelConfig
from dmx.train.clusters import EpochClusters
from dmx.train.runlog import CONFIG, EPOCHS, STEPS


def units(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    x = rng.standard_normal((count, 6)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def counted(
    block_bytes: int, seed: int = 0
) -> tuple[DistanceHistogram, NDArray[np.float64], NDArray[np.bool_]]:
    """A histogram, and all its pairs by themselves: cosine distances, and whether of one identity."""
    rng = np.random.default_rng(seed)
    sides = []
    for count in (90, 150):
        labels = rng.integers(-1, 12, count), rng.integers(-1, 3, count).astype(np.int32)
        sides.append((units(rng, count), *labels))
    (q, q_ids, q_cameras), (g, g_ids, g_cameras) = sides
    found = DistanceHistogram()
    for start, block in distance_blocks(q, g, block_bytes):
        part = slice(start, start + len(block))
        found.add(block, q_ids[part], q_cameras[part], g_ids, g_cameras)
    same_camera = (q_cameras[:, None] == g_cameras) & (g_cameras != -1)
    pairs = (q_ids[:, None] != -1) & (g_ids != -1) & ~same_camera
    cosine = 1 - q.astype(np.float64) @ g.astype(np.float64).T
    return found, cosine[pairs], (q_ids[:, None] == g_ids)[pairs]


@pytest.mark.parametrize("block_bytes", [1, 4 * 150 * 7, 2**20])
def test_every_pair_between_cameras_is_counted_once(block_bytes: int) -> None:
    """In blocks of one query, of seven and of all, against all pairs by themselves."""
    found, cosine, is_same = counted(block_bytes)
    assert (found.same.sum(), found.different.sum()) == (is_same.sum(), (~is_same).sum())
    edges = np.linspace(0, LARGEST, BINS + 1)
    for counts, values in ((found.same, cosine[is_same]), (found.different, cosine[~is_same])):
        wanted = np.histogram(values, edges)[0]
        # float32 may put what lies on an edge into the bin beside it, and nothing further.
        assert np.abs(np.cumsum(counts) - np.cumsum(wanted)).max() <= 2
    assert found.is_complete


def test_the_equal_error_rate_is_that_of_all_thresholds() -> None:
    found, cosine, is_same = counted(2**20, seed=4)
    cosine = np.where(is_same, cosine * 0.5, cosine)  # pairs that can be told apart
    again = DistanceHistogram()
    places = np.minimum((cosine / LARGEST * BINS).astype(int), BINS - 1)
    again.same += np.bincount(places[is_same], minlength=BINS)
    again.different += np.bincount(places[~is_same], minlength=BINS)
    rate, at = again.equal_error()
    thresholds = np.sort(cosine)
    missed = np.array([(cosine[is_same] > t).mean() for t in thresholds])
    accepted = np.array([(cosine[~is_same] <= t).mean() for t in thresholds])
    best = int(np.argmin(np.abs(missed - accepted)))
    assert rate == pytest.approx((missed[best] + accepted[best]) / 2, abs=0.01)
    assert at == pytest.approx(thresholds[best], abs=0.02)
    assert 0 < rate < found.equal_error()[0]


@pytest.mark.parametrize("allowed", [1e-3, 1e-2, 0.2, 1.0])
def test_true_positive_rates_are_those_of_scikit_learn(allowed: float) -> None:
    found, cosine, is_same = counted(2**20, seed=4)
    accepted, hit, _ = roc_curve(is_same, -cosine, drop_intermediate=False)
    rate, at = found.true_positive_rate(allowed)
    # The threshold is an edge of a bin: the best below what is allowed, or that of a bin before.
    assert rate <= hit[accepted <= allowed].max() + 1e-12
    step = LARGEST / BINS
    assert rate >= (cosine[is_same] <= at - step).mean()
    assert (cosine[~is_same] <= at - step).mean() <= allowed
    assert (cosine[~is_same] <= at + 2 * step).mean() > allowed or at >= LARGEST - step


def test_no_threshold_may_be_strict_enough() -> None:
    found = DistanceHistogram()
    found.same[5:9] += 1
    found.different[0] += 10
    assert found.true_positive_rate(1e-3) == (0.0, 0.0)


def test_overlap_goes_from_apart_to_the_same() -> None:
    found = DistanceHistogram()
    assert not found.is_complete
    found.same[100:200] += 3
    found.different[1000:1200] += 5
    assert found.overlap() == 0
    found.different[:] = 2 * found.same
    assert found.overlap() == pytest.approx(1)
    assert found.equal_error()[0] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("height", "width", "rows"), [(128, 64, 43), (300, 100, 100), (100, 100, 67), (50, 100, 50)]
)
def test_the_head_is_sought_where_it_is(height: int, width: int, rows: int) -> None:
    """A third of a whole body, more of a part of one, all of what is wider than high."""
    assert blurred_rows(height, width) == rows


def test_what_is_blurred_cannot_come_back() -> None:
    """Two faces of equal means and other features give the same picture; below, each keeps every pixel."""
    rng = np.random.default_rng(0)
    one = rng.integers(40, 200, (128, 64, 3)).astype(np.uint8)
    other = one.copy()
    rows = blurred_rows(128, 64)
    for row in range(2, rows - 2, 7):  # swapped within a cell: another picture, the same means
        other[row, 4:12] = one[row, 4:12][::-1]
    assert (one != other).any()
    blurred = without_face(one)
    assert np.abs(blurred[:rows].astype(int) - without_face(other)[:rows]).max() <= 1
    np.testing.assert_array_equal(blurred[rows:], one[rows:])
    assert np.abs(np.diff(blurred[:rows].astype(int), axis=1)).max() < 12, "noise of 160 levels is gone"
    assert without_face(np.full((3, 2, 3), 9, np.uint8)).shape == (3, 2, 3)


def tiny_model(backbone: str, **arguments: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(backbone=backbone, backbone_args=dict(arguments))).eval()


def test_activation_maps_are_sums_of_squares_over_channels() -> None:
    model = tiny_model("resnet10t", channels=[8, 16, 32, 64], stem_width=8)
    images = torch.randn(3, 3, 64, 32)
    with torch.inference_mode():
        found = activation_maps(model, images)  # type: ignore[arg-type]
        features = model.backbone(images).numpy()  # type: ignore[operator]
    assert found is not None
    wanted = np.einsum("nchw,nchw->nhw", features, features)
    wanted = (wanted - wanted.min((1, 2), keepdims=True)) / np.ptp(wanted, (1, 2), keepdims=True)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_a_model_of_tokens_has_no_map() -> None:
    model = tiny_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with torch.inference_mode():
        assert activation_maps(model, torch.randn(1, 3, 32, 32)) is None  # type: ignore[arg-type]


def test_a_map_is_bright_where_it_is_high() -> None:
    energy = np.zeros((4, 2), np.float32)
    energy[0, 1] = 1
    drawn = drawn_over(np.full((64, 32, 3), 128, np.uint8), energy).astype(int).sum(2)
    assert drawn.shape == (64, 32)
    assert drawn[0, 31] == drawn.max()
    assert drawn[0, 31] > 1.5 * drawn[60, 4]


def test_axes_have_round_ends_around_all_values() -> None:
    assert [nice_step(x) for x in (0.021, 0.25, 0.3, 3, 7)] == [0.025, 0.25, 0.5, 5, 10]
    axis = fitted([np.array([0.3, 47.0])], "steps", zero=True)
    assert (axis.low, axis.high) == (0, 60)
    assert axis.ticks() == [0, 20, 40, 60]
    share = fitted([np.array([0.2, 0.93])], "share", is_share=True, zero=True)
    assert (share.high, share.told(0.5)) == (1.0, "50 %")
    flat = fitted([np.array([2.0, 2.0])], "steps", zero=False)
    assert flat.low <= 2 < flat.high
    assert len(Axis(0, 1, "share", is_share=True).ticks()) == 5


def test_numbers_are_short() -> None:
    found = [short(x) for x in (0, 12345.6, 0.00025, 7.5e-4, 3.5e-06, 0.4567, -2e-5)]
    assert found == ["0", "12,346", "2.5e-4", "7.5e-4", "3.5e-6", "0.457", "-2e-5"]


def test_long_curves_are_thinned_to_means() -> None:
    long = Series("loss", np.arange(10_001.0), np.tile([0.0, 2.0], 5001)[:10_001])
    thin = thinned(long)
    assert len(thin.x) == 240
    np.testing.assert_allclose(thin.y, 1, atol=0.05)
    assert thinned(thin) is thin


def test_names_beside_lines_do_not_overlap() -> None:
    found = apart([50, 52, 51, 99, 98], 11)
    assert min(np.diff(sorted(found))) >= 11 - 1e-9
    assert max(found) <= 100
    assert [found[i] for i in (0, 2, 1)] == sorted(found[:3]), "in the order of the lines"
    assert apart([10, 60], 11) == [10, 60]


class Tags(HTMLParser):
    """Tags and attributes of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.charts: list[dict[str, object]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.charts += [json.loads(value or "") for name, value in attrs if name == "data-chart"]


@pytest.mark.parametrize("draw", [line_chart, area_chart])
def test_a_hostile_name_stays_text(draw: object) -> None:
    name = "\"><script>alert(1)</script><img src=x onerror='a()'>"
    lines = [Series(f"{name}{i}", np.arange(3.0), np.array([1.0, 2.0, i])) for i in range(2)]
    axis = Axis(0, 3, name)
    shown = Tags(draw(name, lines, axis, axis, marks=[Mark(1, name), Mark(1, name, True)], note=name))  # type: ignore[operator]
    assert not {"script", "img"} & set(shown.tags)
    assert "onerror" not in shown.attributes
    assert shown.charts[0]["lines"][0]["name"] == f"{name}0"  # type: ignore[index]


def test_epochs_are_spread_and_the_last_is_there() -> None:
    assert chosen_epochs(range(4, 12), 4) == [4, 6, 9, 11]
    assert chosen_epochs(range(4, 12), 1) == [11]
    assert chosen_epochs(range(4, 12), 0) == []
    assert chosen_epochs([5], 4) == [5]


def test_sheets_show_the_largest_the_least_reliable_and_the_dropped() -> None:
    """Six clusters: 0 large, 1 doubtful, 2 small and sure, 3 and 4 dropped, 5 partly dropped."""
    sizes = [30, 12, 6, 9, 20, 14]
    clusters = np.repeat([*range(6), -1], [*sizes, 10]).astype(np.int32)
    fates = np.full(len(clusters), Fate.KEPT, np.uint8)
    fates[clusters == -1] = Fate.OUTLIER
    fates[clusters == 3] = Fate.TOO_FEW_LEFT
    fates[clusters == 4] = Fate.NOT_INDEPENDENT
    fates[np.flatnonzero(clusters == 5)[:4]] = Fate.NOT_COMPACT
    independence = np.array([0.1, 0.5, 0.0, 0.2, 0.9, 0.5])
    compactness = np.array([0.0, 0.1, 0.0, 0.0, 0.3, 0.2])
    identities = np.where(clusters < 0, -1, clusters).astype(np.int64)
    identities[:3] = 99  # strangers in cluster 0
    found = EpochClusters(7, Evidence(clusters, fates, independence, compactness), 0.6, True)
    sheet = sheet_of(found, identities)
    assert (sheet.clusters, sheet.identities) == (6, 4)
    assert [cluster.number for cluster in sheet.largest] == [0, 1, 5]
    assert [cluster.number for cluster in sheet.least_reliable] == [5, 1, 0]
    assert [(cluster.number, cluster.fate) for cluster in sheet.dropped] == [
        (4, Fate.NOT_INDEPENDENT),
        (3, Fate.TOO_FEW_LEFT),
    ]
    first, partly = sheet.largest[0], sheet.least_reliable[0]
    assert (first.kept, first.size, first.purity, first.identity) == (30, 30, 0.9, 0)
    assert (partly.kept, partly.size, len(partly.dropped)) == (10, 14, 4)
    assert set(clusters[partly.rows]) == {5}
    assert set(clusters[sheet.outliers]) == {-1}
    assert sheet.fates[Fate.OUTLIER] == 10
    assert sheet_of(found, None).largest[0].purity is None


def write_run(folder: Path, steps: list[str], epochs: list[str]) -> RunRecord:
    folder.mkdir()
    (folder / CONFIG).write_text(yaml.safe_dump(to_tree(Config())), encoding="utf-8")
    (folder / STEPS).write_text("\n".join(steps), encoding="utf-8")
    (folder / EPOCHS).write_text("\n".join(epochs), encoding="utf-8")
    return RunRecord.read(folder)


def test_a_run_that_is_writing_is_read(tmp_path: Path) -> None:
    """A line is half there; what has not happened yet is told."""
    line = {"global_step": 0, "epoch": 0, "step": 0, "lr": 1e-3, "loss": 3.0, "step_s": 0.1}
    run = write_run(tmp_path / "run", [json.dumps(line), json.dumps(line | {"step": 1})[:30]], [])
    assert (run.num_steps, run.steps["loss"][1].tolist(), run.result) == (1, [3.0], None)
    page = curves(run) + timings(run)
    assert "Loss in all" in page
    for word in (
        "No curve of the discriminator",
        "No test results: the run has no",
        "No clusters",
        "No timings",
    ):
        assert word in page


def test_a_stage_without_measurable_time_has_its_line(tmp_path: Path) -> None:
    """Seconds are kept to a thousandth, of which a tiny clustering may have none."""
    epochs = [json.dumps({"epoch": epoch, "train_s": 1.5, "cluster_s": 0.0}) for epoch in range(2)]
    page = timings(write_run(tmp_path / "run", [], epochs))
    assert "<tr><td>cluster<td>0.0 s<td>0%<td>0 s" in page
    assert "<tr><td>train<td>3.0 s<td>100%<td>1.5 s" in page
    assert "nan" not in timings(write_run(tmp_path / "none", [], [json.dumps({"epoch": 0, "train_s": 0.0})]))


def test_a_run_without_a_line_is_read(tmp_path: Path) -> None:
    assert "no step has been logged" in curves(write_run(tmp_path / "run", [], []))


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(DmxError, match=r"wanted a run folder of `dmx train` with config.yaml, found none"):
        RunRecord.read(tmp_path)


def test_the_entropy_is_that_of_the_discriminator(tmp_path: Path) -> None:
    """At the least balance loss there is, in either way of writing it, the entropy is log 2."""
    line = {"global_step": 0, "epoch": 0, "step": 0, "balance": 0.0}
    run = write_run(tmp_path / "fixed", [json.dumps(line)], [])
    official = write_run(tmp_path / "official", [json.dumps(line | {"balance": 1 - np.log(2)})], [])
    official = RunRecord(**{**official.__dict__, "config": Config(compat="official")})
    for each in (run, official):
        charts = {c["lines"][0]["name"]: c for c in Tags(curves(each)).charts}  # type: ignore[index]
        assert charts["entropy"]["lines"][0]["y"] == ["0.693"]  # type: ignore[index]
