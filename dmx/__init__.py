"""DMX: person re-identification models for cameras nobody labelled (DomainMix, BMVC 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dmx.embedder import ImageEmbedder

__version__ = "0.1.0"


def load(path: str | Path, *, device: str = "auto", best: bool = False) -> ImageEmbedder:
    """A trained model, ready to embed images.

        model = dmx.load("runs/first")
        embeddings = model.embed(["a.jpg", "b.jpg"])     # (2, D) float32, rows of unit length
        similarity = embeddings[0] @ embeddings[1]

    Args:
        path: a run folder of `dmx train`, one of its checkpoints, what `dmx export` wrote, or the name of an
            export on the Hugging Face hub (`someone/model`), which is downloaded once.
        device: cpu, cuda, cuda:1 ...; auto takes cuda where there is one.
        best: take a run's best checkpoint, where it records one, instead of its last.

    Raises:
        DmxError: there is no model at `path`, or it is broken.
    """
    from dmx.embedder import load_embedder

    return load_embedder(path, device=device, best=best)
