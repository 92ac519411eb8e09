"""IBN-a: half instance normalisation, half batch normalisation, in the early stages of a ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmx.errors import DmxError

STAGES = ("layer1", "layer2", "layer3")  # The last stage keeps plain batch norm: it must not lose content.


class IBN(nn.Module):
    """Instance normalisation of the first half of the channels, batch normalisation of the others.

    The sub-modules are called `IN` and `BN`, as in the published weights.

    Args:
        channels: number of input channels C; the first C // 2 are instance-normalised.

    Source: Pan, Luo, Shi, Tang, "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
    ECCV 2018 (block IBN-a).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.split = channels // 2
        self.IN = nn.InstanceNorm2d(self.split, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.split)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, H, W)."""
        instance, batch = x[:, : self.split], x[:, self.split :]
        return torch.cat((self.IN(instance.contiguous()), self.BN(batch.contiguous())), dim=1)


def convert_to_ibn_a(backbone: nn.Module, name: str) -> nn.Module:
    """Replace the first normalisation of every residual block in layer1 to layer3 by IBN, in place.

    Args:
        backbone: a timm ResNet (its blocks have `bn1`).
        name: what the user called it, for the error message.

    Returns:
        The same backbone.

    Raises:
        DmxError: the backbone is not a ResNet of that kind.
    """
    for stage in STAGES:
        blocks = getattr(backbone, stage, None)
        if not isinstance(blocks, nn.Sequential):
            raise DmxError(f"backbone {name!r}: IBN-a needs a ResNet's layer1 to layer3; this has no {stage}")
        for block in blocks:
            norm = getattr(block, "bn1", None)
            if type(norm) is not nn.BatchNorm2d:
                raise DmxError(
                    f"backbone {name!r}: IBN-a replaces the BatchNorm2d called bn1 of each block, and "
                    f"{stage} has {type(norm).__name__} there; choose a plain ResNet, ResNeXt or SE-ResNet"
                )
            block.bn1 = IBN(norm.num_features)
    return backbone
