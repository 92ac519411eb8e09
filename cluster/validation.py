"""Checks what comes in: every error says what was wanted, what was found, and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dmx.kernels.similarity import squared_lengths

_ACCEPTED = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def as_features(features: Any) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Features as the kernels take them.

    Args:
        features: (N, D) NumPy array or torch tensor on any device, float16, bfloat16, float32 or float64;
            rows of any length but zero.

    Returns:
        (N, D) float32 or float64, C-contiguous (the input itself where it is so already), and the squared
        lengths (N,) float64 of its rows. float64 rows are scaled by powers of two, which changes no angle.

    Raises:
        TypeError: neither array nor tensor, or not of floating point.
        ValueError: not two-dimensional, empty, or a row is zero, infinite or NaN.
    """
    array = _as_array(features)
    if array.ndim != 2:
        raise ValueError(f"features: wanted shape (N, D), found {array.shape}; pass one row an image")
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise ValueError(f"features: wanted at least one row and one column, found shape {array.shape}")
    array = np.ascontiguousarray(array, np.float64 if array.dtype == np.float64 else np.float32)
    if array.dtype == np.float64:
        array = _scaled(array)
    squares = squared_lengths(array)
    bad = ~(np.isfinite(squares) & (squares > 0))
    if bad.any():
        raise ValueError(_describe(array, bad))
    return array, squares


def _as_array(features: Any) -> NDArray[Any]:
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu()
        features = (features.float() if features.dtype == torch.bfloat16 else features).numpy()
    if not isinstance(features, np.ndarray):
        raise TypeError(f"features: wanted a NumPy array or torch tensor, found {type(features).__name__}")
    if features.dtype not in _ACCEPTED:
        raise TypeError(f"features: wanted float16, float32 or float64, found {features.dtype}; convert them")
    return features


def _scaled(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows times a power of two, so that squares neither overflow nor vanish."""
    _, exponent = np.frexp(np.abs(array).max(axis=1, keepdims=True))
    return np.ldexp(array, np.where(np.isfinite(array).all(axis=1, keepdims=True), -exponent, 0))


def _describe(array: NDArray[Any], bad: NDArray[np.bool_]) -> str:
    row = int(np.flatnonzero(bad)[0])
    if np.isnan(array[row]).any():
        found = "contains NaN"
    elif np.isinf(array[row]).any():
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


def as_device(device: str) -> str:
    """ "cpu" or "cuda"; "auto" is CUDA where there is one.

    Raises:
        ValueError: another name, or "cuda" where torch finds none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device: wanted "auto", "cpu" or "cuda", found {device!r}')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device: wanted "cuda", but torch finds no CUDA device; use "auto" or "cpu"')
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


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
