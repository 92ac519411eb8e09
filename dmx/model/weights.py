"""Where training starts: the weights of a model from a file, whichever tool wrote it."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dmx.errors import DmxError
from dmx.model.key_names import BACKBONE, NECK, by_our_names
from dmx.model.nearest_backbone import nearest

# OpenUnReID numbers its networks: MMT has two, which are as good as each other.
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_1")
SHOWN = 5
# What safetensors and torch raise on files that are not what they claim.
BROKEN = (
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    ImportError,
    OverflowError,
    MemoryError,
    struct.error,
)
# Tools keep the score beside the weights as NumPy measured it. Making such numbers runs nothing; whatever
# else a pickle may name stays forbidden.
NUMBERS = (np.float64, np.float32, np.int64, np.int32, np.bool_)
SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    scalar,
    (scalar, "numpy.core.multiarray.scalar"),  # where NumPy had it before 2.0
    np.dtype,
    *(type(np.dtype(number)) for number in NUMBERS),
]


@dataclass(frozen=True)
class Loaded:
    """What a file of weights gave.

    Attributes:
        backbone: number of its tensors that became the backbone's.
        neck: whether it gave the neck, too.
        left_out: the file's keys that were not taken.
    """

    backbone: int
    neck: bool
    left_out: list[str]

    def told(self, path: str) -> str:
        """The same in a line."""
        parts = f"{self.backbone} tensors of the backbone{' and the neck' if self.neck else ', no neck'}"
        left_out = f"; left out: {_some(self.left_out)}" if self.left_out else ""
        return f"starting point {path}: {parts}{left_out}"


def load_weights(model: nn.Module, path: str | Path, name: str) -> Loaded:
    """Load a model's backbone, and the neck where there is one that fits, from a file, in place.

    Keys are those of timm, which for ResNets are torchvision's and those of the published IBN-Net weights
    (`layer1.0.bn1.IN.weight`, `layer1.0.bn1.BN.running_mean`, ...), or those that re-identification tools
    give to the same tensors (`dmx.model.key_names`). Every weight of the backbone must be there with its
    shape. Classifiers, and parts that the backbone does not have, are left out. So is a neck of another
    width, or one whose bias was trained: DMX's stays 0.

    Args:
        model: the `EmbeddingModel` to fill.
        path: a `.safetensors` file, or anything `torch.load(weights_only=True)` reads.
        name: of the backbone, for errors.

    Raises:
        DmxError: the file cannot be read or does not fit the backbone.
    """
    state = read_weights(Path(path))
    keys = by_our_names(state)
    own = model.state_dict()
    _require_backbone(own, keys, state, path, name)
    if not (neck := _neck_fits(own, keys, state)):
        keys = {ours: key for ours, key in keys.items() if not ours.startswith(NECK)}
    taken = {ours: key for ours, key in keys.items() if ours in own}
    model.load_state_dict({ours: state[key] for ours, key in taken.items()}, strict=False)
    used = set(taken.values())
    count = sum(ours.startswith(BACKBONE) for ours in taken)
    return Loaded(count, neck, [key for key in state if key not in used])


def _require_backbone(
    own: Mapping[str, Tensor],
    keys: Mapping[str, str],
    state: Mapping[str, Tensor],
    path: str | Path,
    name: str,
) -> None:
    wanted = [ours for ours in own if ours.startswith(BACKBONE) and not _counts(ours)]
    missing = [ours for ours in wanted if ours not in keys]
    shapes = [
        f"{keys[ours]} {tuple(state[keys[ours]].shape)} instead of {tuple(own[ours].shape)}"
        for ours in wanted
        if ours in keys and state[keys[ours]].shape != own[ours].shape
    ]
    # A part that the backbone lacks altogether may go; more layers in one that it has is another network.
    parts = {_part(ours) for ours in wanted}
    extra = [keys[ours] for ours in keys if ours not in own and _part(ours) in parts and not _counts(ours)]
    if not (missing or shapes or extra):
        return
    advice = nearest({ours: state[key].shape for ours, key in keys.items()})
    if len(missing) + len(shapes) == len(wanted):
        raise DmxError(
            f"weights {path}: nothing in it fits the backbone {name}: wanted "
            f"{_some(_bare(wanted))}, found {_some(list(state))}; {advice}"
        )
    for problem, found in (
        ("the file lacks", _bare(missing)),
        (f"the backbone {name} has no place for", extra),
        ("the file differs in shape:", shapes),
    ):
        if found:
            raise DmxError(f"weights {path}: {problem} {_some(found)}; {advice}")


def _neck_fits(own: Mapping[str, Tensor], keys: Mapping[str, str], state: Mapping[str, Tensor]) -> bool:
    for ours in own:
        if not ours.startswith(NECK) or _counts(ours):
            continue
        if ours not in keys or state[keys[ours]].shape != own[ours].shape:
            return False
    return not state[keys[f"{NECK}bias"]].any()


def _counts(name: str) -> bool:
    """Counters are absent from files older than torch 0.4.1, and only matter to a cumulative average."""
    return name.endswith("num_batches_tracked")


def _part(name: str) -> str:
    """`backbone.layer1.0.conv1.weight` belongs to `backbone.layer1`."""
    return ".".join(name.split(".")[:2])


def _bare(names: Iterable[str]) -> list[str]:
    return [name.removeprefix(BACKBONE) for name in names]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by their names in it; nothing that it holds is run.

    Raises:
        DmxError: it cannot be read; says why.
    """
    if not path.is_file():
        found = "a folder: give the model.safetensors in it" if path.is_dir() else "no such file"
        raise DmxError(f"weights {path}: wanted a .safetensors file or a torch state dict, found {found}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DmxError(
            f"weights {path}: cannot be read as weights alone: {_reason(error)}; if you trust who wrote it, "
            "load it where it was written and save its weights: torch.save(model.state_dict(), FILE)"
        ) from error
    except BROKEN as error:
        raise DmxError(f"weights {path}: cannot be read as weights: {_reason(error)}") from error
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise DmxError(
            f"weights {path}: wanted a state dict (a mapping of names to tensors), found none in it"
        )
    return tensors


def _reason(error: Exception) -> str:
    """Torch says at length how to run whatever a file holds; what it met stands in a line of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line), lines[0] if lines else type(error).__name__)
