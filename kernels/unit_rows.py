"""Feature rows made unit, centred, shuffled and rounded to float16, with what rounding cost.

    u_j = x_j / |x_j| - m            m: mean of the unit rows
    a_j = <m, x_j / |x_j|> - mean_j(a)

Real features share a large mean, which would only eat precision: for a fixed i, ordering j by similarity is
ordering by <u_i, u_j> + a_j. float16 holds unit rows eight times as finely as bfloat16, at the same rate on
tensor cores; what is below its range is an error like any other. Rows are shuffled so that any stretch of
them is a random sample of all.

Shapes: features (N, D) of any floating type, squares (N,) float64, ids (M,) int64; low (P, W) float16, P and
W the next multiples of the block sizes, padded with zeros.
Error: measured a row, e_j = |u_j - low_j| in float64. Memory: 2 P W bytes and 24 P.
Time: one pass over the features for the mean and one for the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dmx.kernels.device import on, pad_to_power_of_two

WIDTH = 64  # columns are padded to this: one step of the matrix product
_CHUNK = 2**22  # float64 elements that a step of the mean holds


@dataclass(frozen=True)
class UnitRows:
    """Rows ready for the matrix product. Position p holds row `ids[p]` of the features.

    Attributes:
        low: (P, W) float16, zero beyond (M, D).
        ids: (M,) int32, shuffled.
        offset: (P,) float32, a_j; -inf on padding, so that no key of padding reaches a limit.
        along_mean: (M,) float64, <m, x_j / |x_j|>.
        error: (M,) float64, e_j; length: (M,) float64, |u_j|. Both rounded up.
    """

    low: torch.Tensor
    ids: torch.Tensor
    offset: torch.Tensor
    along_mean: torch.Tensor
    error: torch.Tensor
    length: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)


def unit_rows_reference(features: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """u of every row, (N, D) float64."""
    x = features.double()
    return x / (x * x).sum(1, keepdim=True).sqrt() - mean.double()


def mean_of_units(features: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """m, (D,) float32. It is only a shift: any precision will do, as long as all use the same numbers."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    step = max(1, _CHUNK // features.shape[1])
    for begin in range(0, len(features), step):
        # Scaled before they are narrowed: rows may be of any length.
        rows = features[begin : begin + step].double()
        total += (rows * squares[begin : begin + step, None].rsqrt()).sum(0)
    mean: torch.Tensor = total / len(features)
    return mean.float()


def shuffled(count: int, device: torch.device) -> torch.Tensor:
    """(count,) int64: the numbers below `count` in an order that has nothing to do with theirs."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randperm(count, generator=generator, device=device)


@triton.jit(do_not_specialize=["count"])
def _round_rows(  # type: ignore[no-untyped-def]
    features, squares, ids, mean, low, along_mean, error, length, count, D, W, BLOCK: tl.constexpr
):
    position = tl.program_id(0).to(tl.int64)
    inside = position < count
    row = tl.load(ids + position, mask=inside, other=0).to(tl.int64)
    filled = tl.where(inside, D, 0)
    scale = 1.0 / tl.sqrt(tl.load(squares + row))
    along = tl.zeros([BLOCK], tl.float64)
    lost = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, W, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        real = c < filled
        m = tl.load(mean + c, mask=real, other=0.0).to(tl.float64)
        unit = tl.load(features + row * D + c, mask=real, other=0.0).to(tl.float64) * scale
        u = unit - m
        rounded = u.to(tl.float32).to(tl.float16)
        tl.store(low + position * W + c, rounded, mask=c < W)
        difference = u - rounded.to(tl.float64)
        along += unit * m
        lost += difference * difference
        square += u * u
    tl.store(along_mean + position, tl.sum(along, 0), mask=inside)
    tl.store(error + position, tl.sqrt(tl.sum(lost, 0)), mask=inside)
    tl.store(length + position, tl.sqrt(tl.sum(square, 0)), mask=inside)


def unit_rows(
    features: torch.Tensor, squares: torch.Tensor, ids: torch.Tensor, mean: torch.Tensor, block: int
) -> UnitRows:
    """Rounds the rows named by `ids`.

    Args:
        features: (N, D) floating, contiguous; squares: (N,) float64, all positive and finite.
        ids: (M,) int32, rows of the features in the order they are to lie.
        mean: (D,) float32 of `mean_of_units`.
        block: P is the next multiple of it.
    """
    count, D = len(ids), features.shape[1]
    P, W = -(-count // block) * block, -(-D // WIDTH) * WIDTH
    low = torch.empty((P, W), dtype=torch.float16, device=features.device)
    along, error, length = torch.empty((3, count), dtype=torch.float64, device=features.device)
    with on(features):
        _round_rows[(P,)](
            features, squares, ids, mean, low, along, error, length, count, D, W,
            BLOCK=min(pad_to_power_of_two(W), 1024), num_warps=4,
        )  # fmt: skip
    offset = torch.full((P,), -torch.inf, dtype=torch.float32, device=features.device)
    offset[:count] = (along - along.mean()).float()
    # The 1e-3 and 1e-15 cover the rounding of these norms and of the centred rows themselves.
    return UnitRows(low, ids, offset, along, error * 1.001 + 1e-15, length * 1.001 + 1e-15)
