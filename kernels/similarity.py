"""Cosine similarity of feature rows, defined so that ties are exact and every device agrees.

    s(i, j) = round_g( <x_i, x_j> / sqrt(|x_i|^2 |x_j|^2) )          products and sums in float64

round_g rounds to the nearest multiple of 2^-44 (5.7e-14), ties to even. Two ends are served by it:

- float64 sums of one product in another order differ by about sqrt(D) 1e-16, which would order neighbours
  that are tied by construction (parallel rows, lattices, D = 1) by noise; on the grid they tie.
- s 2^44 is an integer of 46 bits: a sort key with room for a position.

Dividing by sqrt(|x_i|^2 |x_j|^2) instead of normalising first keeps s(i, i) = 1 exactly, needs no second
copy of the features, and products of float32 features are exact in float64.

Shapes: features (N, D) of any floating type, |x|^2 between 1e-150 and 1e150; squares (N,) float64.
Error: |s - exact| <= 2^-45 + D 2^-53.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmx.kernels.cpu import similarity as cpu
from dmx.kernels.device import as_array, on, pad_to_power_of_two, takes_triton

GRID = 2.0**44


def similarity_reference(queries: torch.Tensor, database: torch.Tensor) -> torch.Tensor:
    """All similarities, (Q, D) and (M, D) -> (Q, M) float64, as the formula says."""
    q, x = queries.double(), database.double()
    scale = torch.outer((q * q).sum(1), (x * x).sum(1)).sqrt()
    return torch.round((q @ x.T) / scale * GRID) / GRID


@triton.jit
def nearest(x):  # type: ignore[no-untyped-def]
    """float64 numbers below 2^51 rounded to whole ones, ties to even."""
    # Beyond 2^52 float64 holds integers alone, so adding and taking off 1.5 2^52 rounds.
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def on_grid(product, square_x, square_y):  # type: ignore[no-untyped-def]
    """s 2^44 as int64, from float64 inner products and squared lengths."""
    return nearest(product / tl.sqrt(square_x * square_y) * 17592186044416.0).to(tl.int64)  # 2^44


@triton.jit
def from_grid(steps):  # type: ignore[no-untyped-def]
    """s from s 2^44."""
    return steps.to(tl.float64) * 5.684341886080802e-14  # 2^-44


@triton.jit
def _squares(features, out, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, D, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        x = tl.load(features + row * D + c, mask=c < D, other=0.0).to(tl.float64)
        total += x * x
    tl.store(out + row, tl.sum(total, 0))


def squared_lengths(features: torch.Tensor) -> torch.Tensor:
    """|x_i|^2 of every row, (N, D) -> (N,) float64. Not finite where the row is not."""
    if not takes_triton(features):
        return torch.from_numpy(cpu.squared_lengths(as_array(features)))
    out = torch.empty(len(features), dtype=torch.float64, device=features.device)
    width = features.shape[1]
    with on(features):
        _squares[(len(features),)](
            features.contiguous(), out, width, BLOCK=min(pad_to_power_of_two(width), 1024), num_warps=4
        )
    return out
