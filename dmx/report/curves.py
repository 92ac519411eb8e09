"""The curves of a run: losses by step, clusters and test results by epoch, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dmx.page import text
from dmx.report.charts import POINTS, Axis, Mark, Series, fitted, line_chart, short, stacked_chart
from dmx.report.record import RunRecord

LOSSES = {
    "loss": "Loss in all",
    "identity": "Identity loss (cross-entropy)",
    "triplet": "Triplet loss",
    "balance": "Domain balance loss",
    "domain": "Discriminator's loss (cross-entropy)",
}
SCORES = {"map": "mAP", "rank1": "rank-1", "minp": "mINP"}
PURITY = {"purity": "purity", "pair_precision": "pair precision", "pair_recall": "pair recall"}
STAGES = {"embed_s": "embed", "cluster_s": "cluster", "train_s": "train", "evaluate_s": "evaluate"}
DOMAINS = 2


def missing(why: str) -> str:
    """Word that something cannot be shown, and why."""
    return f'<p class="missing">{text(why)}</p>\n'


def curves(run: RunRecord) -> str:
    """All charts, or word of what is missing."""
    charts = [*_losses(run), *_discriminator(run), *_tests(run), *_clusters(run), *_rate(run)]
    gaps = _gaps(run)
    shown = f'<div class="charts">\n{"".join(charts)}</div>\n' if charts else ""
    return shown + "".join(map(missing, gaps))


def _gaps(run: RunRecord) -> Iterator[str]:
    if not run.num_steps:
        yield "No losses: no step has been logged yet."
    elif "balance" not in run.steps and "domain" not in run.steps:
        first = run.config.schedule.stage_two_epoch + 1
        yield (
            f"No curve of the discriminator: it plays from epoch {first} on, where there are "
            "pseudo-identities and loss.balance_weight is not 0."
        )
    if not run.config.data.tests:
        yield "No test results: the run has no data.tests."
    elif not any("tests" in record for record in run.epochs):
        every = run.config.schedule.evaluate_every
        yield f"No test results yet: they come every {every} epochs, and at the end."
    if run.config.data.target is None:
        yield "No clusters: the run has no target (data.target) and trains on the source alone."
    elif not any("clusters" in record for record in run.epochs):
        alone = run.config.schedule.source_epochs
        yield f"No clusters yet: the first {alone} epochs train on the source alone."
    elif not len(run.of_epochs("clusters", "purity")[0]):
        yield "No purity: the target has no identities to compare with."


def epochs_axis(run: RunRecord) -> Axis:
    """From the start to the last epoch that the logs tell of."""
    ends = [x[-1] for x, _ in run.steps.values()]
    return Axis(0, max([1.0, len(run.epochs), *ends]), "epoch")


def _stage_marks(run: RunRecord) -> list[Mark]:
    """Where stages begin that the run has come to."""
    schedule = run.config.schedule
    found: list[Mark] = []
    end = epochs_axis(run).high
    if run.config.data.target is not None:
        for epoch, name in ((schedule.source_epochs, "stage one"), (schedule.stage_two_epoch, "stage two")):
            if 0 < epoch < end and name not in [mark.name for mark in found]:
                found.append(Mark(epoch, name, is_upright=True))
    if len(found) == 2 and found[0].at == found[1].at:
        found.pop(0)
    return found


def _losses(run: RunRecord) -> Iterator[str]:
    for name, title in LOSSES.items():
        if name in run.steps:
            line = Series(name, *run.steps[name])
            steps = -(-len(line.x) // POINTS)
            label = f"a point is the mean of {steps} steps" if steps > 1 else ""
            yield _by_step(run, title, line, label, _stage_marks(run))


def _by_step(run: RunRecord, title: str, line: Series, label: str, marks: Sequence[Mark]) -> str:
    return line_chart(title, [line], epochs_axis(run), fitted([line.y], label, zero=True), marks=marks)


def _discriminator(run: RunRecord) -> Iterator[str]:
    if "balance" in run.steps:
        x, balance = run.steps["balance"]
        most = math.log(DOMAINS)
        # The balance loss is sum p log p + log K, in the published code + K/2: what is added is not entropy.
        added = DOMAINS / 2 if run.config.compat == "official" else most
        line = Series("entropy", x, added - balance)
        yield line_chart(
            "Discriminator's entropy",
            [line],
            epochs_axis(run),
            Axis(0, 0.8, "nats"),
            marks=[Mark(most, "log 2"), *_stage_marks(run)],
            note="At log 2, the most there is, it cannot tell the domains apart.",
        )
    if "domain_accuracy" in run.steps:
        line = Series("accuracy", *run.steps["domain_accuracy"])
        yield line_chart(
            "Discriminator's accuracy",
            [line],
            epochs_axis(run),
            Axis(0, 1, "in its own steps", is_share=True),
            marks=[Mark(0.5, "guessing"), *_stage_marks(run)],
        )


def _tests(run: RunRecord) -> Iterator[str]:
    names = list(dict.fromkeys(name for record in run.epochs for name in record.get("tests", {})))
    for key, title in SCORES.items():
        lines = [Series(name, *run.of_epochs("tests", name, key)) for name in names]
        if lines:
            y = fitted([line.y for line in lines], _where(lines), is_share=True, zero=True)
            yield line_chart(title, lines, epochs_axis(run), y, marks=_stage_marks(run))


def _where(lines: Sequence[Series]) -> str:
    return f"on {lines[0].name}" if len(lines) == 1 else "by test set"


def _clusters(run: RunRecord) -> Iterator[str]:
    count = Series("clusters", *run.of_epochs("clusters", "clusters"))
    if not len(count.x):
        return
    x = epochs_axis(run)
    yield line_chart("Pseudo-identities", [count], x, fitted([count.y], "clusters", zero=True))
    share = Series("kept", *run.of_epochs("clusters", "kept_share"))
    yield line_chart("Images kept", [share], x, Axis(0, 1, "of the target", is_share=True))
    lines = [Series(name, *run.of_epochs("clusters", key)) for key, name in PURITY.items()]
    if all(len(line.x) for line in lines):
        note = "By the target's true identities, which training never sees."
        yield line_chart("Purity of clusters", lines, x, Axis(0, 1, "share", is_share=True), note=note)


def _rate(run: RunRecord) -> Iterator[str]:
    if "lr" in run.steps:
        yield _by_step(run, "Learning rate", Series("lr", *run.steps["lr"]), "", ())


def timings(run: RunRecord) -> str:
    """Seconds of each stage by epoch, and in all."""
    if not run.epochs:
        return missing("No timings: no epoch is done yet.")
    x = np.array([record["epoch"] + 1 for record in run.epochs], np.float64)
    parts = [
        Series(name, x, np.array([float(record.get(key, 0)) for record in run.epochs]))
        for key, name in STAGES.items()
        if any(key in record for record in run.epochs)
    ]
    total = np.sum([part.y for part in parts], axis=0)
    y = fitted([total], "seconds", zero=True)
    chart = stacked_chart("Time by stage", parts, Axis(x[0] - 0.5, x[-1] + 0.5, "epoch"), y)
    whole = total.sum() or 1.0  # seconds are kept to a thousandth: a tiny run may have none
    rows = ""
    for key, name in STAGES.items():
        if spent := [float(record[key]) for record in run.epochs if key in record]:
            rows += (
                f"<tr><td>{text(name)}<td>{_duration(sum(spent))}<td>{sum(spent) / whole:.0%}"
                f"<td>{short(sum(spent) / len(spent))} s"
            )
    steps = run.steps.get("step_s")
    per_step = f"<p>{1000 * float(np.median(steps[1])):.0f} ms a step (median)</p>" if steps else ""
    return (
        f'<div class="charts">{chart}<div><table><tr><th>stage<th>in all<th>share<th>an epoch with it{rows}'
        f"<tr><td>all<td>{_duration(total.sum())}<td><td></table>{per_step}</div></div>\n"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def epoch_table(run: RunRecord) -> str:
    """The numbers behind the curves, an epoch a line, for readers without pictures."""
    names = list(dict.fromkeys(name for record in run.epochs for name in record.get("tests", {})))
    heads = "".join(f"<th>{text(name)} mAP<th>rank-1" for name in names)
    rows = ""
    for record in run.epochs:
        clusters = record.get("clusters", {})
        cells = [
            str(record["epoch"] + 1),
            text(str(record.get("stage", ""))),
            f"{clusters['clusters']:,}" if clusters else "",
            f"{clusters['kept_share']:.0%}" if clusters else "",
            f"{clusters['purity']:.1%}" if "purity" in clusters else "",
        ]
        for name in names:
            scores = record.get("tests", {}).get(name)
            cells += [f"{scores['map']:.1%}", f"{scores['rank1']:.1%}"] if scores else ["", ""]
        rows += "<tr>" + "".join(f"<td>{cell}" for cell in cells) + "\n"
    return (
        "<details><summary>Numbers by epoch</summary><div class=wide><table>"
        f"<tr><th>epoch<th>stage<th>clusters<th>kept<th>purity{heads}\n{rows}</table></div></details>\n"
    )
