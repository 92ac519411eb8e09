"""Backbones: any timm model by name, ResNets with last stride 1 and with IBN-a, OSNets."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from torch import nn

from dmx.errors import DmxError
from dmx.model.ibn import convert_to_ibn_a
from dmx.model.osnet import OSNETS, build_osnet
from dmx.model.timm_alone import timm

if TYPE_CHECKING:
    from dmx.sections import ModelConfig

IBN_A = "_ibn_a"


def build_backbone(config: ModelConfig) -> nn.Module:
    """Build the feature extractor: images (N, 3, H, W) to a feature map, without pooling or classifier.

    `<resnet>_ibn_a` is timm's `<resnet>` with IBN-a, e.g. `resnet50_ibn_a`; `osnet_x1_0` and its like are
    those of `dmx.model.osnet`. `last_stride` acts on backbones with a ResNet's `layer4`; others keep the
    strides they have.

    Args:
        config: backbone, backbone_args, last_stride, and pretrained where there are no weights of its own.

    Raises:
        DmxError: unknown name, arguments that do not fit it, or no weights where there should be some.
    """
    name = config.backbone
    base = name.removesuffix(IBN_A)
    _require_known(name, base)
    require_weights(config)
    if name in OSNETS:
        if config.backbone_args:
            raise DmxError(f"backbone {name!r}: wanted no backbone_args, found {config.backbone_args}")
        return build_osnet(name)
    arguments = {**config.backbone_args, "num_classes": 0, "global_pool": ""}
    try:
        backbone: nn.Module = timm.create_model(
            base, pretrained=config.pretrained and not config.weights, **arguments
        )
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise DmxError(
            f"backbone {name!r} with backbone_args {config.backbone_args}: timm cannot build it: {error}"
        ) from error
    if base != name:
        convert_to_ibn_a(backbone, name)
    if config.last_stride == 1:
        remove_last_stride(backbone)
    return backbone


def require_weights(config: ModelConfig) -> None:
    """Check that weights that are asked for are to be had: timm's, or a file of one's own, which goes first.

    Raises:
        DmxError: timm has none, and there is no file.
    """
    name = config.backbone
    if config.pretrained and not config.weights and (name.endswith(IBN_A) or name in OSNETS):
        published = "torchreid's" if name in OSNETS else "the published IBN-Net"
        raise DmxError(
            f"model.pretrained: timm has no weights for {name!r}; download {published} weights and name the "
            "file in model.weights (--init), or train from scratch with model.pretrained=false"
        )


def remove_last_stride(backbone: nn.Module) -> None:
    """Set the stride of a ResNet's `layer4` to 1, in place; anything else stays as it is.

    A feature map of twice the height and width costs little and keeps detail that tells people apart
    (Sun et al., "Beyond Part Models", ECCV 2018; Luo et al., "Bag of Tricks", CVPRW 2019). Unlike timm's
    `output_stride=16` it does not dilate the convolutions, as no published re-identification code does.
    """
    stage = getattr(backbone, "layer4", None)
    if not isinstance(stage, nn.Sequential):
        return
    first = stage[0]
    for path, module in list(first.named_modules()):
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d) and module.stride != 1:
            if module.kernel_size in (2, (2, 2)):
                # Even kernels would shift the map and lose a row; timm has no pool at stride 1 either.
                first.set_submodule(path, nn.Identity())
            else:
                module.stride = 1
        elif type(module).__name__ == "BlurPool2d":
            first.set_submodule(path, nn.Identity())


def _require_known(name: str, base: str) -> None:
    if timm.is_model(base.split(".")[0]) or name in OSNETS:
        return
    known = [*timm.list_models(), *OSNETS, *(f"resnet{depth}{IBN_A}" for depth in (18, 34, 50, 101))]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise DmxError(
        "model.backbone: wanted a timm model, a ResNet with IBN-a (resnet50_ibn_a) or an OSNet (osnet_x1_0), "
        f"found {name!r}{hint}"
    )
