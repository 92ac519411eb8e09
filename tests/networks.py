"""Small networks of DMX's kind, for tests of what surrounds them."""

from __future__ import annotations

from dmx.model import EmbeddingModel, build_model
from dmx.sections import ModelConfig

NARROW = {"channels": (8, 16, 24, 32)}  # the last of a BasicBlock ResNet is the feature width


def narrow(**changes: object) -> EmbeddingModel:
    """A ResNet-18 with few channels; `changes` to the other settings of `model`."""
    fields = {"backbone": "resnet18", "backbone_args": NARROW, **changes}
    return build_model(ModelConfig(**fields))  # type: ignore[arg-type]
