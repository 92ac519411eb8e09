"""One training step: the losses put together.

A step is one update of the embedding model and the classifier (`train_model`), or in stage two, now and then,
of the discriminator alone (`train_discriminator`).
Either takes the step's micro-batches of this process: pairs of images (B, 3, H, W) and labels (B,),
identities in [0, S) of the source, then pseudo-identities. A step that is not finite changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dmx import stopping
from dmx.config import Config
from dmx.distributed import World, gather_rows
from dmx.model import domain_balance_loss, domain_labels, domain_loss, soft_triplet_loss
from dmx.train.classifier import Classifier
from dmx.train.engines import Engine
from dmx.train.schedule import Stage, plays

MicroBatches = Iterable[tuple[Tensor, Tensor]]


class NotFiniteError(ArithmeticError):
    """A loss or a gradient of a step is NaN or infinite, on all processes' word; the step changed nothing.

    Attributes:
        losses: by name, as they were.
    """

    def __init__(self, losses: dict[str, float]) -> None:
        super().__init__(losses)
        self.losses = losses

    def __str__(self) -> str:
        bad = [name for name, value in self.losses.items() if not math.isfinite(value)]
        return f"{', '.join(bad) or 'the gradient'} is not finite ({self.losses})"


@dataclass
class Players:
    """Everything that a step updates."""

    generator: Engine
    discriminator: Engine
    classifier: Classifier


def train_model(
    players: Players, config: Config, num_source: int, stage: Stage, weight: float, batches: MicroBatches,
    world: World,
) -> dict[str, float]:  # fmt: skip
    """Update the embedding model and the classifier: identity + triplet, and in the game + balance.

    Args:
        players: what is updated.
        config: the resolved configuration.
        num_source: identities of the source, S.
        stage: of the epoch.
        weight: of the identity loss in this epoch.
        batches: the step's micro-batches of this process.
        world: this process among the others.

    Returns:
        Means of the losses over micro-batches and processes, by name.

    Raises:
        NotFiniteError: on every process.
    """
    seen = []
    is_game = plays(config, stage)
    for images, labels in batches:
        f, b = _features(players.generator, images, labels, config, num_source)
        identity = players.classifier.loss(b, labels)
        triplet = _triplet(f, labels, config.loss.triplet_margin, world)
        loss = weight * identity + config.loss.triplet_weight * triplet
        balance = torch.zeros(())
        if is_game:
            with players.discriminator.frozen() as discriminator:
                balance = domain_balance_loss(discriminator(b), config.compat)
            loss = loss + config.loss.balance_weight * balance
        players.generator.backward(loss)
        players.generator.step()
        seen.append(torch.stack([value.detach().cpu() for value in (loss, identity, triplet, balance)]))
    names = ("loss", "identity", "triplet", "balance")[: None if is_game else 3]
    losses = dict(zip(names, _mean(seen, world), strict=False))
    if players.generator.refused:
        players.classifier.leave_out()
        raise NotFiniteError(losses)
    # With a finite loss the rows' gradient is finite: sums of embeddings times differences of probabilities.
    players.classifier.step()
    return losses


def train_discriminator(
    players: Players, config: Config, num_source: int, batches: MicroBatches, world: World
) -> dict[str, float]:
    """Update the discriminator alone; the embedding model is not touched, running statistics included.

    Returns:
        Means over micro-batches and processes, by name.

    Raises:
        NotFiniteError: on every process.
    """
    seen = []
    for images, labels in batches:
        with players.generator.frozen() as model, torch.no_grad():
            _, b = _features(model, images, labels, config, num_source)
        domains = domain_labels(labels, num_source, config.compat)
        logits = players.discriminator(b)
        loss = domain_loss(logits, domains)
        players.discriminator.backward(loss)
        players.discriminator.step()
        accuracy = (logits.argmax(1) == domains).float().mean()
        seen.append(torch.stack([loss.detach().cpu(), accuracy.cpu()]))
    losses = dict(zip(("domain", "domain_accuracy"), _mean(seen, world), strict=True))
    if players.discriminator.refused:
        raise NotFiniteError(losses)
    return losses


def _features(
    model: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, labels: Tensor, config: Config,
    num_source: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(f, b) of a micro-batch; with `batch.norm_by_domain` of each domain's images by themselves.

    Source: Chang et al., "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation", CVPR 2019,
    here with one set of weights and running statistics, because the test domain is neither of the two.
    """
    is_source = labels < num_source
    if not config.batch.norm_by_domain or is_source.all() or not is_source.any():
        return model(images)
    places = [torch.nonzero(part).flatten() for part in (is_source, ~is_source)]
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else None
    parts = [
        model(part if layout is None else part.contiguous(memory_format=layout))
        for part in (images[place] for place in places)
    ]
    order = torch.argsort(torch.cat(places))
    f, b = (torch.cat(halves)[order] for halves in zip(*parts, strict=True))
    return f, b


def _triplet(f: Tensor, labels: Tensor, margin: float, world: World) -> Tensor:
    """This process's anchors against the images of all processes."""
    if world.size == 1:
        return soft_triplet_loss(f, labels, margin=margin)
    return soft_triplet_loss(
        f, labels, margin=margin, all_features=gather_rows(f), all_labels=gather_rows(labels)
    )


def _mean(seen: list[Tensor], world: World) -> list[float]:
    """Means of the losses; with them, all processes agree whether they stop behind this step."""
    values = torch.stack(seen).mean(0)
    stop = values.new_tensor([stopping.wished() is not None])
    if world.size > 1:
        both = torch.cat([values, stop])
        dist.all_reduce(both, group=world.control)
        values, stop = both[:-1] / world.size, both[-1:]
    stopping.agree(bool(stop))
    return values.tolist()
