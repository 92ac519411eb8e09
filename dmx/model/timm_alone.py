"""timm, imported without wandb."""

from __future__ import annotations

from dmx.imports import without

with without("wandb"):
    import timm

__all__ = ["timm"]
