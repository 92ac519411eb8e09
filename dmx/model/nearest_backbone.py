"""Which backbone a file of weights belongs to, for an error's advice."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Size, nn

from dmx.model.ibn import convert_to_ibn_a
from dmx.model.key_names import BACKBONE
from dmx.model.osnet import OSNETS, build_osnet
from dmx.model.timm_alone import timm

# Those that torchreid, FastReID and OpenUnReID train most, by the names that DMX has for them.
PLAIN = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
CANDIDATES = (
    *PLAIN,
    *(f"{name}_ibn_a" for name in PLAIN),
    "resnext50_32x4d",
    "resnext101_32x8d",
    "legacy_seresnet50",
    "legacy_seresnet101",
    "densenet121",
    *OSNETS,
)
DOMAIN_NORM = ".dsbn."


def nearest(shapes: Mapping[str, Size]) -> str:
    """Advice for who gave a file that does not fit, as the end of a sentence.

    Args:
        shapes: of the file's tensors, by the names of an `EmbeddingModel`.
    """
    names = {name.removeprefix(BACKBONE): shape for name, shape in shapes.items()}
    if any(DOMAIN_NORM in name for name in names):
        return (
            "these are batch norms with statistics for several domains (OpenUnReID's dsbn), and the file "
            "does not say which of them to take: give a model trained without"
        )
    for candidate in CANDIDATES:
        if _fits(candidate, names):
            return f"it fits --set model.backbone={candidate}"
    return "name the backbone (model.backbone, model.backbone_args) that the weights belong to"


def _fits(candidate: str, names: Mapping[str, Size]) -> bool:
    with torch.device("meta"):  # shapes without memory
        backbone = _built(candidate)
    own = {name: tensor.shape for name, tensor in backbone.state_dict().items() if tensor.ndim}
    parts = {name.split(".")[0] for name in own}
    within = {name: shape for name, shape in names.items() if name.split(".")[0] in parts and shape}
    return own == within


def _built(candidate: str) -> nn.Module:
    if candidate in OSNETS:
        return build_osnet(candidate)
    base = candidate.removesuffix("_ibn_a")
    backbone: nn.Module = timm.create_model(base, num_classes=0, global_pool="")
    return backbone if base == candidate else convert_to_ibn_a(backbone, candidate)
