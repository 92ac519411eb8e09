"""The training loop. Read this first.

Every epoch embeds the unlabelled target, clusters the embeddings into pseudo-identities, trains on both
domains together and reports on the test sets:

    embed -> pseudo_label -> train -> evaluate

Without a target, and in the first `schedule.source_epochs`, the same loop trains on the source alone.
Every function here is collective: all processes call it together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmx import stopping
from dmx.cluster.sharded import ShardedPseudoLabels, sharded_centroids, sharded_pseudo_labels
from dmx.cluster.validation import as_features
from dmx.data.shards import Split
from dmx.distributed import meet, share, use_cores
from dmx.evaluation import Embedded
from dmx.evaluation import evaluate as evaluate_retrieval
from dmx.neighbours import as_clustered, find_neighbours, label_settings
from dmx.progress import progress_bar, say
from dmx.train.clusters import EpochClusters, write_clusters
from dmx.train.data import EpochLabels
from dmx.train.extraction import extract, extract_shards, shards_of
from dmx.train.not_finite import leave_out
from dmx.train.purity import cluster_report
from dmx.train.schedule import (
    begins_anew,
    identity_weight,
    learning_rate,
    trains_discriminator,
    uses_target,
)
from dmx.train.schedule import stage as stage_of
from dmx.train.step import NotFiniteError, train_discriminator, train_model
from dmx.train.trainer import Trainer
from dmx.waiting import waiting

Features = NDArray[np.float32]

EMBED_BATCH = 64


def run_epochs(trainer: Trainer) -> None:
    """Train from where the run stands to its last epoch."""
    for epoch in range(trainer.progress.epoch, trainer.config.schedule.epochs):
        # No name keeps the features: they may be gigabytes, and only clustering needs them.
        labels = pseudo_label(trainer, epoch, embed(trainer, epoch))
        train(trainer, epoch, labels)
        evaluate(trainer, epoch)


def embed(trainer: Trainer, epoch: int) -> Features | None:
    """Unit embeddings of the target's images: (own rows, D), an equal share of (N, D) on each process.

    None when this epoch needs none: it trains on the source alone, or goes on in its middle.
    """
    target = trainer.data.target
    if target is None or not uses_target(trainer.config, epoch) or trainer.progress.step > 0:
        return None
    meet(trainer.world, f"embedding of epoch {epoch}")
    with trainer.timed("embed"):
        return _embed_split(trainer, target, "embed target", extract_shards)


def pseudo_label(trainer: Trainer, epoch: int, features: Features | None) -> EpochLabels | None:
    """Cluster the target and give the pseudo-identities their classifier rows.

    None when this epoch trains on the source alone.
    """
    if trainer.progress.step > 0:
        return trainer.saved_labels
    forget = begins_anew(trainer.config, epoch)
    if forget:
        trainer.players.generator.forget_moments()
        trainer.players.discriminator.forget_moments()
    labels, centroids, identities = None, None, 0
    if features is not None:
        with trainer.timed("cluster"):
            labels, centroids = _cluster(trainer, epoch, features)
        identities = labels.identities
        _report_clusters(trainer, epoch, labels)
    trainer.players.classifier.set_pseudo_rows(centroids, identities, forget_moments=forget)
    return labels


def train(trainer: Trainer, epoch: int, labels: EpochLabels | None) -> None:
    """The epoch's remaining steps, with a checkpoint now and then.

    Raises:
        Stopped: on all processes behind the same step, once a checkpoint of it is written.
    """
    config, players, world = trainer.config, trainer.players, trainer.world
    use_cores(world)
    stage = stage_of(config, epoch, 0 if labels is None else labels.identities)
    lr = learning_rate(config, epoch)
    for player in (players.generator, players.discriminator, players.classifier):
        player.set_lr(lr)
    trainer.progress.record |= {"stage": stage.value, "lr": lr}
    steps = config.schedule.steps_per_epoch
    first = trainer.progress.step
    label = f"epoch {epoch + 1}/{config.schedule.epochs}, stage {stage.value}"
    weight = identity_weight(config, epoch)
    with (
        trainer.timed("train"),
        stopping.deferred(),
        progress_bar(steps - first, label, "steps") as bar,
        closing(trainer.data.steps(epoch, first, labels, world)) as stream,
    ):
        for step, batches in enumerate(stream, first):
            start = time.monotonic()
            torch.manual_seed(_step_seed(config.seed, epoch, step, world.rank))
            with waiting(f"step {step} of epoch {epoch}"):
                try:
                    if trains_discriminator(config, stage, step):
                        losses = train_discriminator(players, config, trainer.data.num_source, batches, world)
                    else:
                        losses = train_model(
                            players, config, trainer.data.num_source, stage, weight, batches, world
                        )
                    trainer.left_out_in_a_row = 0
                except NotFiniteError as error:
                    losses = leave_out(trainer, epoch, step, labels, error)
            _log_step(trainer, epoch, step, {"lr": lr, **losses, "step_s": time.monotonic() - start})
            _count_step(trainer, epoch, step, labels)
            bar.set_postfix_str(", ".join(f"{k} {v:.3g}" for k, v in losses.items()), refresh=False)
            bar.update(1)
            if stopping.agreed():
                raise stopping.Stopped


def evaluate(trainer: Trainer, epoch: int) -> None:
    """Close the epoch: report on the test sets, log, write a checkpoint."""
    config = trainer.config
    record = {"epoch": epoch, **trainer.progress.record}
    if _is_tested(trainer, epoch):
        with trainer.timed("evaluate"):
            tests = _test(trainer, epoch)
        record |= {"tests": tests, "evaluate_s": trainer.progress.record["evaluate_s"]}
        _say(trainer, f"epoch {epoch + 1}: " + "; ".join(_line(name, m) for name, m in tests.items()))
    if trainer.log is not None:
        trainer.log.epoch(record, trainer.progress.global_step)
    progress = trainer.progress
    progress.epoch, progress.step, progress.record = epoch + 1, 0, {}
    progress.epochs.append(record)
    trainer.saved_labels = None
    # The published code keeps the checkpoint that is best on a test set, too.
    trainer.save(best=config.compat == "official" and progress.best_epoch() is record)


def _is_tested(trainer: Trainer, epoch: int) -> bool:
    """Whether the test sets follow an epoch."""
    schedule = trainer.config.schedule
    is_last = epoch + 1 == schedule.epochs
    return bool(trainer.data.tests) and (is_last or (epoch + 1) % schedule.evaluate_every == 0)


def _embed_split(
    trainer: Trainer, split: Split, label: str, make: Callable[..., Features] = extract
) -> Features:
    """Embeddings of a split, made by all processes: (N, D) on the first, or as `make` leaves them."""
    world = trainer.world
    use_cores(world)
    with waiting(label):
        feed = trainer.feed(split, EMBED_BATCH)
        return make(feed, trainer.inference_model(), trainer.width, world, label)


def _cluster(trainer: Trainer, epoch: int, features: Features) -> tuple[EpochLabels, Tensor | None]:
    """Pseudo-labels (N,), and this process's share of the centroids; None where there are too few.

    The first clustering that is used fixes the independence threshold.
    """
    world, settings = trainer.world, trainer.config.cluster
    meet(world, f"clustering of epoch {epoch}")
    assert trainer.data.target is not None
    group = shards_of(world, len(trainer.data.target))
    rows, squares = as_features(features, world.device.type, may_be_empty=True)
    if settings.labels == "identities":
        known = trainer.data.true_labels()
        identities = int(known.max()) + 1
        return EpochLabels(known, identities), sharded_centroids(group, rows, squares, known, identities)
    cameras = trainer.data.target.cameras if settings.needs_cameras else None
    seen, seen_squares = as_clustered(group, rows, squares, settings, cameras)
    found = sharded_pseudo_labels(
        seen,
        group=group,
        device=world.device.type,
        neighbours=find_neighbours(group, seen, seen_squares, settings, cameras),
        centroids_of=(rows, squares),
        independence_threshold=trainer.progress.independence_threshold,
        **label_settings(settings),
    )
    labels, identities = torch.from_numpy(found.labels), found.num_identities
    wanted = trainer.data.least_pseudo_identities()
    _keep_clusters(trainer, epoch, found, identities >= wanted)
    if identities < wanted:
        _say(
            trainer,
            f"warning: clustering found {identities} pseudo-identities, a batch wants {wanted}: this epoch "
            "trains on the source alone. If it stays so, train longer on the source (schedule.source_epochs) "
            "or raise cluster.eps",
        )
        return EpochLabels(torch.full_like(labels, -1), 0), None
    trainer.progress.independence_threshold = found.independence_threshold
    return EpochLabels(labels, identities), found.centroids


def _keep_clusters(trainer: Trainer, epoch: int, found: ShardedPseudoLabels, used: bool) -> None:
    """Write down what was found, by the first process, which alone knows why."""
    if trainer.log is not None and found.evidence is not None:
        trainer.log.require_writer()
        clusters = EpochClusters(epoch, found.evidence, found.independence_threshold, used)
        write_clusters(trainer.run, clusters, trainer.config.schedule.keep_clusters)


def _report_clusters(trainer: Trainer, epoch: int, labels: EpochLabels) -> None:
    assert trainer.data.target is not None
    report = cluster_report(labels.labels.numpy(), trainer.data.target.identities)
    trainer.progress.record |= {"clusters": report}
    purity = f", purity {report['purity']:.1%}" if "purity" in report else ""
    _say(
        trainer,
        f"epoch {epoch + 1}: {report['clusters']} pseudo-identities of {report['kept']} images "
        f"({report['kept_share']:.0%}){purity}",
    )


def _log_step(trainer: Trainer, epoch: int, step: int, values: dict[str, float]) -> None:
    if trainer.log is not None:
        where = {"global_step": trainer.progress.global_step, "epoch": epoch, "step": step}
        trainer.log.step(where | values)


def _count_step(trainer: Trainer, epoch: int, step: int, labels: EpochLabels | None) -> None:
    """Move on by one step, and write a checkpoint when it is time for one, before long tests, or to stop."""
    schedule, progress = trainer.config.schedule, trainer.progress
    progress.epoch, progress.step = epoch, step + 1
    progress.global_step += 1
    if step + 1 == schedule.steps_per_epoch:
        is_due = _is_tested(trainer, epoch)
    else:
        every = schedule.checkpoint_every_steps
        is_due = every > 0 and (step + 1) % every == 0
    if is_due or stopping.agreed():
        trainer.save(labels)


def _test(trainer: Trainer, epoch: int) -> dict[str, dict[str, float]]:
    """Retrieval on every test set, by its name; measured by the first process."""
    found = {}
    for name, sides in trainer.data.tests.items():
        features = [_embed_split(trainer, side, f"embed {name}") for side in sides]
        if trainer.world.leads:
            query, gallery = (
                Embedded(x, side.identities, side.cameras) for x, side in zip(features, sides, strict=True)
            )
            found[name] = dataclasses.asdict(evaluate_retrieval(query, gallery))
        meet(trainer.world, f"evaluation of epoch {epoch} on {name}")
    return share(trainer.world, found)


def _step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of what layers draw in a step (dropout), so that nothing random has to be saved."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _line(name: str, metrics: dict[str, float]) -> str:
    return f"{name} mAP {metrics['map']:.1%}, rank-1 {metrics['rank1']:.1%}"


def _say(trainer: Trainer, message: str) -> None:
    if trainer.world.leads:
        say(message)
