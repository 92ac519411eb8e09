"""Checks what comes in: every error says what was wanted, what was found, and what to do."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from dmx.kernels.device import takes_triton
from dmx.kernels.memory import free_bytes, require
from dmx.kernels.similarity import squared_lengths

_HALF = (torch.float16, torch.bfloat16)
_ACCEPTED = (*_HALF, torch.float32, torch.float64)


def as_features(
    features: Any, device: str, *, may_be_empty: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as the kernels take them.

    Args:
        features: (N, D) NumPy array or torch tensor on any device, float16, bfloat16, float32 or float64;
            rows of any length but zero.
        device: as in `as_device`.
        may_be_empty: N may be 0.

    Returns:
        (N, D) contiguous on the device (the input itself where it is so already), and the squared lengths
        (N,) float64 of its rows. On the CPU half precision becomes float32. float64 rows are scaled by powers
        of two, which changes no angle.

    Raises:
        TypeError: neither array nor tensor, or not of floating point.
        ValueError: not two-dimensional, empty, or a row is zero, infinite or NaN.
        NotEnoughMemory: the device has no room for them.
    """
    rows = _as_tensor(features)
    if rows.ndim != 2:
        raise ValueError(f"features: wanted shape (N, D), found {tuple(rows.shape)}; pass one row an image")
    if (rows.shape[0] == 0 and not may_be_empty) or rows.shape[1] == 0:
        raise ValueError(f"features: wanted at least one row and one column, found shape {tuple(rows.shape)}")
    rows = _moved(rows, as_device(device, rows))
    if rows.dtype in _HALF and not takes_triton(rows):
        rows = rows.float()
    if rows.dtype == torch.float64 and len(rows):
        rows = _scaled(rows)
    squares = squared_lengths(rows) if len(rows) else torch.empty(0, dtype=torch.float64, device=rows.device)
    bad = ~(torch.isfinite(squares) & (squares > 0))
    if bool(bad.any()):
        raise ValueError(_describe(rows, bad))
    return rows, squares


def _as_tensor(features: Any) -> torch.Tensor:
    if isinstance(features, np.ndarray):
        if not np.issubdtype(features.dtype, np.floating) or features.dtype.itemsize > 8:
            raise TypeError(_wrong_type(features.dtype))
        native = np.ascontiguousarray(features, features.dtype.newbyteorder("="))
        with warnings.catch_warnings():  # a tensor could write into a read-only array; nothing here does
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            features = torch.from_numpy(native)
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"features: wanted a NumPy array or torch tensor, found {type(features).__name__}")
    if features.dtype not in _ACCEPTED:
        raise TypeError(_wrong_type(features.dtype))
    return features.detach()


def _moved(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows there, contiguous; asks first whether there is room for a copy."""
    if rows.device == device and rows.is_contiguous():
        return rows
    require("features", rows.element_size() * rows.numel(), free_bytes(device))
    return rows.to(device).contiguous()


def _wrong_type(dtype: object) -> str:
    return f"features: wanted float16, bfloat16, float32 or float64, found {dtype}; convert them"


def _scaled(rows: torch.Tensor) -> torch.Tensor:
    """Rows times a power of two, so that squares neither overflow nor vanish."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    _, exponent = torch.frexp(largest)
    return torch.ldexp(rows, torch.where(torch.isfinite(largest), -exponent, 0))


def _describe(rows: torch.Tensor, bad: torch.Tensor) -> str:
    row = int(torch.nonzero(bad)[0])
    if bool(torch.isnan(rows[row]).any()):
        found = "contains NaN"
    elif bool(torch.isinf(rows[row]).any()):
        found = "contains infinity"
    else:
        found = "is zero, so it has no direction"
    return (
        f"features: wanted finite rows that are not zero, found row {row}, which {found} "
        f"({int(bad.sum())} such rows of {len(bad)}); remove these images or look at the model that made them"
    )


def as_count(name: str, value: int, least: int = 1) -> int:
    """`value` as an int that is at least `least`.

    Raises:
        TypeError: not an integer.
        ValueError: too small.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: wanted an integer, found {value!r}")
    if value < least:
        raise ValueError(f"{name}: wanted at least {least}, found {value}")
    return int(value)


def as_device(device: str, features: torch.Tensor) -> torch.device:
    """The CPU, or a CUDA device: the one where the features lie, if on any. "auto" prefers CUDA.

    Raises:
        ValueError: another name, or "cuda" where torch finds none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device: wanted "auto", "cpu" or "cuda", found {device!r}')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device: wanted "cuda", but torch finds no CUDA device; use "auto" or "cpu"')
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return features.device if features.is_cuda else torch.device("cuda")


def as_radii(eps: float, eps_gap: float) -> tuple[float, float, float]:
    """eps - gap, eps, eps + gap, on the decimal grid of the distances.

    Raises:
        ValueError: eps outside (0, 1), a negative gap, or a radius outside (0, 1).
    """
    if not 0 < eps < 1:
        raise ValueError(f"eps: wanted a number between 0 and 1, both excluded, found {eps!r}")
    if not eps_gap >= 0:
        raise ValueError(f"eps_gap: wanted a number of at least 0, found {eps_gap!r}")
    radii = (as_radius(eps - eps_gap), as_radius(eps), as_radius(eps + eps_gap))
    if not (radii[0] > 0 and radii[2] < 1):
        raise ValueError(
            f"eps_gap: wanted eps - eps_gap > 0 and eps + eps_gap < 1, found {eps!r} and {eps_gap!r}"
        )
    return radii


def as_radius(distance: float) -> float:
    """A threshold rounded to 12 decimals as distances are: 0.6 - 0.02 is then the number written 0.58."""
    return round(float(distance), 12)
