"""Losses and kernels where numbers are largest, smallest or all the same: finite, and what they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmx.cluster.validation import as_features
from dmx.distributed import World
from dmx.doctor.kernels import OPERATIONS
from dmx.doctor.operations import TRIALS, Sample, sample_of
from dmx.model.losses import domain_balance_loss, domain_loss, identity_loss, soft_triplet_loss
from dmx.train.classifier import Classifier, ClassifierSettings
from dmx.train.rows import RowPrecision

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


SMOOTHING, SCALE = 0.1, 0.5
# Source identities, pseudo-identities, and the labels of a batch.
BATCHES = {
    "both domains": (5, 4, torch.arange(ROWS) % 9),
    "one identity": (5, 4, torch.full((ROWS,), 6)),
    "source alone": (5, 4, torch.arange(ROWS) % 5),
    "target alone": (5, 4, 5 + torch.arange(ROWS) % 4),
    "no pseudo-identities": (5, 0, torch.arange(ROWS) % 5),
    "one class": (1, 0, LABELS["one"]),
}
# Features, rows, and the largest logit that they are then brought to.
MAGNITUDES = {
    "logits of 1e4": (1.0, 1.0, 1e4),
    "logits of 1e4 by long rows": (1e-3, 1.0, 1e4),
    "denormal features": (1e-40, 1.0, None),
    "denormal rows": (1.0, 1e-40, None),
    "denormal": (1e-40, 1e-40, None),
    "zero": (0.0, 0.0, None),
}
SINGLE, HALF = DTYPES
# Of rows and of features.
KINDS = [(SINGLE, SINGLE), (HALF, SINGLE), (SINGLE, HALF), (HALF, HALF)]


def _factors(which: str, classes: int) -> tuple[Tensor, Tensor]:
    """(ROWS, WIDTH) features, half of them opposite to others, and (classes, WIDTH) rows; both float32."""
    of_features, of_rows, largest = MAGNITUDES[which]
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(ROWS // 2, WIDTH, generator=generator, dtype=torch.float64) * of_features
    x = torch.cat([half, -0.9 * half])  # other than its opposite: the mean of all logits is not 0
    w = torch.randn(classes, WIDTH, generator=generator, dtype=torch.float64) * of_rows
    w[classes // 2] = w[0]
    if largest is not None:
        w *= largest / (SCALE * x @ w.T).abs().max()
    return x.float(), w.float()


def _oracle(x: Tensor, w: Tensor, labels: Tensor, features: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Loss, and gradients of features and rows, in float64, each with how far off it may be.

    Every sum in a logit and in L rounds to float32, relative to what its terms come to without their signs;
    so the exponent of a probability is off. With bfloat16 rows slopes round to bfloat16, and once more the
    features that they are multiplied by; `features` in bfloat16 have their gradient summed in it, class by
    class, and the loss rounded to it. Below float32's smallest normal number anything may be 0.
    """
    rounded = 2.0**-8 * (len(w) + 4 if features == HALF else 2 if w.dtype == HALF else 0)
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    loss = F.cross_entropy(SCALE * x @ w.T, labels, label_smoothing=SMOOTHING)
    by_feature, by_row = torch.autograd.grad(loss, (x, w))
    with torch.no_grad():
        unit, sums = 2.0**-24, WIDTH + len(w)
        terms = (SCALE * x.abs() @ w.abs().T).amax(1, keepdim=True)
        exponent = 2 * unit * ((WIDTH + 2) * terms + sums)
        p = F.softmax(SCALE * x @ w.T, 1)
        slopes = (p - SMOOTHING / len(w) - (1 - SMOOTHING) * F.one_hot(labels, len(w))).abs()
        off = (p * exponent.expm1() + 4 * unit + (sums * unit + rounded) * slopes) * SCALE / len(x)
        tiny = torch.finfo(torch.float32).tiny
        return [
            (loss.detach(), exponent.mean() + torch.finfo(features).eps / 2 * loss),
            (by_feature, off @ w.abs() + tiny),
            (by_row, off.T @ x.abs() + tiny),
        ]


@pytest.mark.parametrize("block_bytes", [1, None])
@pytest.mark.parametrize(("rows", "features"), KINDS)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_classifier(
    batch: str, magnitude: str, rows: torch.dtype, features: torch.dtype, block_bytes: int | None
) -> None:
    """What training minimises: loss, both gradients and a step; a class at a time, and all at once.

    The engines give features in float32 always; those in bfloat16 come through, too.
    """
    source, pseudo, labels = BATCHES[batch]
    x, w = _factors(magnitude, source + pseudo)
    precision: RowPrecision = "bf16" if rows == HALF else "fp32"
    kind = ClassifierSettings(WIDTH, 0.01, 5e-4, SMOOTHING, SCALE, precision, block_bytes)
    classifier = Classifier(World(0, 1, 0, 1, torch.device("cpu")), kind, w[:source])
    classifier.set_pseudo_rows(w[source:], pseudo)
    f = x.to(features).requires_grad_()
    loss = classifier.loss(f, labels)
    loss.backward()
    assert f.grad is not None
    by_row = torch.cat([gradient for _, _, gradient in classifier.gradients()])

    narrowest = HALF if HALF in (rows, features) else SINGLE
    expected = _oracle(x.to(narrowest), w.to(rows), labels, features)
    for found, (wanted, room) in zip((loss.detach(), f.grad, by_row), expected, strict=True):
        assert torch.isfinite(found).all()
        assert ((found.double() - wanted).abs() <= room).all()
    assert loss.dtype == f.grad.dtype == features
    assert by_row.dtype == SINGLE
    classifier.step()
    assert all(bool(torch.isfinite(part.exact()).all()) for part in classifier.rows.values())


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
