"""The model of DomainMix: backbone, neck, domain discriminator, losses."""

from dmx.model.batchnorm import SynchronisedBatchNorm, frozen_statistics, synchronise_batchnorm
from dmx.model.discriminator import Discriminator
from dmx.model.embedding_model import EmbeddingModel, Retrieval, build_model
from dmx.model.losses import (
    domain_balance_loss,
    domain_labels,
    domain_loss,
    identity_loss,
    soft_triplet_loss,
)

__all__ = [
    "Discriminator",
    "EmbeddingModel",
    "Retrieval",
    "SynchronisedBatchNorm",
    "build_model",
    "domain_balance_loss",
    "domain_labels",
    "domain_loss",
    "frozen_statistics",
    "identity_loss",
    "soft_triplet_loss",
    "synchronise_batchnorm",
]
