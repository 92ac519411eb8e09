"""The domain discriminator: which data set does this feature come from?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

NEGATIVE_SLOPE = 0.2


class Discriminator(nn.Sequential):
    """An MLP from neck features (N, D) to domain logits (N, K).

    D-1024-512-256-K with BatchNorm and LeakyReLU(0.2) between.

    Layers begin as torch initialises them, as in the published code: the first logits are well below 1, the
    domains about equally likely, and both losses have gradients from the first step of stage two.

    Args:
        width: width D of the features.
        domains: number of domains K.
        hidden: widths of the hidden layers.

    Source: Wang et al., "DomainMix", BMVC 2021.
    """

    def __init__(self, width: int, domains: int = 2, hidden: Sequence[int] = (1024, 512, 256)) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in zip((width, *hidden[:-1]), hidden, strict=True) if hidden else ():
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU(NEGATIVE_SLOPE)]
        layers.append(nn.Linear(hidden[-1] if hidden else width, domains))
        super().__init__(*layers)
