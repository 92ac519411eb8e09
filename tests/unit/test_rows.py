"""Rows and their Adam: bfloat16 with its rest is float32, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmx.train.rows import MOMENTS, Rows, join, split

CPU = torch.device("cpu")
# In unit rows of 2048 numbers; bfloat16 there lies 1.2e-4 apart.
LEVEL, DISTANCE = 2048**-0.5, 2.0**-13


@settings(max_examples=300, deadline=None)
@given(st.floats(width=32, allow_nan=False, min_value=-(2.0**127), max_value=2.0**127))
def test_a_split_float_is_the_nearest_bfloat16_and_comes_back(value: float) -> None:
    """Subnormal numbers and zeros of both signs too."""
    exact = torch.tensor([value, -value], dtype=torch.float32)
    rounded, rest = split(exact)
    assert torch.equal(join(rounded, rest).view(torch.int32), exact.view(torch.int32))
    nearest = (exact.bfloat16().double() - exact.double()).abs()
    assert torch.equal((rounded.double() - exact.double()).abs(), nearest)


def test_halves_come_back_on_both_sides() -> None:
    """Where the rest is as large as 16 bits hold."""
    bits = torch.tensor([0x3C008000, 0x3C007FFF, 0x3C018000, 0x3C00FFFF], dtype=torch.int32)
    exact = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    assert torch.equal(join(*split(exact)), exact)


def _updated(precision: str, lr: float, steps: int = 50) -> Rows:
    """Rows after steps of always the same sign, in blocks of 3."""
    generator = torch.Generator().manual_seed(0)
    rows = Rows(LEVEL * (1 + 0.1 * torch.rand(7, 5, generator=generator)), precision, CPU)  # type: ignore[arg-type]
    for _ in range(steps):
        gradient = 0.5 + torch.rand(7, 5, generator=generator)
        for begin in range(0, 7, 3):
            block = slice(begin, begin + 3)
            rows.update(block, gradient[block].clone(), lr, 5e-4)
        rows.count_step()
    return rows


@pytest.mark.parametrize("lr", [3.5e-4, 3.5e-6])
def test_both_precisions_learn_the_same(lr: float) -> None:
    """From the same gradients, to the bit, also where a step is far less than bfloat16's distance."""
    single, half = _updated("fp32", lr), _updated("bf16", lr)
    assert half.values.dtype == torch.bfloat16
    for name, state in single.state().items():
        assert torch.equal(half.state()[name], state)
    assert single.steps == half.steps == 50


def test_bfloat16_alone_would_learn_nothing_at_a_small_rate() -> None:
    """Which is why the rest is kept: 50 steps of 3.5e-6 move a row by more than bfloat16's distance."""
    lr = 3.5e-6
    moved = (_updated("fp32", lr).exact() - _updated("fp32", 0.0).exact()).abs()
    assert (moved > DISTANCE).all()
    start = torch.full((4,), LEVEL).bfloat16()
    alone = start.clone()
    for _ in range(50):
        alone -= lr
    assert torch.equal(alone, start)


def test_updates_equal_those_of_torch() -> None:
    """Adam with its penalty, block by block, against torch.optim.Adam on the whole in float64."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(7, 5, generator=generator)
    rows, theirs = Rows(start, "fp32", CPU), start.double().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(20):
        gradient = torch.randn(7, 5, generator=generator)
        theirs.grad = gradient.double()
        adam.step()
        for block in (slice(0, 4), slice(4, 7)):
            rows.update(block, gradient[block].clone(), 0.01, 0.1)
        rows.count_step()
    torch.testing.assert_close(rows.exact().double(), theirs.detach(), atol=2e-6, rtol=0)


def test_state_goes_on_to_the_bit_in_either_precision() -> None:
    """Moments and steps too; forgetting them starts anew."""
    before = _updated("bf16", 1e-3)
    state = before.state()
    after = [Rows(state["rows"], precision, CPU) for precision in ("bf16", "fp32")]  # type: ignore[arg-type]
    for rows in after:
        rows.load_moments((state[MOMENTS[0]], state[MOMENTS[1]]), before.steps)
    for rows in [before, *after]:
        rows.update(slice(None), torch.ones(7, 5), 1e-3, 0.0)
        rows.count_step()
    for rows in after:
        assert torch.equal(rows.exact(), before.exact())
    before.forget_moments()
    assert before.steps == 0
    assert list(before.state()) == ["rows"]
