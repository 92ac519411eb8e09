"""A run's parts put together: built from its configuration, saved into checkpoints, put back from them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from dmx.config import Config
from dmx.data.shards import Split
from dmx.distributed import World, share
from dmx.errors import DmxError
from dmx.model import Discriminator, build_model, synchronise_batchnorm
from dmx.train.checkpoint import MODEL, Checkpoint, Progress, write_checkpoint
from dmx.train.classifier import INITIAL_STD, Classifier, ClassifierSettings
from dmx.train.clusters import forget_clusters_from
from dmx.train.data import EpochLabels, TrainingData
from dmx.train.engines import Engine, EngineSettings, Precision, precision_here
from dmx.train.extraction import Feed, make_feed
from dmx.train.runlog import RunLog, versions
from dmx.train.step import Players
from dmx.train.trackers import make_trackers
from dmx.waiting import waiting

DOMAINS = 2


@dataclass
class Trainer:
    """A run in progress: what is trained, on what, and how far it has come."""

    config: Config
    run: Path
    world: World
    data: TrainingData
    players: Players
    progress: Progress
    log: RunLog | None
    saved_labels: EpochLabels | None = None
    left_out_in_a_row: int = 0
    feeds: dict[int, Feed] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the logs and take the engines off the modules."""
        if self.log is not None:
            self.log.close(failed=error[0] is not None)
        self.players.generator.close()
        self.players.discriminator.close()

    @property
    def width(self) -> int:
        """Feature width, D."""
        return self.players.classifier.settings.width

    def feed(self, split: Split, batch_size: int) -> Feed:
        """Decoded batches of one of the run's splits, to embed it in every epoch. Collective."""
        if id(split) not in self.feeds:
            data = self.config.data
            self.feeds[id(split)] = make_feed(self.world, split, data.height, data.width, batch_size)
        return self.feeds[id(split)]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to the epoch's record as `name`_s; a wait in vain names it."""
        start = time.monotonic()
        try:
            with waiting(name):
                yield
        finally:
            spent_s = self.progress.record.get(f"{name}_s", 0.0) + time.monotonic() - start
            self.progress.record[f"{name}_s"] = round(spent_s, 3)

    def inference_model(self) -> nn.Module:
        """The embedding model for features, the same on every process."""
        generator = self.players.generator
        if self.config.compat == "official":
            # Batch norm is per process there; like the published replicas', only the first one's is used.
            generator.share_buffers()
        return generator.for_inference()

    def save(self, labels: EpochLabels | None = None, *, best: bool = False) -> None:
        """Write a checkpoint; with the epoch's labels when it is taken in the middle of one. Collective.

        Args:
            labels: of the epoch, when the checkpoint is taken in the middle of it.
            best: record it as the best one so far, too.
        """
        with waiting(f"the checkpoint at step {self.progress.global_step}"):
            tensors = self._tensors(labels)
        if self.log is not None:
            self.log.require_writer()
            facts = {
                "pseudo_identities": 0 if labels is None else labels.identities,
                "processes": self.world.size,
                "zero_stage": self.config.optim.zero_stage,
                "precision": self.players.generator.settings.precision,
                "versions": versions(),
            }
            keep = self.config.schedule.keep_checkpoints
            write_checkpoint(self.run, self.progress, self.config, tensors, keep=keep, best=best, facts=facts)

    def _tensors(self, labels: EpochLabels | None) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file, whole on the first process. Collective."""
        generator, discriminator, classifier = (
            self.players.generator,
            self.players.discriminator,
            self.players.classifier,
        )
        if self.config.compat == "official":
            generator.share_buffers()
            discriminator.share_buffers()
        g_moments, g_steps = generator.optimizer_state()
        d_moments, d_steps = discriminator.optimizer_state()
        rows, row_steps = classifier.state()
        self.progress.adam_steps = {"generator": g_steps, "discriminator": d_steps, **row_steps}
        return {
            MODEL: generator.module_state(),
            "discriminator": discriminator.module_state(),
            "optimizer": {f"generator.{k}": v for k, v in g_moments.items()}
            | {f"discriminator.{k}": v for k, v in d_moments.items()},
            "classifier": rows,
            "labels": {} if labels is None else {"pseudo": labels.labels},
        }


def build_trainer(config: Config, run: Path, world: World, checkpoint: Checkpoint | None) -> Trainer:
    """Put a run together, at its start or where a checkpoint left it. Collective.

    Args:
        config: the resolved configuration.
        run: the run folder.
        world: this process among the others.
        checkpoint: where to go on; None starts.

    Raises:
        DmxError: the data sets or settings do not fit each other, or the checkpoint.
    """
    data = TrainingData.open(config, world.size)
    if checkpoint is not None:
        _require_same_data(checkpoint, data)
    progress = Progress(seed=config.seed) if checkpoint is None else checkpoint.progress
    if config.compat == "official":
        # The published code computes the threshold anew when it resumes.
        progress.independence_threshold = None
    torch.manual_seed(config.seed)
    # A checkpoint brings the weights: nothing to download, nothing else to read.
    wanted = config.model if checkpoint is None else replace(config.model, pretrained=False, weights=None)
    model = build_model(wanted)
    discriminator = Discriminator(model.width, DOMAINS, config.model.discriminator_widths)
    source_rows = torch.randn(data.num_source, model.width) * INITIAL_STD
    if checkpoint is not None:
        model.load_state_dict(checkpoint.tensors[MODEL])
        discriminator.load_state_dict(checkpoint.tensors["discriminator"])
    if config.compat == "fixed" and world.size > 1:
        model, discriminator = synchronise_batchnorm(model), synchronise_batchnorm(discriminator)
    classifier = Classifier(world, _classifier_settings(config, model.width), source_rows)
    # One decision for all: hosts may differ in what their hardware computes in.
    precision = share(world, precision_here(config.optim.precision, world.device.type))
    settings = _engine_settings(config, precision)
    with waiting("the engines of all"):
        players = Players(Engine(model, settings, world), Engine(discriminator, settings, world), classifier)
    log = None
    if world.leads:
        trackers = make_trackers(config, run, progress.global_step)
        log = RunLog(run, global_step=progress.global_step, epoch=progress.epoch, trackers=trackers)
        # In the middle of an epoch its clusters stay: it goes on with their labels.
        forget_clusters_from(run, progress.epoch + (progress.step > 0))
    trainer = Trainer(config, run, world, data, players, progress, log)
    if checkpoint is not None:
        _restore(trainer, checkpoint)
    return trainer


def _require_same_data(checkpoint: Checkpoint, data: TrainingData) -> None:
    """Classifier rows and pseudo-labels are by number: on other data they would mean other people."""
    advice = "give the data sets that the run was begun with, or choose another --run"
    rows = len(checkpoint.tensors["classifier"]["source"])
    if rows != data.num_source:
        raise DmxError(
            f"{checkpoint.path}: wanted a source of {rows} identities, as when this run was saved, found "
            f"{data.num_source} in {data.config.data.source}; {advice}"
        )
    saved = checkpoint.tensors.get("labels")
    if saved is None:
        return
    images = 0 if data.target is None else len(data.target)
    if len(saved["pseudo"]) != images:
        raise DmxError(
            f"{checkpoint.path}: wanted a target of {len(saved['pseudo'])} images, whose pseudo-labels this "
            f"run was saved with, found {images} in {data.config.data.target}; {advice}"
        )


def _restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    steps = checkpoint.progress.adam_steps
    moments = checkpoint.tensors.get("optimizer", {})
    for name in ("generator", "discriminator"):
        engine: Engine = getattr(trainer.players, name)
        engine.load_optimizer_state(_with_prefix(moments, f"{name}."), steps[name])
    trainer.players.classifier.load_state(checkpoint.tensors["classifier"], steps)
    labels = checkpoint.tensors.get("labels")
    if labels is not None:
        trainer.saved_labels = EpochLabels(labels["pseudo"], int(labels["pseudo"].max()) + 1)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _engine_settings(config: Config, precision: Precision) -> EngineSettings:
    optim = config.optim
    return EngineSettings(
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
        accumulation=config.batch.accumulation,
        zero_stage=optim.zero_stage,
        precision=precision,
    )


def _classifier_settings(config: Config, width: int) -> ClassifierSettings:
    block_mb = config.classifier.block_mb
    return ClassifierSettings(
        width=width,
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        smoothing=config.loss.label_smoothing,
        scale=config.loss.logit_scale,
        precision=config.classifier.precision,
        block_bytes=None if block_mb is None else int(block_mb * 2**20),
    )
