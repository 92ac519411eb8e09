"""The sections of a run's configuration: every setting with its type, default, unit and limits.

`dmx.config` puts them together, and reads and checks them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Tracker = Literal["tensorboard", "wandb", "mlflow"]


def doc(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help text (unit included) and limits: `low`, `high` (both allowed), of each item."""
    metadata = {"help": text, **limits}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    """The data sets: folders made by `dmx ingest`, or raw known layouts read in place."""

    source: str | None = doc(None, "labelled (synthetic) data set: path")
    target: str | None = doc(None, "unlabelled (real) data set: path; null trains on the source alone")
    tests: tuple[str, ...] = doc((), "data sets with query and gallery, reported only: paths")
    height: int = doc(256, "image height in pixels", low=16)
    width: int = doc(128, "image width in pixels", low=16)
    workers: int = doc(2, "decoding threads of each training process; 0 decodes in line", low=0)


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, pooling and neck."""

    backbone: str = doc(
        "resnet50", "a timm model, a plain ResNet with IBN-a (resnet50_ibn_a) or an OSNet (osnet_x1_0)"
    )
    backbone_args: dict[str, Any] = doc({}, "further arguments of timm.create_model")
    pretrained: bool = doc(False, "start from timm's ImageNet weights (downloads them) where weights is null")
    weights: str | None = doc(None, "start from a local file (--init): safetensors, or a torch state dict")
    pooling: Literal["mean", "gem"] = doc(
        "mean", "over positions: mean, or gem (a generalised mean whose exponent is learned)"
    )
    last_stride: int = doc(1, "stride of the last stage of a ResNet", low=1, high=2)
    discriminator_widths: tuple[int, ...] = doc((1024, 512, 256), "hidden widths of the discriminator", low=1)


@dataclass(frozen=True)
class AugmentConfig:
    """Training-time augmentation."""

    flip: float = doc(0.5, "probability of a horizontal flip", low=0, high=1)
    pad: int = doc(10, "pixels of padding on each side before the random crop", low=0)
    erase: float = doc(0.5, "probability of random erasing", low=0, high=1)
    colour_jitter: float = doc(
        0.0, "probability of another brightness, contrast, saturation and hue; 0 in the paper", low=0, high=1
    )


@dataclass(frozen=True)
class BatchConfig:
    """Identity batches: P identities times K instances, over all workers together."""

    identities: int = doc(16, "identities in a batch (P)", low=2)
    instances: int = doc(4, "images of each identity (K)", low=2)
    source_share: float | None = doc(
        0.5,
        "share of the identities that come from the source; null draws from both sets uniformly",
        low=0,
        high=1,
    )
    accumulation: int = doc(1, "micro-batches a step (gradient accumulation)", low=1)
    norm_by_domain: bool = doc(
        False, "while training, batch normalisation takes the statistics of each domain by itself"
    )


@dataclass(frozen=True)
class ClusterConfig:
    """Pseudo-labels; the defaults are the paper's."""

    labels: Literal["clusters", "identities"] = doc(
        "clusters",
        "identities takes the target's own instead of clusters: what the method would reach with labels",
    )
    centre_cameras: bool = doc(
        False, "take the mean feature of each camera from its images before they are clustered"
    )
    same_camera_share: float = doc(
        1.0,
        "largest share that its own camera may have of an image's neighbours; 1 is no limit",
        low=0,
        high=1,
    )
    k1: int = doc(30, "neighbours of k-reciprocal encoding, the image itself included", low=1)
    k2: int = doc(6, "neighbours of query expansion, the image itself included", low=1)
    eps: float = doc(0.6, "DBSCAN radius in Jaccard distance", low=0, high=1)
    eps_gap: float = doc(0.02, "distance of the tight and the loose radius from eps", low=0, high=1)
    min_samples: int = doc(4, "DBSCAN core points have this many neighbours, themselves included", low=1)
    min_cluster_size: int = doc(5, "smaller pseudo-identities are dropped", low=1)
    knn: Literal["exact", "ivf"] = doc(
        "exact", "nearest neighbours: exact, or faiss's inverted lists, whose recall is measured and printed"
    )
    ivf_probes: int | None = doc(None, "lists that ivf searches; null as suits the number of images", low=1)

    @property
    def needs_cameras(self) -> bool:
        """Whether clustering asks which camera took an image."""
        return self.centre_cameras or self.same_camera_share < 1


@dataclass(frozen=True)
class ScheduleConfig:
    """Epochs, steps and learning rate."""

    epochs: int = doc(60, "epochs in all", low=1)
    steps_per_epoch: int = doc(2000, "optimiser steps an epoch", low=1)
    source_epochs: int = doc(
        0, "first epochs on the source alone, so that clustering starts from usable features", low=0
    )
    stage_two_epoch: int = doc(30, "first epoch (from 0) of the adversarial stage", low=0)
    discriminator_every: int = doc(10, "in stage two, every n-th step trains the discriminator", low=2)
    warmup_epochs: int = doc(10, "epochs over which the learning rate grows linearly", low=0)
    warmup_factor: float = doc(0.01, "learning rate at the first epoch, as a share of lr", low=0, high=1)
    milestones: tuple[int, ...] = doc((40, 70), "epochs at which the learning rate falls by gamma", low=0)
    gamma: float = doc(0.1, "factor of each milestone", low=0, high=1)
    evaluate_every: int = doc(1, "epochs between reports on the test sets; the last always reports", low=1)
    checkpoint_every_steps: int = doc(
        500, "steps between checkpoints within an epoch; 0 writes them at the end of epochs only", low=0
    )
    keep_checkpoints: int = doc(2, "how many of the last checkpoints stay on the disk", low=1)
    keep_clusters: int | None = doc(
        None,
        "of how many of the last epochs the clusters stay, for `dmx report`: 6 MB an epoch for a million "
        "images; null keeps all, 0 none",
        low=0,
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, precision and sharding."""

    lr: float = doc(3.5e-4, "learning rate", low=0)
    weight_decay: float = doc(5e-4, "L2 penalty added to the gradient (Adam, not AdamW)", low=0)
    clip_norm: float = doc(0.0, "gradient norm limit; 0 does not clip", low=0)
    precision: Literal["fp32", "bf16", "auto"] = doc(
        "fp32", "arithmetic of forward and backward passes; auto is bf16 where the hardware computes in it"
    )
    zero_stage: int = doc(1, "DeepSpeed ZeRO stage", low=0, high=3)


@dataclass(frozen=True)
class ClassifierConfig:
    """Rows (class weights) of the identity classifier."""

    precision: Literal["fp32", "bf16"] = doc(
        "fp32",
        "bf16 multiplies rows in bfloat16 and keeps beside them the bits that float32 has more, for the "
        "updates; either takes 12 bytes a weight, moments included",
    )
    block_mb: float | None = doc(
        None,
        "MiB of temporaries: logits and gradients exist for as many classes at a time as fit in; null is 4 "
        "on a CPU, whose caches hold that, and 1024 on a GPU",
        low=0.001,
    )


@dataclass(frozen=True)
class LossConfig:
    """Weights and constants of the losses."""

    identity_weight_stage_one: float = doc(10.0, "weight of cross-entropy in stage one", low=0)
    identity_weight_stage_two: float = doc(1.0, "weight of cross-entropy in stage two", low=0)
    label_smoothing: float = doc(0.1, "label smoothing of cross-entropy", low=0, high=1)
    logit_scale: float = doc(0.5, "identity logits are multiplied by this", low=0)
    triplet_weight: float = doc(1.0, "weight of the soft triplet loss", low=0)
    triplet_margin: float = doc(0.0, "margin of the soft triplet loss", low=0, high=1)
    balance_weight: float = doc(
        1.0, "weight of the domain balance loss in stage two; 0 trains no discriminator", low=0
    )


@dataclass(frozen=True)
class LogConfig:
    """Who follows the run, beside its own logs."""

    trackers: tuple[Tracker, ...] = doc(
        ("tensorboard",), "who gets the settings, the losses of every step and the results of every epoch"
    )
    project: str | None = doc(
        None,
        "project of W&B and experiment of MLflow; null is what WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says, "
        "or else dmx",
    )
