"""A step's features: of the whole batch, or of each domain by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dmx.config import Config, from_tree
from dmx.data.shards import DatasetWriter
from dmx.errors import DmxError
from dmx.model import build_model
from dmx.train.data import TrainingData
from dmx.train.step import _features

MODEL = {"backbone": "resnet10t", "backbone_args": {"channels": [8, 8, 8, 8], "stem_width": 8}}


def config(**batch: Any) -> Config:
    return from_tree(("test", {"model": MODEL, "batch": {"norm_by_domain": True, **batch}}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_domain_is_normalised_by_itself(layout: torch.memory_format) -> None:
    """The features of a domain do not depend on what else is in the batch, and come in the batch's order."""
    torch.manual_seed(0)
    model = build_model(config().model).train()
    images = torch.randn(12, 3, 32, 16).contiguous(memory_format=layout)
    labels = torch.tensor([0, 7, 1, 6, 2, 5, 0, 7, 1, 6, 2, 5])  # five identities of the source
    source = labels < 5
    images[~source] += 3
    f, b = _features(model, images, labels, config(), 5)
    for domain in (source, ~source):
        alone_f, alone_b = model(images[domain])
        torch.testing.assert_close(f[domain], alone_f, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(b[domain], alone_b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b[domain].mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    together = _features(model, images, labels, config(norm_by_domain=False), 5)[1]
    assert (together[source].mean(0).abs() > 0.1).any()


def test_one_domain_is_one_batch() -> None:
    """An epoch on the source alone is normalised as ever."""
    calls: list[torch.Tensor] = []

    def model(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(images)
        return images, images

    images = torch.randn(4, 3, 32, 16)
    _features(model, images, torch.tensor([0, 0, 1, 1]), config(), 2)
    assert [call is images for call in calls] == [True]


@pytest.mark.parametrize(
    ("batch", "processes", "refused"),
    [
        ({}, 4, False),
        ({"source_share": 0.25}, 4, False),
        ({"source_share": 0.25}, 8, True),
        ({"source_share": 1.0}, 1, True),
        ({"source_share": None}, 1, True),
        ({"accumulation": 16}, 1, True),
    ],
)
def test_every_process_has_both_domains(
    batch: dict[str, Any], processes: int, refused: bool, tmp_path: Any
) -> None:
    """Or some would wait for others in a forward pass that those never make."""
    with DatasetWriter(tmp_path / "source", layout="folder") as writer:
        for person in range(3):
            writer.add("train", b"image", person, 0, f"{person}.jpg")
    tree = {"data": {"source": str(tmp_path / "source")}, "batch": {"norm_by_domain": True, **batch}}
    settings = from_tree(("test", tree))
    if not refused:
        TrainingData.open(settings, processes)
        return
    with pytest.raises(
        DmxError, match=r"batch\.norm_by_domain wants identities of both domains in every micro-"
    ):
        TrainingData.open(settings, processes)
