"""Softmax cross-entropy over more classes than logits can be held for, and over several processes.

Symbols: B images of all processes, D feature width, C classes over all processes, s smoothing, y labels.

    z[c, i] = scale <w_c, x_i>                                  logits, in blocks of classes: (n, B)
    loss    = mean over i of  L_i - (1 - s) z[y_i, i] - s / C sum_c z[c, i],   L_i = log sum_c exp z[c, i]
    dloss / dz[c, i] = (exp(z[c, i] - L_i) - s / C - (1 - s) [c = y_i]) / B    slopes

The logits of one block exist at a time. Going forward, a running maximum and sum over the blocks give L
(Milakov and Gimelshein, Online normalizer calculation for softmax, 2018); one maximum and one sum of B
numbers put the processes' shares together. Going backward, each block's logits are made again for the
features' gradient. The rows' gradient is as large as the rows, so it is not made there: `rows_gradient` makes
it for one block, when that block is updated, from what each micro-batch left (`Pass`).

Products follow the rows: float32 rows multiply in float32; bfloat16 rows multiply bfloat16 features and
slopes, summed in float32. What is summed over blocks and processes for L is held in float64 (B numbers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of the temporaries of a block, by type of device. On a CPU a block then stays near the caches
# (`benchmarks/classifier.py` measures other sizes); on a GPU it is work enough for the launches of its dozen
# kernels, by their usual cost of 5 microseconds.
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**30}


@dataclass(frozen=True)
class Softmax:
    """Constants of the loss.

    Attributes:
        classes: rows over all processes, C.
        smoothing: share of the target spread evenly over all classes.
        scale: factor of the logits.
        size: number of processes that hold rows.
        block_bytes: the most that temporaries of a block of classes take at a time.
    """

    classes: int
    smoothing: float
    scale: float
    size: int = 1
    block_bytes: int = BLOCK_BYTES["cpu"]


@dataclass(frozen=True)
class Pass:
    """What a micro-batch leaves for the rows' gradient.

    Attributes:
        scaled: (B, D) features times the logits' scale, in the rows' dtype.
        weighted: (B, D) the same times the gradient of the mean that came from above, over B.
        column: (B,) int64, the label's row among this process's rows, -1 where another one owns it.
        log_total: (B,) L.
        softmax: constants of the loss.
    """

    scaled: Tensor
    weighted: Tensor
    column: Tensor
    log_total: Tensor
    softmax: Softmax


def block_rows(images: int, width: int, block_bytes: int) -> int:
    """Classes in a block of at most `block_bytes` of temporaries, at least one.

    A class takes 8 B bytes at most (float32 logits, of the block before too) and 16 D (gradient, float32 row,
    and in bfloat16 a copy of it that is being split, and what it is split into).
    """
    return max(1, block_bytes // (8 * images + 16 * width))


def blocks(rows: int, images: int, width: int, block_bytes: int) -> Iterator[slice]:
    """`rows` in blocks of classes."""
    step = block_rows(images, width, block_bytes)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def sharded_cross_entropy(
    features: Tensor, parts: Sequence[Tensor], column: Tensor, softmax: Softmax, passes: list[Pass]
) -> Tensor:
    """Cross-entropy of scale * features @ all rows, from this process's rows.

    Args:
        features: (B, D), the same on every process, in float32 (float64 with rows of float64).
        parts: this process's rows, (n, D) each, one dtype; may be empty. They have to stay as they are until
            the gradients are made.
        column: (B,) int64, the label's row among `parts` one below the other, -1 where another process owns
            it.
        softmax: constants of the loss.
        passes: backward appends to it what `rows_gradient` needs.

    Returns:
        Scalar: the mean over B, the same on every process. Its gradient reaches `features` only through this
        process's rows: the sum over the processes is the gradient.
    """
    if not features.requires_grad:
        # The rows learn where nothing else does, too: backward has to come here.
        features = features.detach().requires_grad_()
    return _ShardedCrossEntropy.apply(features, column, softmax, passes, *parts)  # type: ignore[no-any-return]


def rows_gradient(passes: Sequence[Pass], rows: Tensor, first: int) -> Tensor:
    """Gradient of a block of rows, summed over micro-batches.

    Args:
        passes: of the micro-batches, at least one.
        rows: (n, D), as they were in the forward pass.
        first: number of its first row among this process's rows.

    Returns:
        (n, D) float32 (float64 for rows of float64).
    """
    total: Tensor | None = None
    for seen in passes:
        slopes = _slopes(rows, first, seen.scaled, seen.column, seen.log_total, seen.softmax)
        gradient = _product(slopes, seen.weighted)
        total = gradient if total is None else total.add_(gradient)
    if total is None:
        raise ValueError("wanted at least one micro-batch that went backward, found none")
    return total


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, column: Tensor, softmax: Softmax, passes: list[Pass], *parts: Tensor
    ) -> Tensor:
        scaled = (features * softmax.scale).to(parts[0].dtype)
        highest, sums = _forward(scaled, parts, column, softmax)
        if softmax.size > 1:
            own = highest.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
            sums[0] *= (own - highest).exp()
            dist.all_reduce(sums)
        log_total = highest + sums[0].log()
        even = softmax.smoothing / softmax.classes
        loss = log_total - (1 - softmax.smoothing) * sums[2] - even * sums[1]
        # Rows are saved for torch to notice when they change before the backward pass.
        ctx.save_for_backward(scaled, column, log_total.to(highest.dtype), *parts)
        ctx.softmax, ctx.passes, ctx.dtype = softmax, passes, features.dtype
        return loss.mean().to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled, column, log_total, *parts = ctx.saved_tensors
        softmax, weight = ctx.softmax, upstream / len(scaled)
        gradient = torch.zeros(scaled.shape, dtype=ctx.dtype, device=scaled.device)
        for rows, first in _all_blocks(parts, len(scaled), softmax):
            slopes = _slopes(rows, first, scaled, column, log_total, softmax)
            gradient += _product(slopes.T, rows)
        weighted = (scaled * weight).to(scaled.dtype)
        ctx.passes.append(Pass(scaled, weighted, column, log_total, softmax))
        return gradient.mul_(weight * softmax.scale), *[None] * (3 + len(parts))


def _forward(
    scaled: Tensor, parts: Sequence[Tensor], column: Tensor, softmax: Softmax
) -> tuple[Tensor, Tensor]:
    """Over this process's rows: (B,) largest logits, and (3, B) float64 sums.

    They are the sums of exp(logit - largest), of logits, and of the labels' own logits.
    """
    kind = torch.promote_types(scaled.dtype, torch.float32)
    highest = torch.full((len(scaled),), -torch.inf, dtype=kind, device=scaled.device)
    sums = torch.zeros((3, len(scaled)), dtype=torch.float64, device=scaled.device)
    for rows, first in _all_blocks(parts, len(scaled), softmax):
        logits = _product(rows, scaled.T)
        index, inside = _place(column, first, len(rows))
        sums[1] += logits.sum(0)
        sums[2] += torch.where(inside, logits.gather(0, index)[0], 0)
        raised = torch.maximum(highest, logits.amax(0))
        sums[0] *= (highest - raised).exp()
        sums[0] += logits.sub_(raised).exp_().sum(0)
        highest = raised
    return highest, sums


def _slopes(
    rows: Tensor, first: int, scaled: Tensor, column: Tensor, log_total: Tensor, softmax: Softmax
) -> Tensor:
    """(n, B) derivative of B times the loss by a block's logits, which are made again; in the rows' dtype."""
    slopes = _product(rows, scaled.T).sub_(log_total).exp_().sub_(softmax.smoothing / softmax.classes)
    index, inside = _place(column, first, len(rows))
    own = inside[None].to(slopes.dtype) * (softmax.smoothing - 1)
    return slopes.scatter_add_(0, index, own).to(rows.dtype)


def _place(column: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """(1, B) row of each image's own class within a block, and (B,) whether it lies there at all.

    Index and mask instead of the images concerned: how many there are, a GPU would have to be asked.
    """
    index = column - first
    return index.clamp(0, count - 1)[None], (index >= 0) & (index < count)


def _all_blocks(parts: Sequence[Tensor], images: int, softmax: Softmax) -> Iterator[tuple[Tensor, int]]:
    """Blocks of rows, and the number of each one's first row among all of `parts`."""
    before = 0
    for part in parts:
        for block in blocks(len(part), images, part.shape[1], softmax.block_bytes):
            yield part[block], before + block.start
        before += len(part)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; bfloat16 factors are summed, and come out, in float32."""
    if a.dtype != torch.bfloat16:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # torch has no such product for the CPU; the widened factors lose nothing when they are narrowed again.
    with _bfloat16_inside():
        return a.float() @ b.float()


@contextmanager
def _bfloat16_inside() -> Iterator[None]:
    """Float32 products on the CPU may multiply in bfloat16, where the processor can."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # not in the stubs
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
