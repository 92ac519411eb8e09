"""Backbone weights from a local file: safetensors or a torch state dict."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmx.errors import DmxError

WRAPPERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "backbone.", "base.")
HEADS = ("fc.", "head.", "classifier.", "neck.", "last_linear.")
SHOWN = 5


def load_backbone_weights(backbone: nn.Module, path: str | Path) -> None:
    """Load a backbone's weights from a file, in place.

    Keys are those of timm, which for ResNets are torchvision's and those of the published IBN-Net weights
    (`resnet50_ibn_a-*.pth`: `layer1.0.bn1.IN.weight`, `layer1.0.bn1.BN.running_mean`, ...). A wrapping
    `state_dict` or `model` entry and the prefixes `module.`, `backbone.` and `base.` are taken off, so a
    whole re-identification model (a DMX checkpoint too) gives its backbone. Classifier and neck
    entries are left out. Every weight of the backbone must be there with its shape.

    Args:
        backbone: the model to fill.
        path: a `.safetensors` file, or anything `torch.load(weights_only=True)` reads.

    Raises:
        DmxError: the file cannot be read or does not fit the backbone.
    """
    state = _strip(_read(Path(path)))
    own = backbone.state_dict()
    # Counters are absent from files older than torch 0.4.1, and only matter to a cumulative average.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own and not key.startswith(HEADS)]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    for problem, keys in (("lacks", missing), ("has no place for", extra), ("differs in shape:", shapes)):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            subject = "the backbone" if problem == "has no place for" else "the file"
            raise DmxError(
                f"weights {path}: {subject} {problem} {', '.join(keys[:SHOWN])}{more}; "
                "name the backbone (model.backbone, model.backbone_args) that the weights belong to"
            )
    backbone.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DmxError(f"weights {path}: no such file; wanted a .safetensors file or a torch state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DmxError(f"weights {path}: cannot be read as weights alone: {error}") from error
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise DmxError(f"weights {path}: holds no state dict (a mapping of names to tensors)")
    return tensors


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off each wrapping prefix that any key bears; keys without it belong to other parts."""
    for prefix in PREFIXES:
        inside = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        if inside:
            state = inside
    return state
