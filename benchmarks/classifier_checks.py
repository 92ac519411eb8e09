"""Is the blocked softmax right, and which bits of a row are needed? For `classifier.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dmx.distributed import World
from dmx.train.classifier import Classifier, ClassifierSettings
from dmx.train.rows import RowPrecision

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SMOOTHING, SCALE = 0.1, 0.5
RATES = (
    3.5e-4,
    3.5e-5,
    3.5e-6,
)  # of the recipe: as it is, and after each milestone; warm-up begins at the last
STEPS, CLASSES, WIDTH, BATCH = 600, 500, 128, 64


def agreement(classes: int, width: int, batch: int) -> dict[str, Any]:
    """Loss and gradients in blocks, float32, against the unsharded ones in float32 and in float64.

    Returns:
        Largest absolute differences from torch's float32; and of both, in float64, the largest error as a
        share of the largest value.
    """
    generator = torch.Generator().manual_seed(1)
    rows = F.normalize(torch.randn(classes, width, generator=generator))
    features = torch.randn(batch, width, generator=generator)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    classifier = Classifier(ALONE, ClassifierSettings(width, 0.0, 0.0, SMOOTHING, SCALE), rows)
    x = features.clone().requires_grad_()
    loss = classifier.loss(x, labels)
    loss.backward()
    assert x.grad is not None
    found = {"loss": loss.detach(), "features": x.grad}
    found["rows"] = torch.cat([gradient for _, _, gradient in classifier.gradients()])
    single = unsharded(features, rows, labels)
    double = unsharded(features.double(), rows.double(), labels)

    def share(values: dict[str, torch.Tensor]) -> dict[str, float]:
        return {n: float((values[n] - v).abs().max() / v.abs().max()) for n, v in double.items()}

    return {
        "classes": classes,
        "from_float32": {name: float((found[name] - single[name]).abs().max()) for name in found},
        "error": share(found), "error_of_torch": share(single),
    }  # fmt: skip


def unsharded(features: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Torch's loss and gradients in the dtype of the inputs."""
    x, w = features.clone().requires_grad_(), rows.clone().requires_grad_()
    loss = F.cross_entropy(F.linear(x, w) * SCALE, labels, label_smoothing=SMOOTHING)
    loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    return {"loss": loss.detach(), "features": x.grad, "rows": w.grad}


def nearest(rows: torch.Tensor) -> torch.Tensor:
    """Rows as bfloat16 alone holds them."""
    return rows.bfloat16().float()


def at_random(rows: torch.Tensor) -> torch.Tensor:
    """Up or down to a bfloat16, by chance, so that the mean stays."""
    bits = rows.view(torch.int32)
    return ((bits + torch.randint_like(bits, 2**16)) & -(2**16)).view(torch.float32)


def rounding() -> list[dict[str, Any]]:
    """What becomes of rows that are held in different ways, at the recipe's learning rates.

    Rows begin as centroids and learn to tell people apart, whose images scatter around other points nearby.

    Returns:
        A row by rate and way: `loss` after the last step on images of their own; `distance`, how far the rows
        are from float32's, as a share of the way those went.
    """
    ways: dict[str, tuple[RowPrecision, Callable[[torch.Tensor], torch.Tensor] | None]] = {
        "fp32": ("fp32", None), "bf16 and rest": ("bf16", None),
        "bf16 alone": ("fp32", nearest), "bf16 at random": ("fp32", at_random),
    }  # fmt: skip
    found = []
    for lr in RATES:
        start, exact = people(), None
        for way, (precision, rounded) in ways.items():
            rows, loss = learned(start, lr, precision, rounded)
            exact = rows if exact is None else exact
            distance = float((rows - exact).norm() / (exact - start[1]).norm())
            found.append({
                "lr": lr, "way": way, "loss": loss, "distance": distance,
                "steps": STEPS, "classes": CLASSES, "width": WIDTH, "batch": BATCH,
            })  # fmt: skip
    return found


def people() -> tuple[torch.Tensor, torch.Tensor]:
    """Where the images of each class lie, and unit rows near it: (C, D) each."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    return centres, F.normalize(centres + torch.randn(CLASSES, WIDTH, generator=generator))


def learned(
    start: tuple[torch.Tensor, torch.Tensor],
    lr: float,
    precision: RowPrecision,
    rounded: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, float]:
    """Rows after training, rounded after each step where a way is given, and their loss."""
    centres, rows = start
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(4)
    classifier = Classifier(ALONE, ClassifierSettings(WIDTH, lr, 5e-4, SMOOTHING, SCALE, precision), rows)
    held = classifier.rows["source"]

    def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        return centres[labels] + 2 * torch.randn(count, WIDTH, generator=generator), labels

    for _ in range(STEPS):
        classifier.loss(*images(BATCH)).backward()
        classifier.step()
        if rounded is not None:
            held.values.copy_(rounded(held.values))
    exact = held.exact()
    features, labels = images(4096)
    return exact, float(F.cross_entropy(F.linear(features, exact) * SCALE, labels, label_smoothing=SMOOTHING))
