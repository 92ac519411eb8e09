"""Losses against loops in float64, derivatives, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dmx.model.losses import (
    domain_balance_loss,
    domain_labels,
    domain_loss,
    identity_loss,
    soft_triplet_loss,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def triplet_reference(f: Tensor, labels: Tensor, margin: float) -> float:
    """The definition, one anchor at a time."""
    total = 0.0
    for i in range(len(f)):
        distances = [max(float((f[i] - f[j]).norm()), 1e-6) for j in range(len(f))]
        positives = [d for j, d in enumerate(distances) if labels[j] == labels[i] and j != i]
        negatives = [d for j, d in enumerate(distances) if labels[j] != labels[i]]
        if positives and negatives:
            difference = max(positives) - min(negatives)
            total += margin * math.log1p(math.exp(-difference))
            total += (1 - margin) * math.log1p(math.exp(difference))
    return total / len(f)


def identity_reference(z: Tensor, labels: Tensor, smoothing: float, scale: float) -> float:
    total = 0.0
    for row, label in zip((z * scale).tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(v) for v in row))
        for c, value in enumerate(row):
            q = (1 - smoothing) * (c == label) + smoothing / len(row)
            total -= q * (value - log_sum)
    return total / len(z)


@pytest.mark.parametrize(("smoothing", "scale"), [(0.1, 0.5), (0.0, 1.0)])
def test_identity_loss(smoothing: float, scale: float) -> None:
    z, labels = torch.randn(9, 7, dtype=torch.float64), torch.randint(7, (9,))
    loss = identity_loss(z, labels, smoothing=smoothing, scale=scale)
    assert float(loss) == pytest.approx(identity_reference(z, labels, smoothing, scale), rel=1e-12)


def test_identity_loss_by_hand() -> None:
    """Logits halved to (1, 0): p = e / (1 + e) = 0.7311, smoothing spreads 0.05 to the wrong class."""
    loss = identity_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    assert float(loss) == pytest.approx(-0.95 * math.log(0.7310586) - 0.05 * math.log(0.2689414), rel=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_soft_triplet_loss(margin: float) -> None:
    f = torch.randn(12, 5, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4])  # 4 is alone
    loss = soft_triplet_loss(f, labels, margin=margin)
    assert float(loss) == pytest.approx(triplet_reference(f, labels, margin), rel=1e-12)


def test_soft_triplet_loss_by_hand() -> None:
    """Points 0, 1 | 3 on a line: anchors see (1, 3), (1, 2); the third has no positive."""
    f = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    expected = (math.log1p(math.exp(1 - 3)) + math.log1p(math.exp(1 - 2)) + 0) / 3
    assert float(soft_triplet_loss(f, torch.tensor([0, 0, 1]))) == pytest.approx(expected, rel=1e-12)


def test_soft_triplet_loss_over_gathered_features_is_that_of_the_whole_batch() -> None:
    f = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(12) % 4
    whole = soft_triplet_loss(f, labels)
    (expected,) = torch.autograd.grad(whole, f)
    parts = [
        soft_triplet_loss(f[rows], labels[rows], all_features=f, all_labels=labels)
        for rows in (slice(0, 6), slice(6, 12))
    ]
    mean = (parts[0] + parts[1]) / 2
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, f)[0], expected)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]])
def test_without_triplets_the_loss_is_zero_and_differentiable(labels: list[int]) -> None:
    f = torch.randn(4, 3, requires_grad=True)
    loss = soft_triplet_loss(f, torch.tensor(labels))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert f.grad is not None
    assert torch.equal(f.grad, torch.zeros_like(f))


def test_duplicates_and_large_features_have_finite_gradients() -> None:
    f = torch.ones(6, 3)
    f[3:] += 1e4
    f.requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = soft_triplet_loss(f, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert f.grad is not None
    assert torch.isfinite(f.grad).all()
    with pytest.raises(ValueError, match="go together"):
        soft_triplet_loss(f, labels, all_labels=labels)


def test_domain_balance_loss() -> None:
    z = torch.randn(8, 3, dtype=torch.float64)
    p = torch.exp(z) / torch.exp(z).sum(1, keepdim=True)
    negative_entropy = float((p * torch.log(p)).sum(1).mean())
    assert float(domain_balance_loss(z)) == pytest.approx(negative_entropy + math.log(3), rel=1e-12)
    assert float(domain_balance_loss(z, "official")) == pytest.approx(negative_entropy + 1.5, rel=1e-12)


def test_domain_balance_is_least_at_the_uniform_distribution() -> None:
    z = torch.full((4, 2), 3.0, dtype=torch.float64, requires_grad=True)
    loss = domain_balance_loss(z)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-15)
    assert z.grad is not None
    assert float(z.grad.abs().max()) < 1e-15
    assert float(domain_balance_loss(z.detach(), "official")) == pytest.approx(1 - math.log(2), rel=1e-12)
    assert float(domain_balance_loss(torch.tensor([[50.0, 0.0]]))) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    z = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([1, 1, 0])
    for loss in (domain_balance_loss(z), domain_loss(z, targets), identity_loss(z, targets)):
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
    assert torch.isnan(domain_balance_loss(z, "official"))  # the published fault, reproduced


def test_domain_loss_and_labels() -> None:
    z, labels = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 2, 3, 4, 2, 9])
    domains = domain_labels(labels, 3)
    assert domains.tolist() == [0, 0, 1, 1, 0, 1]
    assert domain_labels(labels, 3, "official").tolist() == [0, 0, 0, 1, 0, 1]
    expected = identity_reference(z, domains, 0.0, 1.0)
    assert float(domain_loss(z, domains)) == pytest.approx(expected, rel=1e-12)


def test_derivatives() -> None:
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 3])
    assert torch.autograd.gradcheck(lambda x: identity_loss(x, labels), z)
    assert torch.autograd.gradcheck(lambda x: soft_triplet_loss(x, labels), z)
    assert torch.autograd.gradcheck(lambda x: soft_triplet_loss(x, labels, margin=0.3), z)
    assert torch.autograd.gradcheck(lambda x: domain_loss(x, labels), z)
    assert torch.autograd.gradcheck(domain_balance_loss, z)
