"""The softmax over blocks of classes: any block, any shape, both precisions, and nothing large held."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dmx.distributed import World
from dmx.train.classifier import Classifier, ClassifierSettings
from dmx.train.softmax import Pass, Softmax, block_rows, rows_gradient, sharded_cross_entropy

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _problem(images: int, width: int, classes: int, seed: int = 0) -> Problem:
    """Features (B, D) and rows (C, D) in float64, labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    features = 4 * torch.randn(images, width, dtype=torch.float64, generator=generator)
    rows = torch.randn(classes, width, dtype=torch.float64, generator=generator)
    return features, rows, torch.randint(0, classes, (images,), generator=generator)


def _single(problem: Problem) -> Problem:
    """The same in float32."""
    features, rows, labels = problem
    return features.float(), rows.float(), labels


def _unsharded(
    features: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor, smoothing: float, scale: float
) -> Problem:
    """Loss, and gradients of features and rows, by torch's own cross-entropy in the dtype of the inputs."""
    x, w = features.clone().requires_grad_(), rows.clone().requires_grad_()
    loss = F.cross_entropy(F.linear(x, w) * scale, labels, label_smoothing=smoothing)
    loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    return loss.detach(), x.grad, w.grad


def _blocked(features: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor, softmax: Softmax) -> Problem:
    """The same in blocks."""
    x, passes = features.clone().requires_grad_(), list[Pass]()
    loss = sharded_cross_entropy(x, [rows], labels, softmax, passes)
    loss.backward()
    step = block_rows(*features.shape, softmax.block_bytes)
    found = [rows_gradient(passes, rows[at : at + step], at) for at in range(0, len(rows), step)]
    assert x.grad is not None
    return loss.detach(), x.grad, torch.cat(found)


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 9),
    width=st.integers(1, 8),
    classes=st.integers(1, 40),
    in_block=st.integers(1, 50),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 2**31),
)
def test_any_block_equals_the_whole(
    images: int, width: int, classes: int, in_block: int, smoothing: float, scale: float, seed: int
) -> None:
    """In float64 to 1e-12 of the largest value, whatever the block: one class, all, more than all."""
    problem = _problem(images, width, classes, seed)
    softmax = Softmax(classes, smoothing, scale, block_bytes=in_block * (8 * images + 16 * width))
    assert block_rows(images, width, softmax.block_bytes) == in_block
    for found, expected in zip(
        _blocked(*problem, softmax), _unsharded(*problem, smoothing, scale), strict=True
    ):
        assert (found - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("classes", [1000, 50_000])
def test_float32_equals_the_unsharded_in_float32(classes: int) -> None:
    """Loss and gradients to 1e-5; and to 1e-5 of their largest values where those are known in float64.

    Torch's own gradients are 6e-5 of their largest values off at 50,000 classes.
    """
    features, rows, labels = _single(_problem(64, 32, classes))
    unsharded = _unsharded(features, rows, labels, 0.1, 0.5)
    exact = _unsharded(features.double(), rows.double(), labels, 0.1, 0.5)
    found = _blocked(features, rows, labels, Softmax(classes, 0.1, 0.5, block_bytes=2**20))
    for got, theirs, wanted in zip(found, unsharded, exact, strict=True):
        torch.testing.assert_close(got, theirs, atol=1e-5, rtol=1e-6)
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 6e-6)])
def test_loss_stays_finite_and_exact_on_large_logits(dtype: torch.dtype, tolerance: float) -> None:
    """Logits of thousands neither overflow nor lose the loss."""
    features, rows, labels = _problem(12, 7, 12)
    features, rows = (1000 * features).to(dtype), rows.to(dtype)
    expected = _unsharded(features.double(), rows.double(), labels, 0.1, 0.5)[0]
    for block_bytes in (1, 2**20):
        loss = _blocked(features, rows, labels, Softmax(12, 0.1, 0.5, block_bytes=block_bytes))[0]
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)


def test_bfloat16_rows_lose_what_bfloat16_rounds_and_no_more() -> None:
    """Against float64 on the same rounded factors.

    The loss is as exact as in float32: bfloat16 products are exact there. In the gradients slopes are rounded
    too, each by 2^-8 at most, and so is the sum of their magnitudes times the other factor.
    """
    features, rows, labels = _problem(16, 32, 300)
    features, rows = features.bfloat16().double(), rows.bfloat16().double()
    loss, by_feature, by_row = _unsharded(features, rows, labels, 0.1, 0.5)
    softmax = Softmax(300, 0.1, 0.5, block_bytes=2**14)
    before = torch.backends.mkldnn.matmul.fp32_precision
    found = _blocked(features.float(), rows.bfloat16(), labels, softmax)
    assert torch.backends.mkldnn.matmul.fp32_precision == before, "others multiply as they did"
    assert abs(found[0] - loss) <= 1e-5 * loss
    probabilities = F.softmax(0.5 * features @ rows.T, 1)
    slopes = (probabilities - 0.1 / 300 - 0.9 * F.one_hot(labels, 300)).abs() / len(features) * 0.5
    room = 1.01 * 2**-8
    assert ((found[1] - by_feature).abs() <= room * slopes @ rows.abs()).all()
    # Features weighted by what comes from above are rounded once more, unless B is a power of two as here.
    assert ((found[2] - by_row).abs() <= room * slopes.T @ features.abs()).all()


def test_rows_that_change_before_the_backward_pass_are_noticed() -> None:
    """The logits would be made again from other rows."""
    features, rows, labels = _single(_problem(3, 4, 5))
    loss = sharded_cross_entropy(features.requires_grad_(), [rows], labels, Softmax(5, 0.1, 0.5), [])
    rows += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _peak_bytes(call: Callable[[], None]) -> int:
    """The most that tensors on the CPU took at a time beyond those before, by torch's own account."""
    with torch.profiler.profile(profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    assert held, "torch recorded no allocation"
    return max(held)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_takes_no_more_than_a_block(precision: Any) -> None:
    """Of two micro-batches: no logits of all classes, no gradient and no copy of all rows, in all passes."""
    images, width, classes, block_bytes = 32, 16, 20_000, 2**18
    features, rows, labels = _single(_problem(64, width, classes))
    kind = ClassifierSettings(width, 0.01, 5e-4, 0.1, 0.5, precision, block_bytes)
    classifier = Classifier(ALONE, kind, rows[:2000])
    classifier.set_pseudo_rows(rows[2000:], len(rows) - 2000)

    def step() -> None:
        for part in (slice(0, images), slice(images, None)):
            classifier.loss(features[part], labels[part]).backward()
        classifier.step()

    step()  # the first one makes the moments
    # What is as large as a batch's features, and not as the classes: a few KiB each.
    few = 16 * images * width * 4
    assert _peak_bytes(step) <= block_bytes + few
    assert block_bytes + few < classes * width * 2 < classes * images * 4
