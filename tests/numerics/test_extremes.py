"""Losses and kernels where numbers are largest, smallest or all the same: finite, and what they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dmx.cluster.validation import as_features
from dmx.doctor.kernels import OPERATIONS
from dmx.doctor.operations import TRIALS, Sample, sample_of
from dmx.model.losses import domain_balance_loss, domain_loss, identity_loss, soft_triplet_loss

DTYPES = [torch.float32, torch.bfloat16]
SIZES = {"1e4": 1e4, "denormal": 1e-40, "smallest": 2.0**-149, "zero": 0.0}
ROWS, WIDTH = 12, 6
LABELS = {
    "several": torch.arange(ROWS) % 3,
    "one": torch.zeros(ROWS, dtype=torch.int64),
    "all different": torch.arange(ROWS),
}


def _of_size(size: float, dtype: torch.dtype, columns: int = WIDTH) -> Tensor:
    """(ROWS, columns) of both signs; some rows equal, some all of one sign."""
    x = (
        torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sign()
        * size
    )
    x[1] = x[0]
    x[-1] = size
    return x.to(dtype).requires_grad_()


def _finite(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The gradients, all finite as the loss is."""
    gradients = torch.autograd.grad(loss, inputs)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    return list(gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", [1, 2, WIDTH])
def test_identity_loss(size: str, dtype: torch.dtype, classes: int) -> None:
    """Of one class, too, where it is 0 with gradient 0."""
    z = _of_size(SIZES[size], dtype, classes)
    loss = identity_loss(z, torch.arange(ROWS) % classes)
    (gradient,) = _finite(loss, z)
    assert float(loss) >= 0
    assert float(gradient.abs().max()) <= 1.01 * 0.5 / ROWS  # |p - q| <= 1, halved logits
    if classes == 1:
        assert float(loss) == 0
        assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("domains", [1, 2, 3])
@pytest.mark.parametrize("which", ["one", "several"])
def test_domain_losses(size: str, dtype: torch.dtype, domains: int, which: str) -> None:
    """A batch of one domain among them; the balance loss stays in [0, log K]."""
    z = _of_size(SIZES[size], dtype, domains)
    targets = torch.arange(ROWS) % domains if which == "several" else torch.zeros(ROWS, dtype=torch.int64)
    _finite(domain_loss(z, targets), z)
    balance = domain_balance_loss(z)
    _finite(balance, z)
    assert -1e-6 <= float(balance) <= math.log(domains) + 1e-6
    if size not in ("1e4",):
        assert float(balance) == pytest.approx(0, abs=1e-6)  # nothing tells the domains apart


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", LABELS)
@pytest.mark.parametrize("gathered", [False, True])
def test_soft_triplet_loss(size: str, dtype: torch.dtype, which: str, gathered: bool) -> None:
    """One identity alone, or no two images of one, make no triplet: 0, with gradient 0."""
    f, labels = _of_size(SIZES[size], dtype), LABELS[which]
    others = {"all_features": f, "all_labels": labels} if gathered else {}
    for margin in (0.0, 0.3):
        loss = soft_triplet_loss(f, labels, margin=margin, **others)
        (gradient,) = _finite(loss, f)
        if which != "several":
            assert float(loss) == 0
            assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_triplet_loss_of_wide_features(dtype: torch.dtype) -> None:
    """2,048 numbers of 1e4: squared distances of 1e12, whose differences are what counts."""
    x = 1e4 * torch.randn(ROWS, 2048, generator=torch.Generator().manual_seed(0))
    f = x.to(dtype).requires_grad_()
    _finite(soft_triplet_loss(f, LABELS["several"]), f)


PEOPLE, IMAGES = 5, 8


def _people(spread: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    people = torch.randn(PEOPLE, 1, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(PEOPLE, IMAGES, 16, generator=generator, dtype=torch.float64)
    return (people + spread * noise).reshape(-1, 16)


FEATURES: dict[str, Callable[[], Tensor]] = {
    "of 1e4": lambda: 1e4 * _people(0.3),
    "denormal": lambda: 2.0**-130 * _people(0.3),
    "far apart in size": lambda: (
        _people(0.3) * 10 ** torch.linspace(-15, 15, PEOPLE * IMAGES).double()[:, None]
    ),
    "one identity": lambda: torch.ones(PEOPLE * IMAGES, 16, dtype=torch.float64) + 1e-3 * _people(1.0),
    "all the same": lambda: torch.ones(PEOPLE * IMAGES, 16, dtype=torch.float64),
    "opposite": lambda: torch.cat([_people(0.1)[:20], -_people(0.1)[:20]]),
}


def _sample(which: str, dtype: torch.dtype) -> Sample:
    rows, _ = as_features(FEATURES[which]().to(dtype), "cpu")
    return sample_of(rows, rows.flip(0)[:10].contiguous())


def _check(sample: Sample, device: torch.device, operations: Sequence[str] = OPERATIONS) -> None:
    """Operations agree with their references, of which no number is NaN."""
    for values in (sample.own.similarities, sample.encoded, sample.distances):
        assert bool(torch.isfinite(values).all())
    for name in operations:
        call, check = TRIALS[name](sample, device)
        check(call())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("which", FEATURES)
def test_operations_on_the_cpu(which: str, dtype: torch.dtype) -> None:
    """By numba, where half precision becomes float32."""
    _check(_sample(which, dtype), torch.device("cpu"))


@pytest.mark.parametrize(
    ("which", "dtype"),
    [("of 1e4", torch.bfloat16), ("denormal", torch.float32), ("all the same", torch.float32)],
)
def test_operations_by_triton(which: str, dtype: torch.dtype, triton_device: Any) -> None:
    """Interpreted, or on a GPU; all but the one that is made of the others."""
    _check(_sample(which, dtype), triton_device, OPERATIONS[:-1])
