"""Rankings of some queries of a test set, with where the model looks; and how its distances spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.data.shards import Split
from dmx.data.transforms import normalise_batch
from dmx.embedding import decode_all
from dmx.evaluation.histogram import DistanceHistogram
from dmx.model import EmbeddingModel
from dmx.page import framed
from dmx.report.activation import activation_maps
from dmx.report.charts import Axis, Mark, Series, area_chart, fitted
from dmx.report.curves import missing
from dmx.report.pictures import ReportPictures
from dmx.report.retrieval import Judged, Retrieval
from dmx.search.page import LEGEND, answer_section

DRAWN_BINS = 100


class Maps:
    """Activation maps of a split's images, made when they are asked for.

    Args:
        model: in evaluation mode, on `device`.
        split: the images.
        size: height and width of the model's input, pixels.
        device: where the model is.
    """

    def __init__(self, model: EmbeddingModel, split: Split, size: tuple[int, int], device: str) -> None:
        self._model, self._split, self._size, self._device = model, split, size, device

    def of(self, row: int) -> NDArray[np.float32] | None:
        """(h, w) in [0, 1]; None where the model has no map."""
        pixels = decode_all(self._split, np.array([row]), *self._size, "activation maps")
        with torch.inference_mode():
            images = normalise_batch(torch.from_numpy(pixels).to(self._device))
            dtype = next(self._model.parameters()).dtype
            energy = activation_maps(self._model, images.to(dtype))
        return None if energy is None else energy[0].cpu().numpy()


def rankings(
    found: Retrieval,
    splits: tuple[Split, Split],
    maps: tuple[Maps, Maps],
    pictures: ReportPictures,
) -> Iterator[str]:
    """The chosen queries, the hardest first.

    Args:
        found: what was measured.
        splits: query and gallery; maps: theirs.
        pictures: what is made of the images.
    """
    metrics = found.metrics
    yield (
        f"<p>mAP {metrics.map:.1%}, rank-1 {metrics.rank1:.1%}, mINP {metrics.minp:.1%} of "
        f"{metrics.valid_queries:,} queries, measured anew with this checkpoint</p>\n{LEGEND}"
    )
    if not (found.hardest or found.random):
        return
    has_maps = pictures.shown and maps[0].of(_some_row(found)) is not None
    if pictures.shown:
        yield (
            "<p>Beside each image where the model looks: activation of its last feature map, from dark "
            "(none) to bright (most of this image).</p>\n"
            if has_maps
            else missing("No activation maps: this model's last features are no map over the image.")
        )
    query_frame, hit_frame = (
        (lambda _, row, split=split, made=made: framed(_uris(split, row, made, pictures, has_maps), "crop"))
        if pictures.shown
        else None
        for split, made in zip(splits, maps, strict=True)
    )
    for title, judged in (("The hardest queries", found.hardest), ("Queries chosen at random", found.random)):
        if judged:
            yield f"<h3>{title}</h3>\n"
        for one in judged:
            notes = (f"AP {one.precision:.1%}", f"first right: {one.first_right:,}")
            yield answer_section(one.answer, query_frame, hit_frame, named=pictures.named, notes=notes)


def _some_row(found: Retrieval) -> int:
    chosen: Sequence[Judged] = found.hardest or found.random
    return chosen[0].answer.row


def _uris(split: Split, row: int, made: Maps, pictures: ReportPictures, has_maps: bool) -> list[str | None]:
    return pictures.uris_with_map(split, row, made.of(row) if has_maps else None)


def distances(name: str, histogram: DistanceHistogram) -> str:
    """Both distributions, and how far they are apart."""
    if not histogram.is_complete:
        return missing(f"No distances on {name}: no pairs of one identity and of two.")
    edges, same, different = histogram.drawn(DRAWN_BINS)
    middles = (edges[1:] + edges[:-1]) / 2
    filled = np.flatnonzero((same > 0) | (different > 0))
    part = slice(max(filled[0] - 1, 0), filled[-1] + 2)
    lines = [
        Series("same person", middles[part], same[part]),
        Series("different people", middles[part], different[part]),
    ]
    rate, at = histogram.equal_error()
    x = Axis(float(edges[part][0]), float(edges[part][-1] + edges[1]), "cosine distance, 1 - cos")
    y = fitted([same, different], "share of pairs", is_share=True, zero=True)
    note = (
        f"Equal error rate {rate:.1%} at distance {at:.3f}; overlap {histogram.overlap(DRAWN_BINS):.1%}. "
        f"{int(histogram.same.sum()):,} pairs of one person and {int(histogram.different.sum()):,} of two, "
        "all between cameras."
    )
    return area_chart(f"Distances on {name}", lines, x, y, marks=[Mark(at, "equal error", True)], note=note)
