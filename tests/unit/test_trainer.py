"""A run's parts: what they refuse at the start, what `compat` changes, and what the loop holds on to."""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dmx.cluster.sharded import ShardedPseudoLabels
from dmx.commands import train as command
from dmx.config import Config, from_tree
from dmx.data.shards import DatasetWriter
from dmx.distributed import World, own_cores
from dmx.errors import DmxError
from dmx.model.batchnorm import SynchronisedBatchNorm
from dmx.train import loop, trainer, worker
from dmx.train.checkpoint import MODEL, Checkpoint, Progress
from dmx.train.data import TrainingData, train_transform
from dmx.train.extraction import LocalFeed
from dmx.train.runlog import describe_run
from dmx.train.trainer import Trainer, build_trainer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
PEOPLE, IMAGES = 4, 3
MODEL_TREE = {
    "backbone": "resnet10t",
    "backbone_args": {"channels": [8, 8, 8, 8], "stem_width": 8},
    "discriminator_widths": [8],
}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run on sets whose images nobody decodes."""
    _write(tmp_path / "source", train=[0])
    _write(tmp_path / "target", train=[0])
    _write(tmp_path / "unseen", query=[0], gallery=[1])
    data = {"source": "source", "target": "target"}
    paths: dict[str, Any] = {name: str(tmp_path / folder) for name, folder in data.items()}
    return {"data": paths | {"tests": [str(tmp_path / "unseen")]}, "model": MODEL_TREE}


def _write(folder: Path, **cameras_by_split: list[int]) -> None:
    with DatasetWriter(folder, layout="folder") as writer:
        for split, cameras in cameras_by_split.items():
            for person in range(PEOPLE):
                for camera in cameras:
                    for index in range(IMAGES):
                        writer.add(split, b"image", person, camera, f"{split}/{person}/{camera}_{index}.jpg")


def _config(tree: dict[str, Any], **sections: Any) -> Config:
    return from_tree(("test", tree), ("change", sections))


# What fails at the start.


def test_a_batch_that_does_not_divide_is_refused_before_training(tree: dict[str, Any]) -> None:
    """Not at the first batch."""
    with pytest.raises(DmxError, match=r"batch\.identities wants a multiple of .* = 3 x 2, .*found 16"):
        TrainingData.open(_config(tree, batch={"accumulation": 3}), processes=2)


def test_a_test_set_without_answers_is_refused_before_training(tree: dict[str, Any], tmp_path: Path) -> None:
    """Every identity is in query and gallery under one camera."""
    _write(tmp_path / "useless", query=[0], gallery=[0])
    with pytest.raises(DmxError, match=r"useless: no valid query among 12: 0 are of .* and 12 of identities"):
        TrainingData.open(_config(tree, data={"tests": [str(tmp_path / "useless")]}))


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        (5, None, r"step-7: wanted a source of 5 identities, .* found 4 in .*source; give the data sets"),
        (4, 11, r"step-7: wanted a target of 11 images, .* found 12 in .*target; give the data sets"),
    ],
)
def test_other_data_than_the_checkpoints_are_refused(
    tree: dict[str, Any], tmp_path: Path, rows: int, images: int | None, message: str
) -> None:
    """Rows and labels go by number: on other data they would silently mean other people."""
    tensors: dict[str, dict[str, torch.Tensor]] = {"classifier": {"source": torch.zeros(rows, 2)}}
    if images is not None:
        tensors["labels"] = {"pseudo": torch.zeros(images, dtype=torch.int64)}
    config = _config(tree)
    saved = Checkpoint(tmp_path / "step-7", Progress(seed=0), config, tensors)
    with pytest.raises(DmxError, match=message):
        build_trainer(config, tmp_path / "run", ALONE, saved)


def test_saved_labels_without_a_target_are_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    """The run began with a target."""
    tensors = {"classifier": {"source": torch.zeros(4, 2)}, "labels": {"pseudo": torch.zeros(12)}}
    config = _config(tree, data={"target": None})
    saved = Checkpoint(tmp_path / "step-7", Progress(seed=0), config, tensors)
    with pytest.raises(DmxError, match=r"wanted a target of 12 images, .* found 0 in None"):
        build_trainer(config, tmp_path / "run", ALONE, saved)


@pytest.mark.parametrize(("share", "wanted"), [(0.56, 4), (0.5, 5), (1.0, 2), (None, 2)])
def test_a_batch_wants_as_many_pseudo_identities_as_the_sampler_draws(
    tree: dict[str, Any], share: float | None, wanted: int
) -> None:
    """0.44 of 10 identities are 4 by largest remainder, not 5."""
    data = TrainingData.open(_config(tree, batch={"identities": 10, "source_share": share}))
    assert data.least_pseudo_identities() == wanted


def test_true_labels_take_the_place_of_clusters(tree: dict[str, Any]) -> None:
    """People are numbered from 0; their rows are the unit means of their features."""
    data = TrainingData.open(_config(tree, cluster={"labels": "identities"}))
    assert data.target is not None
    run = _trainer(_config(tree, cluster={"labels": "identities"}), data)
    features = np.random.default_rng(0).standard_normal((PEOPLE * IMAGES, 2)).astype(np.float32)
    labels, rows = loop._cluster(run, 0, features)
    assert labels.labels.tolist() == np.repeat(np.arange(PEOPLE), IMAGES).tolist()
    assert labels.identities == PEOPLE
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = unit.reshape(PEOPLE, IMAGES, 2).mean(1)
    assert rows is not None
    np.testing.assert_allclose(rows, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)


def test_true_labels_want_a_target_that_has_them(tree: dict[str, Any], tmp_path: Path) -> None:
    """Not at the first epoch that uses it."""
    with DatasetWriter(tmp_path / "nameless", layout="crops") as writer:
        writer.add("train", b"image", -1, -1, "0.jpg")
    changes = {"data": {"target": str(tmp_path / "nameless")}, "cluster": {"labels": "identities"}}
    with pytest.raises(
        DmxError, match=r"nameless: cluster\.labels is identities, which wants a target with ident"
    ):
        TrainingData.open(_config(tree, **changes))


@pytest.mark.parametrize("cluster", [{"centre_cameras": True}, {"same_camera_share": 0.25}])
def test_keeping_cameras_out_wants_cameras(
    tree: dict[str, Any], tmp_path: Path, cluster: dict[str, Any]
) -> None:
    """They would do nothing, and nobody would know."""
    with DatasetWriter(tmp_path / "anywhere", layout="crops") as writer:
        writer.add("train", b"image", -1, -1, "0.jpg")
    changes = {"data": {"target": str(tmp_path / "anywhere")}, "cluster": cluster}
    with pytest.raises(DmxError, match=r"anywhere: cluster\.centre_cameras and .* want a target with cam"):
        TrainingData.open(_config(tree, **changes))


# What `compat` changes.


def test_official_reads_randperson_cameras_without_their_scene(tmp_path: Path) -> None:
    """Camera 1 of scene 3 is 301, and 1 in the published code."""
    folder = tmp_path / "randperson_subset"
    folder.mkdir()
    for name in ("000000_s00_c00_f000264.jpg", "000007_s03_c01_f000001.jpg"):
        (folder / name).write_bytes(b"image")
    for compat, cameras in (("fixed", [0, 301]), ("official", [0, 1])):
        data = TrainingData.open(
            _config({"data": {"source": str(folder), "target": str(folder)}}, compat=compat)
        )
        assert data.source.cameras.tolist() == cameras
        assert data.target is not None
        assert data.target.cameras.tolist() == cameras


@pytest.mark.parametrize(("compat", "fill"), [("fixed", "normalised"), ("official", "raw")])
def test_official_erases_to_the_raw_mean(monkeypatch: pytest.MonkeyPatch, compat: str, fill: str) -> None:
    """Of images that are normalised already."""
    monkeypatch.setattr("dmx.train.data.TrainTransform", lambda *_, erase_fill, **__: erase_fill)
    asked: Any = train_transform(from_tree(("test", {"compat": compat})))
    assert asked == fill


@dataclass
class FakeEngine:
    """What build_trainer needs of an engine, without a process group."""

    module: nn.Module
    settings: Any
    world: World
    forgot: int = 0

    def load_optimizer_state(self, moments: dict[str, torch.Tensor], steps: int) -> None:
        """Nothing to put back."""

    def forget_moments(self) -> None:
        """Count it."""
        self.forgot += 1

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that need no process group."""
    monkeypatch.setattr(trainer, "Engine", FakeEngine)
    monkeypatch.setattr(trainer, "share", lambda world, value: value)


@pytest.mark.usefixtures("without_deepspeed")
@pytest.mark.parametrize(("compat", "kept"), [("fixed", 0.25), ("official", None)])
def test_official_finds_the_threshold_anew_on_resume(
    tree: dict[str, Any], tmp_path: Path, compat: str, kept: float | None
) -> None:
    """A checkpoint keeps the first clustering's; the published code forgets it."""
    config = _config(tree, compat=compat)
    (tmp_path / "run").mkdir()
    with build_trainer(config, tmp_path / "run", ALONE, None) as begun:
        classifier, _ = begun.players.classifier.state()
        parts = {MODEL: begun.players.generator.module, "discriminator": begun.players.discriminator.module}
        tensors = {name: module.state_dict() for name, module in parts.items()} | {"classifier": classifier}
    steps = {"generator": 0, "discriminator": 0, "source": 0, "pseudo": 0}
    progress = Progress(seed=0, epoch=2, independence_threshold=0.25, adam_steps=steps)
    saved = Checkpoint(tmp_path / "step-7", progress, config, tensors)
    with build_trainer(config, tmp_path / "run", ALONE, saved) as resumed:
        assert resumed.progress.independence_threshold == kept


@pytest.mark.usefixtures("without_deepspeed")
@pytest.mark.parametrize(("compat", "synchronised"), [("fixed", True), ("official", False)])
def test_official_normalises_per_process(
    tree: dict[str, Any], tmp_path: Path, compat: str, synchronised: bool
) -> None:
    """Batch norm is over all processes; in the published code over each one's images."""
    second = replace(ALONE, rank=1, size=2)
    with build_trainer(_config(tree, compat=compat), tmp_path, second, None) as begun:
        for engine in (begun.players.generator, begun.players.discriminator):
            norms = [m for m in engine.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            assert norms
            assert all(isinstance(norm, SynchronisedBatchNorm) == synchronised for norm in norms)


@pytest.mark.usefixtures("without_deepspeed")
def test_the_first_process_decides_on_the_precision(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` follows its hardware, not each host's own."""
    monkeypatch.setattr(trainer, "precision_here", lambda wanted, device: "bf16")
    monkeypatch.setattr(trainer, "share", lambda world, value: "fp32")
    second = replace(ALONE, rank=1, size=2)
    with build_trainer(_config(tree, optim={"precision": "auto"}), tmp_path, second, None) as begun:
        assert begun.players.generator.settings.precision == "fp32"


# What the loop does.


@dataclass
class FakeClassifier:
    """Records how an epoch began."""

    begun: list[tuple[Any, bool]] = field(default_factory=list)

    def set_pseudo_rows(
        self, centroids: torch.Tensor | None, identities: int, *, forget_moments: bool
    ) -> None:
        """Record it."""
        self.begun.append((centroids, forget_moments))

    def set_lr(self, lr: float) -> None:
        """Nothing to set."""


def _trainer(config: Config, data: Any = None) -> Trainer:
    """A trainer that trains nothing."""
    players: Any = SimpleNamespace(
        generator=FakeEngine(nn.Identity(), None, ALONE),
        discriminator=FakeEngine(nn.Identity(), None, ALONE),
        classifier=FakeClassifier(),
    )
    for engine in (players.generator, players.discriminator):
        engine.set_lr = lambda lr: None
    return Trainer(config, Path(), ALONE, data, players, Progress(seed=0), None)


@pytest.mark.parametrize(
    ("compat", "forgets"), [("fixed", [False] * 4), ("official", [False] * 2 + [True] * 2)]
)
def test_official_forgets_moments_in_every_epoch_of_stage_two(compat: str, forgets: list[bool]) -> None:
    """Of both players and the classifier."""
    run = _trainer(from_tree(("test", {"compat": compat, "schedule": {"stage_two_epoch": 2}})))
    for epoch in range(4):
        loop.pseudo_label(run, epoch, None)
    players: Any = run.players
    assert [forget for _, forget in players.classifier.begun] == forgets
    assert players.generator.forgot == players.discriminator.forgot == sum(forgets)


def test_a_useless_clustering_does_not_fix_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that is trained on does."""
    sizes = iter([1, 3, 3])
    thresholds = iter([0.9, 0.25, 0.25])
    given = []

    def cluster(features: Any, *, independence_threshold: float | None, **_: Any) -> ShardedPseudoLabels:
        given.append(independence_threshold)
        people, labels = next(sizes), np.zeros(6, np.int64)
        return ShardedPseudoLabels(labels, next(thresholds), people, torch.zeros(people, 2), None)

    monkeypatch.setattr(loop, "sharded_pseudo_labels", cluster)
    run = _trainer(Config(), SimpleNamespace(least_pseudo_identities=lambda: 2, target=range(6)))
    for epoch in range(3):
        loop._cluster(run, epoch, np.eye(6, 2, dtype=np.float32) + 1)
    assert given == [None, None, 0.25]


def test_features_are_gone_when_training_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of them are gigabytes."""
    alive: list[Any] = []

    def embed(run: Trainer, epoch: int) -> Any:
        features = np.zeros((3, 2), np.float32)
        alive.append(weakref.ref(features))
        return features

    monkeypatch.setattr(loop, "embed", embed)
    monkeypatch.setattr(loop, "pseudo_label", lambda run, epoch, features: None)
    monkeypatch.setattr(loop, "train", lambda run, epoch, labels: alive.append(alive.pop()()))
    monkeypatch.setattr(loop, "evaluate", lambda run, epoch: None)
    loop.run_epochs(_trainer(from_tree(("test", {"schedule": {"epochs": 2}}))))
    assert alive == [None, None]


def test_an_error_in_a_step_ends_the_stream_and_counts_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the threads that decode would live on in whoever holds the error."""
    ended = []

    def steps(*_: Any) -> Iterator[list[Any]]:
        try:
            yield []
        finally:
            ended.append(True)

    def fail(*_: Any, **__: Any) -> None:
        raise DmxError("a bad step")

    monkeypatch.setattr(loop, "train_model", fail)
    run = _trainer(Config(), SimpleNamespace(steps=steps, num_source=2))
    with pytest.raises(DmxError, match="a bad step") as held:
        loop.train(run, 0, None)
    assert ended == [True]
    assert held.traceback, "still held: letting go of it would end the stream in any case"
    assert "train_s" in run.progress.record


def test_processes_share_the_cores_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes its part, and at least one."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    assert [own_cores(replace(ALONE, local_size=n)) for n in (1, 4, 12)] == [6, 1, 1]
    split: Any = [0] * 3
    three = replace(ALONE, local_size=3)
    assert LocalFeed(three, split, 8, 4, 2).threads == 2
    assert [LocalFeed(three, split, 8, 4, 2, cpus).threads for cpus in (2, 3, 5, 60)] == [1, 1, 1, 2]


# What is reported.


def _finished(config: Config, folder: Path) -> dict[str, Any]:
    """The result of a run over three epochs of which the second was the best."""
    epochs = [
        {"epoch": epoch, "clusters": epoch, "tests": {"unseen": _metrics(score)}}
        for epoch, score in enumerate((0.25, 0.5, 0.375))
    ]
    run = _trainer(config)
    run.run, run.progress.epochs = folder, epochs
    worker._write_result(run, config)
    result: dict[str, Any] = json.loads((folder / worker.RESULT).read_text())
    return result


def _metrics(score: float) -> dict[str, float]:
    names = ("map", "rank1", "rank5", "rank10", "minp")
    return dict.fromkeys(names, score) | {"valid_queries": 3}


def test_official_reports_the_best_epoch_and_says_so(tmp_path: Path) -> None:
    """As the published code does; otherwise the last one, for choosing on a test set is cheating."""
    config = from_tree(("test", {"schedule": {"epochs": 3}}))
    fixed = _finished(config, tmp_path)
    assert (fixed["epoch"], fixed["tests"]["unseen"]["map"], fixed["chosen_on_tests"]) == (2, 0.375, False)
    assert "best" not in command._table(fixed)
    official = _finished(replace(config, compat="official"), tmp_path)
    assert (official["epoch"], official["tests"]["unseen"]["map"], official["clusters"]) == (1, 0.5, 1)
    assert "of epoch 2 of 3, the best on the first test set" in command._table(official)


def test_the_last_line_is_the_next_command(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To be copied as it stands."""
    run = tmp_path / "run"
    config = _config(tree)
    describe_run(run, config)
    _finished(config, run)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--run", str(run), "--resume"])) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"dmx evaluate {run} DATASET"


def test_the_worker_waits_as_long_as_the_settings_say(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever started it: the run's own configuration tells."""
    describe_run(tmp_path / "run", _config(tree, timeout_s=77))
    asked = []

    def world(timeout_s: float, local: Any) -> Any:
        asked.append(timeout_s)
        raise DmxError("far enough")

    monkeypatch.setattr(worker, "world", world)
    with pytest.raises(DmxError, match="far enough"):
        worker.train_worker(tmp_path / "run")
    assert asked == [77.0]
