"""What an epoch trains, and at which learning rate. Epochs count from 0."""

from __future__ import annotations

from bisect import bisect_right
from enum import Enum

from dmx.config import Config


class Stage(Enum):
    """The three ways in which an epoch can train."""

    SOURCE = "source"  # the labelled source alone
    ONE = "one"  # both domains: identities and triplets
    TWO = "two"  # both domains, and the discriminator against the backbone


def uses_target(config: Config, epoch: int) -> bool:
    """Whether this epoch clusters the target."""
    return config.data.target is not None and epoch >= config.schedule.source_epochs


def stage(config: Config, epoch: int, pseudo_identities: int) -> Stage:
    """The stage of an epoch, given how many pseudo-identities clustering found for it.

    There is nothing to balance without two domains, so an epoch without pseudo-identities trains on the
    source alone, whenever it comes.
    """
    if pseudo_identities == 0:
        return Stage.SOURCE
    return Stage.TWO if epoch >= config.schedule.stage_two_epoch else Stage.ONE


def identity_weight(config: Config, epoch: int) -> float:
    """Weight of the identity loss, by the epoch's place in the schedule.

    An epoch of stage two whose clustering found nothing trains on the source alone, but with the weight of
    its neighbours: the weight scales nearly the whole gradient, and must not jump back for an epoch. A run
    without a target has no stage two and keeps the first weight.
    """
    if config.data.target is not None and epoch >= config.schedule.stage_two_epoch:
        return config.loss.identity_weight_stage_two
    return config.loss.identity_weight_stage_one


def plays(config: Config, stage: Stage) -> bool:
    """Whether backbone and discriminator play against each other: in stage two, unless it weighs nothing."""
    return stage is Stage.TWO and config.loss.balance_weight > 0


def trains_discriminator(config: Config, stage: Stage, step: int) -> bool:
    """Whether this step of the epoch trains the discriminator: the first and every n-th after it."""
    return plays(config, stage) and step % config.schedule.discriminator_every == 0


def begins_anew(config: Config, epoch: int) -> bool:
    """Whether every optimiser forgets its moments before this epoch, as published for stage two."""
    return config.compat == "official" and epoch >= config.schedule.stage_two_epoch


def learning_rate(config: Config, epoch: int) -> float:
    """Linear warm-up, then steps down at milestones; constant within an epoch.

        lr(e) = lr * w(e) * gamma^(milestones <= e),    w(e) = factor + (1 - factor) e / warmup, at most 1

    `official`: the published code builds a new optimiser and schedule in every epoch of stage two, so its
    rate stays at the first value of the warm-up, lr * factor.
    """
    schedule = config.schedule
    if begins_anew(config, epoch):
        epoch = 0
    warm = 1.0
    if epoch < schedule.warmup_epochs:
        warm = schedule.warmup_factor + (1 - schedule.warmup_factor) * epoch / schedule.warmup_epochs
    return config.optim.lr * warm * schedule.gamma ** bisect_right(sorted(schedule.milestones), epoch)
