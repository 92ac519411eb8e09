"""OSNet and OSNet-AIN, small networks made for re-identification, under the names of torchreid's weights.

timm has none of them, and trackers are mostly run with one.

Source: Zhou et al., "Omni-Scale Feature Learning for Person Re-Identification", ICCV 2019, and
"Learning Generalisable Omni-Scale Representations for Person Re-Identification", TPAMI 2021 (instance
normalisation, and where it stands in OSNet-AIN).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from dmx.errors import DmxError

STREAMS = 4  # a stream of t layers sees (2t + 1) x (2t + 1) positions
BLOCKS_A_STAGE = 2
BOTTLENECK = 4
GATE_REDUCTION = 16
# Channels of the stem and of the three stages.
WIDTHS = {
    "x1_0": (64, 256, 384, 512),
    "x0_75": (48, 192, 288, 384),
    "x0_5": (32, 128, 192, 256),
    "x0_25": (16, 64, 96, 128),
}
# Which of the six blocks normalise by instance: behind the sum (IBN), or within the residual branch (AIN).
PLAIN = ("", "", "", "", "", "")
IBN = ("sum", "sum", "", "", "", "")
AIN = ("branch", "branch", "", "branch", "branch", "")
OSNETS = {
    **{f"osnet_{size}": (size, PLAIN) for size in WIDTHS},
    "osnet_ibn_x1_0": ("x1_0", IBN),
    **{f"osnet_ain_{size}": (size, AIN) for size in WIDTHS},
}


class ConvNorm(nn.Sequential):
    """A convolution without bias, a normalisation where there is one, and ReLU where it is not linear."""

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int = 1,
        stride: int = 1,
        norm: type[nn.BatchNorm2d | nn.InstanceNorm2d] | None = nn.BatchNorm2d,
        *,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        if norm is not None:
            self.bn = norm(width, affine=True)
        if not linear:
            self.relu = nn.ReLU()


class LightConv3x3(nn.Sequential):
    """A 3 x 3 convolution in two: across channels, then each channel by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()


class Stream(nn.Module):
    """What sees a block's input at one scale: light convolutions one after another."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(LightConv3x3(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) of the same shape."""
        out: Tensor = self.layers(x)
        return out


class Gate(nn.Module):
    """How much of each channel passes, by what the channels hold over all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // GATE_REDUCTION, 1)
        self.fc2 = nn.Conv2d(width // GATE_REDUCTION, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, width, H, W), each channel times a number from 0 to 1."""
        means = x.mean(dim=(2, 3), keepdim=True)
        shares: Tensor = self.fc2(self.fc1(means).relu()).sigmoid()
        return x * shares


class OmniScaleBlock(nn.Module):
    """A residual bottleneck whose middle is several scales, added through one gate that they share.

    Args:
        channels, width: of input and output.
        instance_norm: "" for none, `sum` behind the sum with the input, `branch` before it.
    """

    def __init__(self, channels: int, width: int, instance_norm: str) -> None:
        super().__init__()
        middle = width // BOTTLENECK
        self.conv1 = ConvNorm(channels, middle)
        self.conv2 = nn.ModuleList(Stream(middle, depth) for depth in range(1, STREAMS + 1))
        self.gate = Gate(middle)
        norm = None if instance_norm == "branch" else nn.BatchNorm2d
        self.conv3 = ConvNorm(middle, width, norm=norm, linear=True)
        self.downsample = ConvNorm(channels, width, linear=True) if channels != width else nn.Identity()
        if instance_norm:
            self.IN = nn.InstanceNorm2d(width, affine=True)
        self.instance_norm = instance_norm

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, width, H, W)."""
        inner = self.conv1(x)
        scales = [self.gate(stream(inner)) for stream in self.conv2]
        branch = self.conv3(sum(scales[1:], scales[0]))
        if self.instance_norm == "branch":
            branch = self.IN(branch)
        out = branch + self.downsample(x)
        if self.instance_norm == "sum":
            out = self.IN(out)
        return F.relu(out)


class OSNet(nn.Module):
    """Images (N, 3, H, W) to a map (N, D, H / 16, W / 16).

    The layer that torchreid has behind the pooled map (`fc`) is not part of it: the neck stands there.

    Args:
        widths: of the stem and the three stages.
        instance_norms: of the six blocks.
    """

    def __init__(self, widths: tuple[int, int, int, int], instance_norms: tuple[str, ...]) -> None:
        super().__init__()
        self.num_features = widths[-1]
        stem_norm = nn.InstanceNorm2d if any(instance_norms) else nn.BatchNorm2d
        self.conv1 = ConvNorm(3, widths[0], kernel=7, stride=2, norm=stem_norm)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2, self.conv3, self.conv4 = (
            _stage(widths[stage], widths[stage + 1], instance_norms[BLOCKS_A_STAGE * stage :])
            for stage in range(3)
        )
        self.pool2, self.pool3 = (
            nn.Sequential(ConvNorm(width, width), nn.AvgPool2d(2, stride=2)) for width in widths[1:3]
        )
        self.conv5 = ConvNorm(widths[-1], widths[-1])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        x = self.maxpool(self.conv1(images))
        x = self.pool3(self.conv3(self.pool2(self.conv2(x))))
        out: Tensor = self.conv5(self.conv4(x))
        return out


def build_osnet(name: str) -> OSNet:
    """The network called `name` in OSNETS.

    Raises:
        DmxError: there is none of that name.
    """
    if name not in OSNETS:
        raise DmxError(f"backbone: wanted one of {', '.join(OSNETS)}, found {name!r}")
    size, instance_norms = OSNETS[name]
    return OSNet(WIDTHS[size], instance_norms)


def _stage(channels: int, width: int, instance_norms: tuple[str, ...]) -> nn.Sequential:
    first, second = instance_norms[:BLOCKS_A_STAGE]
    return nn.Sequential(OmniScaleBlock(channels, width, first), OmniScaleBlock(width, width, second))


# OSNet was published first, with a name for each stream, and with the pool as a third block of its stage.
_STREAM = re.compile(r"^(conv[234]\.\d+)\.conv2([abcd])\.(?:(\d+)\.)?((?:conv|bn).*)$")
_POOL = re.compile(r"^conv([23])\.2\.0\.")


def named_as_later(name: str) -> str:
    """A tensor of the published OSNet under its name in OSNet-AIN; other names stay as they are."""
    if stream := _STREAM.match(name):
        block, letter, layer, rest = stream.groups()
        return f"{block}.conv2.{'abcd'.index(letter)}.layers.{layer or 0}.{rest}"
    return _POOL.sub(r"pool\1.0.", name)


def is_osnet(names: Iterable[str]) -> bool:
    """Whether these are the names of an OSNet's tensors, in either form."""
    return any(named_as_later(name) == "conv2.0.conv2.0.layers.0.conv1.weight" for name in names)
