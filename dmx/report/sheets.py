"""Clusters by epoch as contact sheets, with what they were judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dmx.cluster.reliability import Fate
from dmx.data.shards import Split
from dmx.errors import DmxError
from dmx.page import framed, text
from dmx.report.charts import Axis, Series, stacked_chart
from dmx.report.clusters import Cluster, Sheet, chosen_epochs, fates_of, sheet_of
from dmx.report.curves import missing
from dmx.report.pictures import SHEET_HEIGHT_PX, ReportPictures
from dmx.report.record import RunRecord
from dmx.train.clusters import EpochClusters, read_clusters

FATES = {
    Fate.KEPT: "kept",
    Fate.TOO_FEW_LEFT: "too few left of their cluster",
    Fate.NOT_COMPACT: "not compact",
    Fate.NOT_INDEPENDENT: "not independent",
    Fate.OUTLIER: "outlier",
}
MEANING = (
    "A cluster is reliable when it hardly changes with the radius. Independence is the share of images by "
    "which it differs from the cluster at a larger radius, compactness at a smaller one: 0 is the same "
    "cluster at both. Clusters above the independence threshold are dropped whole; of the others, images "
    "whose own compactness is above their cluster's."
)


def cluster_sheets(
    run: RunRecord, target: Split | None, pictures: ReportPictures, epochs: int
) -> Iterator[str]:
    """The section, part by part: one epoch's clusters are in memory at a time.

    Args:
        run: the run.
        target: its images; None where they are not at hand, which leaves pictures and purity out.
        pictures: what is made of them.
        epochs: how many are shown in sheets.
    """
    why = _why_none(run)
    if why is not None:
        yield missing(why)
        return
    fates: dict[int, dict[Fate, int]] = {}
    sheets: list[Sheet] = []
    wanted = chosen_epochs(sorted(run.clusters), epochs)
    for epoch, file in sorted(run.clusters.items()):
        try:
            found = read_clusters(file)
        except DmxError as error:
            yield missing(str(error))
            continue
        fates[epoch] = fates_of(found)
        if epoch in wanted:
            sheets.append(sheet_of(found, _identities(found, target)))
            rows = len(found.evidence.fates)
    if not sheets:
        return
    yield f'<div class="charts">{_fates_chart(fates)}</div>\n<p>{MEANING}</p>\n'
    if target is not None and len(target) != rows:
        yield missing(
            f"No pictures: the clusters are of {rows:,} images, the target has {len(target):,} now; name the "
            "one of the training with --target."
        )
        target = None
    for sheet in sheets:
        yield from _sheet(sheet, target, pictures, is_open=sheet is sheets[-1])


def _why_none(run: RunRecord) -> str | None:
    """Why there are no clusters to show; None where there are."""
    config = run.config
    if run.clusters:
        return None
    if config.data.target is None:
        return "No clusters: the run has no target (data.target)."
    if config.cluster.labels == "identities":
        return "No clusters: the run trains on the target's own identities (cluster.labels)."
    if not any("clusters" in record for record in run.epochs):
        alone = config.schedule.source_epochs
        return f"No clusters yet: the first {alone} epochs train on the source alone."
    return (
        "No clusters: training kept none (schedule.keep_clusters is 0, or a version of DMX trained this run "
        "that did not keep them)."
    )


def _identities(found: EpochClusters, target: Split | None) -> NDArray[np.int64] | None:
    return None if target is None or len(target) != len(found.evidence.fates) else target.identities


def _fates_chart(fates: dict[int, dict[Fate, int]]) -> str:
    x = np.array([epoch + 1 for epoch in sorted(fates)], np.float64)
    total = np.array([sum(fates[epoch].values()) for epoch in sorted(fates)])
    parts = [
        Series(name, x, np.array([fates[epoch][fate] for epoch in sorted(fates)]) / total)
        for fate, name in FATES.items()
    ]
    axis = Axis(x[0] - 0.5, x[-1] + 0.5, "epoch")
    return stacked_chart("What became of the target's images", parts, axis, Axis(0, 1, "", is_share=True))


def _sheet(sheet: Sheet, target: Split | None, pictures: ReportPictures, *, is_open: bool) -> Iterator[str]:
    images = sum(sheet.fates.values())
    kept = sheet.fates[Fate.KEPT] / max(images, 1)
    threshold = "none yet" if sheet.threshold is None else f"{sheet.threshold:.3f}"
    unused = "" if sheet.used else "; too few to train on, so the epoch trained on the source alone"
    yield (
        f"<details{' open' if is_open else ''}><summary>Epoch {sheet.epoch + 1}: {sheet.identities:,} of "
        f"{sheet.clusters:,} clusters kept, {kept:.0%} of {images:,} images{unused}</summary>\n"
        f"<p>independence threshold {threshold}</p>\n"
    )
    yield _clusters("The largest", sheet.largest, target, pictures)
    yield _clusters("The least reliable that were kept", sheet.least_reliable, target, pictures)
    yield _clusters("The largest that were dropped", sheet.dropped, target, pictures)
    outliers = sheet.fates[Fate.OUTLIER]
    yield f"<h3>Outliers: {outliers:,} images that belong to no cluster</h3>\n"
    yield f"{_strip(sheet.outliers, None, target, pictures)}</details>\n"


def _clusters(title: str, clusters: Sequence[Cluster], target: Split | None, pictures: ReportPictures) -> str:
    if not clusters:
        return f"<h3>{text(title)}</h3>\n<p>none</p>\n"
    shown = "".join(
        f'<article class="cluster"><p>{_told(cluster)}</p>'
        f"{_strip(cluster.rows, cluster, target, pictures)}"
        f"{_strip(cluster.dropped, cluster, target, pictures, 'dropped')}</article>\n"
        for cluster in clusters
    )
    return f'<h3>{text(title)}</h3>\n<div class="clusters">{shown}</div>\n'


def _told(cluster: Cluster) -> str:
    kept = (
        f"<b>{cluster.kept:,} images</b> kept of {cluster.size:,}"
        if cluster.kept
        else f"<b>{cluster.size:,} images</b>: {FATES[cluster.fate]}"
    )
    purity = "" if cluster.purity is None else f" · purity {cluster.purity:.0%}"
    return (
        f"{kept}<br>independence {cluster.independence:.3f} · compactness {cluster.compactness:.3f}{purity}"
    )


def _strip(
    rows: NDArray[np.int64],
    cluster: Cluster | None,
    target: Split | None,
    pictures: ReportPictures,
    kind: str = "",
) -> str:
    """Pictures in a row, framed right and wrong by the cluster's most frequent identity if that is known."""
    if target is None or not pictures.shown or not len(rows):
        return ""
    items = ""
    for row in rows.tolist():
        identity = int(target.identities[row])
        is_judged = cluster is not None and cluster.identity >= 0 and identity >= 0
        mark = ("right" if identity == cluster.identity else "wrong") if is_judged and cluster else ""
        sign = {"right": "✓", "wrong": "✗"}.get(mark, "")
        alt = f"image {row}" + (f", identity {identity}" if identity >= 0 else "")
        frame = framed([pictures.uri(target, row, SHEET_HEIGHT_PX)], alt)
        items += f'<li class="{mark}">{frame}<small>{sign}</small></li>'
    label = '<p class="note">dropped from it:</p>' if kind and cluster is not None and cluster.kept else ""
    return f'{label}<ol class="strip {kind}">{items}</ol>\n'
