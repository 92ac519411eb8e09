"""Rows of the identity classifier (class weights) with their Adam, updated a block at a time.

`fp32` holds a row in float32. `bf16` holds it as bfloat16, which is what products read, and beside it the 16
bits that float32 has more, which only the update reads: both together are the float32 row, bit for bit.
Bfloat16 alone would not do. Near 0.02, as in unit rows of 2048 numbers, its values lie 1.2e-4 apart: an Adam
step at a learning rate below half of that is rounded away. Rounding at random instead keeps the steps on
average and takes no rest, but rows wander by noise of the size of that distance, and the random numbers would
have to be the same for any number of processes. `benchmarks/classifier.py` measures all of these.

Bytes a weight: 4 + 8 (moments) = 12 in fp32; 2 + 2 + 8 = 12 in bf16, of which products read 2; 10 without the
rest. The gradient would be 4 more, and exists for one block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

RowPrecision = Literal["fp32", "bf16"]
MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults, which the published code takes

COPIED_ROWS = 4096  # at a time, between float32 and its two halves


def split(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 as the nearest bfloat16, halves away from zero, and the rest.

    Args:
        exact: (...) float32, below the largest finite bfloat16 in magnitude.

    Returns:
        (...) bfloat16 and (...) int16: bits(exact) = bits(bfloat16) 2^16 + rest.
    """
    bits = exact.view(torch.int32)
    upper = (bits + 0x8000).bitwise_right_shift_(16)
    rounded = upper.to(torch.int16).view(torch.bfloat16)
    rest = torch.sub(bits, upper.bitwise_left_shift_(16), out=upper)
    return rounded, rest.to(torch.int16)


def join(rounded: Tensor, rest: Tensor) -> Tensor:
    """What `split` took apart: (...) float32."""
    bits = rounded.view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(rest).view(torch.float32)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(begin, begin + COPIED_ROWS) for begin in range(0, rows, COPIED_ROWS))


class Rows:
    """Rows of some classes on one device, and their Adam (L2 penalty added to the gradient).

    Attributes:
        values: (n, D) as products read them: float32 or bfloat16.
        steps: updates so far. Moments exist from the first one on.
    """

    def __init__(self, exact: Tensor, precision: RowPrecision, device: torch.device) -> None:
        """Copy rows; Adam has seen nothing.

        Args:
            exact: (n, D) float32.
            precision: how they are held.
            device: where.
        """
        self.steps = 0
        self._moments: tuple[Tensor, Tensor] | None = None
        self._rest: Tensor | None = None
        if precision == "fp32":
            self.values = exact.to(device, copy=True)
            return
        self.values = torch.empty(exact.shape, dtype=torch.bfloat16, device=device)
        self._rest = torch.empty(exact.shape, dtype=torch.int16, device=device)
        for block in _blocks(len(exact)):
            self.values[block], self._rest[block] = split(exact[block].to(device))

    def __len__(self) -> int:
        return len(self.values)

    def exact(self, block: slice = slice(None)) -> Tensor:
        """A block's (n, D) float32 rows: themselves in fp32, a copy in bf16."""
        values = self.values[block]
        return values if self._rest is None else join(values, self._rest[block])

    def update(self, block: slice, gradient: Tensor, lr: float, weight_decay: float) -> None:
        """Adam's step number `steps + 1` for a block of rows; `count_step` follows the last block.

        Args:
            block: which rows.
            gradient: (n, D) float32, overwritten.
            lr: learning rate.
            weight_decay: L2 penalty.
        """
        exact = self.exact(block)
        first, second = (moment[block] for moment in self._own_moments())
        adam(
            [exact], [gradient], [first], [second], [],
            [torch.full((), float(self.steps), device=exact.device)],
            fused=True, amsgrad=False, maximize=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=weight_decay, eps=EPS,
        )  # fmt: skip
        if self._rest is not None:
            self.values[block], self._rest[block] = split(exact)

    def count_step(self) -> None:
        """Count an update of all rows."""
        self._own_moments()  # a share without rows has empty ones
        self.steps += 1

    def _own_moments(self) -> tuple[Tensor, Tensor]:
        if self._moments is None:
            zeros = (torch.zeros(self.values.shape, device=self.values.device) for _ in MOMENTS)
            self._moments = (next(zeros), next(zeros))
        return self._moments

    def forget_moments(self) -> None:
        """Make Adam start anew."""
        self.steps, self._moments = 0, None

    def state(self) -> dict[str, Tensor]:
        """`rows` and what moments there are by name: (n, D) float32 on the CPU, not copied where they lie."""
        state = {"rows": self.exact().cpu() if self._rest is None else self._joined()}
        if self._moments is not None:
            state |= {name: moment.cpu() for name, moment in zip(MOMENTS, self._moments, strict=True)}
        return state

    def _joined(self) -> Tensor:
        whole = torch.empty(self.values.shape)
        for block in _blocks(len(self)):
            whole[block] = self.exact(block)
        return whole

    def load_moments(self, moments: tuple[Tensor, Tensor], steps: int) -> None:
        """Go on after `steps` updates with a copy of `moments`, (n, D) float32 each."""
        device = self.values.device
        self._moments = (moments[0].to(device, copy=True), moments[1].to(device, copy=True))
        self.steps = steps
