"""The report of a run: its sections put together, each of which says what it lacks and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmx.data.dataset import open_dataset
from dmx.data.shards import Split
from dmx.embedding import embed
from dmx.errors import DmxError
from dmx.model import EmbeddingModel
from dmx.page import CLOSING, opening, resource, text
from dmx.report.curves import curves, epoch_table, missing, timings
from dmx.report.pictures import Faces, ReportPictures
from dmx.report.rankings import Maps, distances, rankings
from dmx.report.record import RunRecord
from dmx.report.retrieval import measure
from dmx.report.settings import settings
from dmx.report.sheets import cluster_sheets
from dmx.train.checkpoint import load_model
from dmx.train.data import names_of_tests
from dmx.writing import replaced

SECTIONS = {
    "curves": "Curves",
    "clusters": "Clusters by epoch",
    "rankings": "Rankings",
    "distances": "Distances",
    "timings": "Timings",
    "settings": "Settings and versions",
}


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Attributes:
        images: whether it has any.
        faces: whether heads are blurred.
        queries: of each test set, half of them the hardest; 0 shows none.
        top: hits of each query.
        epochs: whose clusters are shown as contact sheets.
        seed: of the random choice of queries.
        measured: whether test sets are embedded, for rankings and distances.
        target, tests: data sets in the place of the run's own; None and () take those.
        pointer: which checkpoint.
        device, batch_size: where, and how many images at a time, the model embeds.
    """

    images: bool
    faces: Faces
    queries: int
    top: int
    epochs: int
    seed: int
    measured: bool
    target: str | None
    tests: tuple[str, ...]
    pointer: str
    device: str
    batch_size: int


def write_report(run: RunRecord, out: Path, options: ReportOptions, warn: Callable[[str], None]) -> None:
    """Write the page, whole or not at all.

    Args:
        run: the run.
        out: the file.
        options: what it shows.
        warn: called with each sentence about what cannot be shown.
    """
    report = _Report(run, options, warn)
    script = resource("dmx.report", "report.js")
    with replaced(out) as file:
        file.write(
            opening(
                f"Run {run.folder.resolve().name}", css=resource("dmx.report", "report.css"), script=script
            )
        )
        file.write(_summary(run))
        links = "".join(f'<a href="#{name}">{title}</a>' for name, title in SECTIONS.items())
        file.write(f"<nav>{links}</nav>\n")
        for name, title in SECTIONS.items():
            file.write(f'<section id="{name}">\n<h2>{title}</h2>\n')
            file.writelines(report.section(name))
            file.write("</section>\n")
        file.write(CLOSING)


def _summary(run: RunRecord) -> str:
    config, done = run.config, len(run.epochs)
    state = (
        f"finished after {config.schedule.epochs} epochs and {run.num_steps:,} steps"
        if run.result is not None
        else f"not finished: {done} of {config.schedule.epochs} epochs and {run.num_steps:,} steps are done"
    )
    facts = [state, f"source {config.data.source}", f"target {config.data.target or 'none'}"]
    tests = (run.result or {}).get("tests", {})
    rows = "".join(
        f"<tr><td>{text(name)}"
        + "".join(f"<td>{scores[key]:.1%}" for key in ("map", "rank1", "rank5", "minp"))
        for name, scores in tests.items()
    )
    table = (
        f"<div class=wide><table><tr><th>test set<th>mAP<th>rank-1<th>rank-5<th>mINP{rows}</table></div>\n"
    )
    return "".join(f"<p>{text(fact)}</p>\n" for fact in facts) + (table if tests else "")


class _Report:
    """The sections of one report. Test sets are measured once, for two of them."""

    def __init__(self, run: RunRecord, options: ReportOptions, warn: Callable[[str], None]) -> None:
        self._run, self._options, self._warn = run, options, warn
        self._pictures = ReportPictures(options.images, options.faces, warn)
        self._distances: list[str] = []

    def section(self, name: str) -> Iterator[str]:
        """A section, part by part."""
        made: dict[str, Callable[[], Iterator[str]]] = {
            "curves": lambda: iter([curves(self._run), epoch_table(self._run)]),
            "clusters": self._clusters,
            "rankings": self._rankings,
            "distances": lambda: iter([f'<div class="charts">{"".join(self._distances)}</div>\n']),
            "timings": lambda: iter([timings(self._run)]),
            "settings": lambda: iter([settings(self._run)]),
        }
        return made[name]()

    def _lacks(self, what: str, error: DmxError | OSError) -> str:
        """Word of an error, printed; on the page too, but for where that names no files."""
        self._warn(f"{what}: {error}")
        return missing(
            f"{what}: {error}" if self._pictures.named else f"{what}; `dmx report` has printed why."
        )

    def _clusters(self) -> Iterator[str]:
        path, target = self._options.target or self._run.config.data.target, None
        if path is not None and self._run.clusters:
            try:
                target = open_dataset(path, warn=self._warn).split("train")
            except (DmxError, OSError) as error:
                yield self._lacks("No pictures and no purity of clusters: the target cannot be read", error)
        yield from cluster_sheets(self._run, target, self._pictures, self._options.epochs)

    def _rankings(self) -> Iterator[str]:
        tests = self._options.tests or self._run.config.data.tests
        why = None
        if not tests:
            why = "the run has no test set (data.tests); name one with --test"
        elif not self._options.measured:
            why = "left out by --no-tests"
        if why is not None:
            self._distances = [missing(f"No distances: {why}.")]
            yield missing(f"No rankings: {why}.")
            return
        try:
            model, config = load_model(self._run.folder, self._options.pointer)
        except DmxError as error:
            self._distances = [missing("No distances: there is no model to measure.")]
            yield self._lacks("No rankings: there is no model to measure", error)
            return
        model, size = model.to(self._options.device), (config.data.height, config.data.width)
        for name, path in names_of_tests(tests).items():
            yield f"<h3>{text(name)}</h3>\n" if len(tests) > 1 else ""
            try:
                yield from self._test(name, path, model, size)
            except (DmxError, OSError) as error:
                self._distances.append(missing(f"No distances on {name}: see its rankings."))
                yield self._lacks(f"No rankings on {name}", error)

    def _test(self, name: str, path: str, model: EmbeddingModel, size: tuple[int, int]) -> Iterator[str]:
        options = self._options
        dataset = open_dataset(path, warn=self._warn)
        splits = dataset.split("query"), dataset.split("gallery")
        features = tuple(self._embedded(model, split, size, name) for split in splits)
        found = measure(
            *splits, (features[0], features[1]), queries=options.queries, top=options.top, seed=options.seed
        )
        self._distances.append(distances(name, found.histogram))
        maps = tuple(Maps(model, split, size, options.device) for split in splits)
        yield from rankings(found, splits, (maps[0], maps[1]), self._pictures)

    def _embedded(
        self, model: EmbeddingModel, split: Split, size: tuple[int, int], name: str
    ) -> NDArray[np.float32]:
        return embed(
            model,
            split,
            height=size[0],
            width=size[1],
            batch_size=self._options.batch_size,
            device=self._options.device,
            label=f"embed {name} {split.name}",
        )
