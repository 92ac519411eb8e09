"""Progress: bars on a terminal, lines that grow rare elsewhere, and counts that come to their totals."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from dmx import progress
from dmx.cluster import pseudo_labels
from dmx.cluster.sharded import Group, sharded_pseudo_labels
from dmx.cluster.sharded.neighbours import _Step
from dmx.evaluation import Embedded, evaluate
from dmx.kernels.cpu.candidates import pairs_within
from dmx.kernels.knn import knn
from dmx.kernels.progress import Counter, adding_up, counting, listening


@dataclass
class Heard:
    """A listener that keeps what it is told."""

    totals: dict[str, tuple[int, str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, total: int, label: str, unit: str) -> AbstractContextManager[Counter]:
        self.totals[label], self.counts[label] = (total, unit), 0
        heard = self

        class Count:
            def update(self, count: int = 1) -> None:
                heard.counts[label] += count

        return nullcontext(Count())

    def assert_whole(self, *labels: str) -> None:
        assert set(labels) <= self.totals.keys()
        assert self.counts == {label: total for label, (total, _) in self.totals.items()}


def features(people: int, images: int = 12, width: int = 32) -> np.ndarray:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(people, 1, width))
    return (centres + 0.3 * rng.normal(size=(people, images, width))).reshape(-1, width).astype(np.float32)


@pytest.mark.parametrize("people", [7, 130])  # within a block of everything, and beyond
def test_every_step_of_clustering_is_told_to_its_end(people: int) -> None:
    heard = Heard()
    x = features(people)
    with listening(heard):
        told = pseudo_labels(x, device="cpu")
    heard.assert_whole("neighbours", "k-reciprocal sets", "query expansion", "Jaccard distances", "DBSCAN")
    assert heard.totals["neighbours"] == (pairs_within(len(x)), "pairs")
    assert heard.totals["Jaccard distances"] == (len(x), "rows")
    assert np.array_equal(told.labels, pseudo_labels(x, device="cpu").labels)


def test_a_search_among_others_is_told_to_its_end() -> None:
    heard = Heard()
    with listening(heard):
        knn(torch.from_numpy(features(50)), torch.from_numpy(features(90)), 5)
    assert heard.totals["neighbours"] == (50 * 12 * 90 * 12, "pairs")
    heard.assert_whole("neighbours")


@pytest.mark.parametrize("sizes", [(7,), (5, 5), (5, 0, 8), (4, 9, 2, 7), (3, 1, 4, 1, 5)])
def test_all_workers_together_compare_every_pair_once(sizes: tuple[int, ...]) -> None:
    bounds = tuple(np.cumsum((0, *sizes)).tolist())
    pairs = 0
    for rank, own in enumerate(sizes):
        group, nothing = Group(None, rank, len(sizes), bounds), torch.empty(0)
        steps = [_Step(group, t, nothing, nothing, 3) for t in range(1, len(sizes) // 2 + 1)]
        pairs += pairs_within(own) + sum(step.pairs for step in steps)
    assert pairs == pairs_within(bounds[-1])


def test_a_shard_tells_its_neighbours_as_one_step() -> None:
    heard = Heard()
    with listening(heard):
        sharded_pseudo_labels(features(60), group=Group(None, 0, 1, (0, 720)), device="cpu")
    assert heard.totals["neighbours"] == (pairs_within(720), "pairs")
    assert "neighbours, exact order" not in heard.totals, "which is within it"
    heard.assert_whole("neighbours", "DBSCAN")


@pytest.mark.parametrize("rerank", [False, True])
def test_evaluation_is_told_to_its_end(rerank: bool) -> None:
    x = features(40)
    sides = [
        Embedded(x[i::2], np.arange(len(x))[i::2] // 12, np.full(len(x) // 2, i, np.int32)) for i in (0, 1)
    ]
    heard = Heard()
    with listening(heard):
        evaluate(*sides, rerank=rerank, block_bytes=40 * len(x))
    heard.assert_whole("evaluation", *(("re-ranking: sets", "re-ranking: weights") if rerank else ()))
    assert heard.totals["evaluation"] == (240, "queries")


def test_within_a_step_only_its_own_parts_count() -> None:
    heard = Heard()
    with listening(heard):
        with adding_up(5, "whole", "pairs"):
            with counting(2, "part", "pairs") as count:
                count(2)
            with counting(9, "other", "rows") as count:
                count(9)
        with counting(3, "plain", "pairs") as count, counting(4, "inner", "pairs") as inner:
            inner(4)
            count(3)
    assert heard.counts == {"whole": 2, "plain": 3}
    with counting(3, "nobody listens", "rows") as count:
        count(3)


def test_lines_come_at_growing_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A day's job must not fill its log, and stays in sight all the same."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress.progress_bar(86_400, "train", "steps") as bar:
        at = []
        for _ in range(86_400):
            clock[0] += 1
            bar.update()
            if capsys.readouterr().err:
                at.append(clock[0])
    gaps = np.diff([0.0, *at])
    assert gaps[0] == 10
    assert (np.diff(gaps) >= -1).all()  # they end at whole seconds here
    assert gaps.max() <= 301
    assert len(at) < 310
    assert capsys.readouterr().err == "train: 86400/86400 steps, 24 h 00 min, 1 steps/s\n"


def test_a_line_has_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress.progress_bar(5_000_000_000, "neighbours", "pairs") as bar:
        clock[0] = 20.0
        bar.update(1_000_000_000)
        assert capsys.readouterr().err == "neighbours: 1.00G/5.00G pairs, 20 s, 50.0M pairs/s, 80 s left\n"
        clock[0] = 20.5
        bar.update(1_000)
        assert not capsys.readouterr().err


def test_what_takes_no_time_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(3, "blink", "rows") as bar:
        bar.update(3)
    assert not capsys.readouterr().err


def test_what_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress.progress_bar(3, "blink", "rows") as bar:
        bar.update(1 // 0)
    assert "blink: 0/3 rows" in (said := capsys.readouterr().err)
    assert "(stopped)" in said


ON_A_TERMINAL = """
import time
from dmx.progress import progress_bar, say
with progress_bar(4, "short", "rows") as bar:
    bar.update(4)
with progress_bar(6, "long", "images") as bar:
    for i in range(6):
        time.sleep(0.4)
        bar.update()
        if i == 3:
            say("a word between")
"""


def test_on_a_terminal_there_are_bars_and_whole_lines_above_them() -> None:
    master, slave = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    text = b""
    with suppress(OSError):  # a pseudo-terminal ends so when nobody holds its other end any more
        while part := os.read(master, 4096):
            text += part
    assert child.wait() == 0
    seen = [line for line in re.split(r"[\r\n]+", text.decode()) if line.strip()]
    assert not any("short" in line for line in seen)
    assert "a word between" in [line.strip() for line in seen]
    assert re.search(r"long: 100%.* 6/6 \[00:02<00:00, +\d.\d+ images/s", text.decode())
