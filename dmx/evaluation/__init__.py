"""How well embeddings retrieve people: protocols, metrics, re-ranking."""

from dmx.evaluation.embedded import Embedded
from dmx.evaluation.metrics import Metrics
from dmx.evaluation.protocol import evaluate, require_answers

__all__ = ["Embedded", "Metrics", "evaluate", "require_answers"]
