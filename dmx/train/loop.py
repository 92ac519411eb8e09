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
import itertools
import sys
import time

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.cluster import pseudo_labels
from dmx.data.shards import Split
from dmx.embedding import embed as embed_images
from dmx.errors import DmxError
from dmx.evaluation import Embedded
from dmx.evaluation import evaluate as evaluate_retrieval
from dmx.progress import progress_bar
from dmx.train.checkpoint import BEST, latest, point
from dmx.train.distributed import collect, meet, share, share_tensor, use_cores
from dmx.train.purity import cluster_report
from dmx.train.schedule import begins_anew, learning_rate, trains_discriminator, uses_target
from dmx.train.schedule import stage as stage_of
from dmx.train.step import train_discriminator, train_model
from dmx.train.trainer import EpochLabels, Trainer

Features = NDArray[np.float32]

EMBED_BATCH = 64


def run_epochs(trainer: Trainer) -> None:
    """Train from where the run stands to its last epoch."""
    for epoch in range(trainer.progress.epoch, trainer.config.schedule.epochs):
        features = embed(trainer, epoch)
        labels = pseudo_label(trainer, epoch, features)
        train(trainer, epoch, labels)
        evaluate(trainer, epoch)


def embed(trainer: Trainer, epoch: int) -> Features | None:
    """Unit embeddings (N, D) of the target's images.

    None when this epoch needs none: it trains on the source alone, or goes on in its middle.
    """
    target = trainer.data.target
    if target is None or not uses_target(trainer.config, epoch) or trainer.progress.step > 0:
        return None
    meet(trainer.world, f"embedding of epoch {epoch}")
    with trainer.timed("embed"):
        return _embed_split(trainer, target, "embed target")


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
    labels, centroids = None, None
    if features is not None:
        with trainer.timed("cluster"):
            labels, centroids = _cluster(trainer, features)
        _report_clusters(trainer, epoch, labels)
    trainer.players.classifier.set_pseudo_rows(centroids, forget_moments=forget)
    return labels


def train(trainer: Trainer, epoch: int, labels: EpochLabels | None) -> None:
    """The epoch's remaining steps, with a checkpoint now and then."""
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
    with trainer.timed("train"), progress_bar(steps - first, label, "steps") as bar:
        for step, batches in enumerate(trainer.data.steps(epoch, first, labels, world), first):
            start = time.monotonic()
            torch.manual_seed(_step_seed(config.seed, epoch, step, world.rank))
            if trains_discriminator(config.schedule, stage, step):
                losses = train_discriminator(players, config, trainer.data.num_source, batches, world)
            else:
                losses = train_model(players, config, stage, batches, world)
            _check_finite(losses, epoch, step)
            _log_step(trainer, epoch, step, {"lr": lr, **losses, "step_s": time.monotonic() - start})
            _count_step(trainer, epoch, step, labels)
            bar.set_postfix_str(", ".join(f"{k} {v:.3g}" for k, v in losses.items()), refresh=False)
            bar.update(1)


def evaluate(trainer: Trainer, epoch: int) -> None:
    """Close the epoch: report on the test sets, log, write a checkpoint."""
    config, world = trainer.config, trainer.world
    record = {"epoch": epoch, **trainer.progress.record}
    is_last = epoch + 1 == config.schedule.epochs
    if trainer.data.tests and (is_last or (epoch + 1) % config.schedule.evaluate_every == 0):
        with trainer.timed("evaluate"):
            tests = _test(trainer)
        record |= {"tests": tests, "evaluate_s": trainer.progress.record["evaluate_s"]}
        _say(trainer, f"epoch {epoch + 1}: " + "; ".join(_line(name, m) for name, m in tests.items()))
    if trainer.log is not None:
        trainer.log.epoch(record, trainer.progress.global_step)
    progress = trainer.progress
    progress.epoch, progress.step, progress.record = epoch + 1, 0, {}
    progress.epochs.append(record)
    trainer.saved_labels = None
    trainer.save()
    if world.leads and config.compat == "official":
        _point_to_best(trainer)


def _embed_split(trainer: Trainer, split: Split, label: str) -> Features:
    """Embeddings of a split, an equal share of it by each process."""
    config, world = trainer.config, trainer.world
    use_cores(world)
    model = trainer.inference_model()
    bounds = [len(split) * rank // world.size for rank in range(world.size + 1)]
    counts = [stop - start for start, stop in itertools.pairwise(bounds)]
    features = np.zeros((0, trainer.width), np.float32)
    if counts[world.rank]:
        features = embed_images(
            model,
            split,
            height=config.data.height,
            width=config.data.width,
            batch_size=EMBED_BATCH,
            device=world.device,
            label=label,
            rows=np.arange(bounds[world.rank], bounds[world.rank + 1]),
        )
    return collect(world, torch.from_numpy(features), counts).numpy()


def _cluster(trainer: Trainer, features: Features) -> tuple[EpochLabels, torch.Tensor]:
    """Pseudo-labels and centroids (C, D), found by the first process and given to all."""
    world, settings = trainer.world, dataclasses.asdict(trainer.config.cluster)
    labels, centroids, threshold = None, None, None
    if world.leads:
        found = pseudo_labels(
            features,
            **settings,
            independence_threshold=trainer.progress.independence_threshold,
            device=world.device.type,
        )
        labels = torch.from_numpy(np.ascontiguousarray(found.labels))
        centroids = torch.from_numpy(np.ascontiguousarray(found.centroids, dtype=np.float32))
        threshold = found.independence_threshold
    labels, centroids = share_tensor(world, labels), share_tensor(world, centroids)
    trainer.progress.independence_threshold = share(world, threshold)
    identities = len(centroids)
    wanted = trainer.data.least_pseudo_identities()
    if identities < wanted:
        _say(
            trainer,
            f"warning: clustering found {identities} pseudo-identities, a batch wants {wanted}: this epoch "
            "trains on the source alone. If it stays so, train longer on the source (schedule.source_epochs) "
            "or raise cluster.eps",
        )
        return EpochLabels(torch.full_like(labels, -1), 0), centroids[:0]
    return EpochLabels(labels, identities), centroids


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
    """Move on by one step, and write a checkpoint when it is time for one within the epoch."""
    schedule, progress = trainer.config.schedule, trainer.progress
    progress.epoch, progress.step = epoch, step + 1
    progress.global_step += 1
    every, is_last = schedule.checkpoint_every_steps, step + 1 == schedule.steps_per_epoch
    if every and (step + 1) % every == 0 and not is_last:
        trainer.save(labels)


def _test(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Retrieval on every test set, by its name."""
    found = {}
    for name, (query, gallery) in trainer.data.tests.items():
        sides = [
            Embedded(_embed_split(trainer, side, f"embed {name}"), side.identities, side.cameras)
            for side in (query, gallery)
        ]
        if trainer.world.leads:
            found[name] = dataclasses.asdict(evaluate_retrieval(*sides))
    return share(trainer.world, found)


def _point_to_best(trainer: Trainer) -> None:
    """Record the best checkpoint on the first test set, as the published code picks its result."""
    scores = [
        next(iter(record["tests"].values()))["map"] if "tests" in record else -1.0
        for record in trainer.progress.epochs
    ]
    newest = latest(trainer.run)
    if newest is not None and scores and scores[-1] == max(scores) and scores[-1] >= 0:
        point(trainer.run, BEST, newest.name)


def _step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of what layers draw in a step (dropout), so that nothing random has to be saved."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _check_finite(losses: dict[str, float], epoch: int, step: int) -> None:
    bad = [name for name, value in losses.items() if not np.isfinite(value)]
    if bad:
        raise DmxError(
            f"epoch {epoch}, step {step}: {', '.join(bad)} is not finite ({losses}). Lower optim.lr, set "
            "optim.clip_norm, or train in fp32, and go on from the last checkpoint with --resume"
        )


def _line(name: str, metrics: dict[str, float]) -> str:
    return f"{name} mAP {metrics['map']:.1%}, rank-1 {metrics['rank1']:.1%}"


def _say(trainer: Trainer, message: str) -> None:
    if trainer.world.leads:
        print(message, file=sys.stderr, flush=True)
