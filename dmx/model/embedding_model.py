"""The embedding model: backbone, pooling, BNNeck."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from dmx.model.backbone import build_backbone
from dmx.model.pooling import POOLINGS, MeanPooling
from dmx.model.weights import load_weights

if TYPE_CHECKING:
    from dmx.sections import ModelConfig


class EmbeddingModel(nn.Module):
    """Images to features: `f` for the triplet loss, `b = BN(f)` for classifiers, `b / ||b||` for retrieval.

    The neck's bias stays 0, so that its classifier's decision planes pass through the origin and angles
    mean the same in training and in retrieval.

    Source: Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPRW 2019.
    """

    def __init__(self, backbone: nn.Module, pooling: MeanPooling | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = MeanPooling() if pooling is None else pooling
        # Some heads widen what the last stage gives (MobileNetV3: 576 to 1024).
        self.width = int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]
        self.neck = nn.BatchNorm1d(self.width)
        self.neck.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (f, b).

        Args:
            images: (N, 3, H, W), normalised.

        Returns:
            f: (N, D) pooled features, b: (N, D) the same after the neck.
        """
        f = pooled(self, images)
        return f, self.neck(f)

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings for retrieval: b / ||b||, (N, D) of unit rows.

        The module's mode is the caller's: `eval()` first, or the neck normalises by the batch.
        """
        _, b = self(images)
        return F.normalize(b, dim=1)


class Retrieval(nn.Module):
    """A trained model as other tools call it: normalised images (N, 3, H, W) to unit embeddings (N, D).

    It shares the model's weights, under the names that they have in `model.safetensors`.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        self.backbone, self.pooling, self.neck = model.backbone, model.pooling, model.neck
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return F.normalize(self.neck(pooled(self, images)), dim=1)


def pooled(model: EmbeddingModel | Retrieval, images: Tensor) -> Tensor:
    """Features (N, D) of images (N, 3, H, W) before the neck."""
    backbone = model.backbone
    features: Tensor = model.pooling(
        backbone(images),
        channels_last=str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"),
        prefix=int(getattr(backbone, "num_prefix_tokens", 0)),
    )
    return features


def build_model(config: ModelConfig) -> EmbeddingModel:
    """Build the model that `config` describes.

    Weights that are not loaded are drawn from torch's global generator: seed it first.

    Raises:
        DmxError: unknown backbone, or arguments or weights that do not fit it.
    """
    model = EmbeddingModel(build_backbone(config), POOLINGS[config.pooling]())
    if config.weights:
        load_weights(model, config.weights, config.backbone)
    return model
