"""One feature of an image from what a backbone gives for its positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmx.errors import DmxError

# Where GeM begins; 1 would be the mean, and large exponents near the maximum.
EXPONENT = 3.0
LEAST = 1e-6


class MeanPooling(nn.Module):
    """The mean over positions; of tokens the class token, where there is one."""

    def forward(self, x: Tensor, *, channels_last: bool = False, prefix: int = 0) -> Tensor:
        """Features (N, D).

        Args:
            x: a map (N, D, h, w), or (N, h, w, D) if `channels_last`; tokens (N, L, D), of which the first
                `prefix` stand for no position; or features (N, D).
        """
        if x.ndim == 4:
            return x.mean(dim=(1, 2) if channels_last else (2, 3))
        if x.ndim == 3:
            return x[:, 0] if prefix else x.mean(dim=1)
        return x


class GeM(MeanPooling):
    """Generalised mean of a map: (mean over positions of x^p)^(1/p), with one p that is learned.

    Numbers below 1e-6 count as that. It computes in float32 whatever the map is in: cubes leave the range of
    half precision soon.

    Source: Radenovic, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019,
    equation 3, with one exponent for all channels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), EXPONENT))

    def forward(self, x: Tensor, *, channels_last: bool = False, prefix: int = 0) -> Tensor:
        """Features (N, D) of a map, as `MeanPooling` takes it.

        Raises:
            DmxError: `x` is no map.
        """
        if x.ndim != 4:
            raise DmxError(
                f"model.pooling: gem wants a map of positions, found {x.ndim} dimensions; take mean for a "
                "backbone of tokens"
            )
        with torch.autocast(x.device.type, enabled=False):
            powers = x.float().clamp(min=LEAST).pow(self.p.float())
            means = super().forward(powers, channels_last=channels_last)
            return means.pow(1 / self.p.float()).to(x.dtype)


POOLINGS: dict[str, type[MeanPooling]] = {"mean": MeanPooling, "gem": GeM}
