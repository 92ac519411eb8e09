"""What a training run is made of: typed, documented fields, recipes of differences, overrides.

A `Config` is a tree of frozen dataclasses. A recipe (YAML) holds only the fields that differ from the
defaults; the command line overrides single fields by their dotted name (`schedule.epochs=3`). The resolved
configuration is saved with the run and reads back as it was.

Relative paths, those in a recipe too, start from the folder in which the command runs; the saved ones are
absolute.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dmx.errors import DmxError
from dmx.settings import check_limits, convert, flatten, unflatten

# Here, where nothing heavy is imported, because the command line names them.
Launcher = Literal["ray", "torchrun", "srun", "inline"]
LAUNCHERS: tuple[Launcher, ...] = typing.get_args(Launcher)


class _ConflictError(DmxError):
    """Settings that do not fit each other. `from_tree` adds where they were set."""

    def __init__(self, text: str, *names: str) -> None:
        super().__init__(text)
        self.names = names


def _doc(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help text (unit included) and limits: `low`, `high` (both allowed), of each item."""
    metadata = {"help": text, **limits}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    """The data sets: folders made by `dmx ingest`, or raw known layouts read in place."""

    source: str | None = _doc(None, "labelled (synthetic) data set: path")
    target: str | None = _doc(None, "unlabelled (real) data set: path; null trains on the source alone")
    tests: tuple[str, ...] = _doc((), "data sets with query and gallery, reported only: paths")
    height: int = _doc(256, "image height in pixels", low=16)
    width: int = _doc(128, "image width in pixels", low=16)
    workers: int = _doc(2, "decoding threads of each training process; 0 decodes in line", low=0)


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, pooling and neck."""

    backbone: str = _doc("resnet50", "timm model, or a ResNet with IBN-a such as resnet50_ibn_a")
    backbone_args: dict[str, Any] = _doc({}, "further arguments of timm.create_model")
    pretrained: bool = _doc(False, "start from timm's ImageNet weights (downloads them)")
    weights: str | None = _doc(None, "start from a local file: safetensors, or a torch state dict")
    last_stride: int = _doc(1, "stride of the last stage of a ResNet", low=1, high=2)
    discriminator_widths: tuple[int, ...] = _doc(
        (1024, 512, 256), "hidden widths of the discriminator", low=1
    )


@dataclass(frozen=True)
class AugmentConfig:
    """Training-time augmentation."""

    flip: float = _doc(0.5, "probability of a horizontal flip", low=0, high=1)
    pad: int = _doc(10, "pixels of padding on each side before the random crop", low=0)
    erase: float = _doc(0.5, "probability of random erasing", low=0, high=1)


@dataclass(frozen=True)
class BatchConfig:
    """Identity batches: P identities times K instances, over all workers together."""

    identities: int = _doc(16, "identities in a batch (P)", low=2)
    instances: int = _doc(4, "images of each identity (K)", low=2)
    source_share: float | None = _doc(
        0.5,
        "share of the identities that come from the source; null draws from both sets uniformly",
        low=0,
        high=1,
    )
    accumulation: int = _doc(1, "micro-batches a step (gradient accumulation)", low=1)
    norm_by_domain: bool = _doc(
        False, "while training, batch normalisation takes the statistics of each domain by itself"
    )


@dataclass(frozen=True)
class ClusterConfig:
    """Pseudo-labels; the defaults are the paper's."""

    labels: Literal["clusters", "identities"] = _doc(
        "clusters",
        "identities takes the target's own instead of clusters: what the method would reach with labels",
    )
    centre_cameras: bool = _doc(
        False, "take the mean feature of each camera from its images before they are clustered"
    )
    same_camera_share: float = _doc(
        1.0,
        "largest share that its own camera may have of an image's neighbours; 1 is no limit",
        low=0,
        high=1,
    )
    k1: int = _doc(30, "neighbours of k-reciprocal encoding, the image itself included", low=1)
    k2: int = _doc(6, "neighbours of query expansion, the image itself included", low=1)
    eps: float = _doc(0.6, "DBSCAN radius in Jaccard distance", low=0, high=1)
    eps_gap: float = _doc(0.02, "distance of the tight and the loose radius from eps", low=0, high=1)
    min_samples: int = _doc(4, "DBSCAN core points have this many neighbours, themselves included", low=1)
    min_cluster_size: int = _doc(5, "smaller pseudo-identities are dropped", low=1)
    knn: Literal["exact", "ivf"] = _doc(
        "exact", "nearest neighbours: exact, or faiss's inverted lists, whose recall is measured and printed"
    )
    ivf_probes: int | None = _doc(None, "lists that ivf searches; null as suits the number of images", low=1)

    @property
    def needs_cameras(self) -> bool:
        """Whether clustering asks which camera took an image."""
        return self.centre_cameras or self.same_camera_share < 1


@dataclass(frozen=True)
class ScheduleConfig:
    """Epochs, steps and learning rate."""

    epochs: int = _doc(60, "epochs in all", low=1)
    steps_per_epoch: int = _doc(2000, "optimiser steps an epoch", low=1)
    source_epochs: int = _doc(
        0, "first epochs on the source alone, so that clustering starts from usable features", low=0
    )
    stage_two_epoch: int = _doc(30, "first epoch (from 0) of the adversarial stage", low=0)
    discriminator_every: int = _doc(10, "in stage two, every n-th step trains the discriminator", low=2)
    warmup_epochs: int = _doc(10, "epochs over which the learning rate grows linearly", low=0)
    warmup_factor: float = _doc(0.01, "learning rate at the first epoch, as a share of lr", low=0, high=1)
    milestones: tuple[int, ...] = _doc((40, 70), "epochs at which the learning rate falls by gamma", low=0)
    gamma: float = _doc(0.1, "factor of each milestone", low=0, high=1)
    evaluate_every: int = _doc(1, "epochs between reports on the test sets; the last always reports", low=1)
    checkpoint_every_steps: int = _doc(
        500, "steps between checkpoints within an epoch; 0 writes them at the end of epochs only", low=0
    )
    keep_checkpoints: int = _doc(2, "how many of the last checkpoints stay on the disk", low=1)
    keep_clusters: int | None = _doc(
        None, "of how many last epochs clusters stay, 6 MB a million images; null keeps all, 0 none", low=0
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, precision and sharding."""

    lr: float = _doc(3.5e-4, "learning rate", low=0)
    weight_decay: float = _doc(5e-4, "L2 penalty added to the gradient (Adam, not AdamW)", low=0)
    clip_norm: float = _doc(0.0, "gradient norm limit; 0 does not clip", low=0)
    precision: Literal["fp32", "bf16", "auto"] = _doc(
        "fp32", "arithmetic of forward and backward passes; auto is bf16 where the hardware computes in it"
    )
    zero_stage: int = _doc(1, "DeepSpeed ZeRO stage", low=0, high=3)


@dataclass(frozen=True)
class ClassifierConfig:
    """Rows (class weights) of the identity classifier."""

    precision: Literal["fp32", "bf16"] = _doc(
        "fp32",
        "bf16 multiplies rows in bfloat16 and keeps beside them the bits that float32 has more, for the "
        "updates; either takes 12 bytes a weight, moments included",
    )
    block_mb: float | None = _doc(
        None,
        "MiB of temporaries: logits and gradients exist for as many classes at a time as fit in; null is 4 "
        "on a CPU, whose caches hold that, and 1024 on a GPU",
        low=0.001,
    )


@dataclass(frozen=True)
class LossConfig:
    """Weights and constants of the losses."""

    identity_weight_stage_one: float = _doc(10.0, "weight of cross-entropy in stage one", low=0)
    identity_weight_stage_two: float = _doc(1.0, "weight of cross-entropy in stage two", low=0)
    label_smoothing: float = _doc(0.1, "label smoothing of cross-entropy", low=0, high=1)
    logit_scale: float = _doc(0.5, "identity logits are multiplied by this", low=0)
    triplet_weight: float = _doc(1.0, "weight of the soft triplet loss", low=0)
    triplet_margin: float = _doc(0.0, "margin of the soft triplet loss", low=0, high=1)
    balance_weight: float = _doc(
        1.0, "weight of the domain balance loss in stage two; 0 trains no discriminator", low=0
    )


@dataclass(frozen=True)
class Config:
    """One training run."""

    compat: Literal["official", "fixed"] = _doc(
        "fixed", "official reproduces the faults of the published code that change results"
    )
    seed: int = _doc(0, "seed of weights, sampling and augmentation", low=0)
    timeout_s: float = _doc(
        1800.0,
        "how long a process waits for the others, in seconds; evaluating by the first process while the "
        "others wait has to fit in",
        low=1,
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if self.compat == "official" and self.batch.source_share is not None:
            if self.batch.source_share != BatchConfig.source_share:
                raise _quota_of_official(self.batch.source_share)
            object.__setattr__(self, "batch", dataclasses.replace(self.batch, source_share=None))
        _check_radii(self.cluster)
        _check_stages(self.schedule)


def _quota_of_official(share: Any) -> _ConflictError:
    return _ConflictError(
        f"batch.source_share is {share!r} and compat is official: the published sampler has no quota; leave "
        "batch.source_share out, or choose compat fixed",
        "batch.source_share",
        "compat",
    )


def _check_radii(cluster: ClusterConfig) -> None:
    eps, gap = cluster.eps, cluster.eps_gap
    if not 0 < eps < 1:
        raise _ConflictError(
            f"cluster.eps: wanted a number between 0 and 1, both excluded, found {eps}", "cluster.eps"
        )
    # On the decimal grid of dmx.cluster, where 0.3 - 0.2 is the number written 0.1.
    if not (round(eps - gap, 12) > 0 and round(eps + gap, 12) < 1):
        raise _ConflictError(
            f"cluster.eps_gap: wanted eps - eps_gap > 0 and eps + eps_gap < 1, found {eps} and {gap}",
            "cluster.eps",
            "cluster.eps_gap",
        )


def _check_stages(schedule: ScheduleConfig) -> None:
    if schedule.stage_two_epoch < schedule.source_epochs:
        raise _ConflictError(
            f"schedule.stage_two_epoch {schedule.stage_two_epoch} lies within the first "
            f"{schedule.source_epochs} epochs on the source alone (schedule.source_epochs): stage two wants "
            "both domains, so begin it later",
            "schedule.stage_two_epoch",
            "schedule.source_epochs",
        )


def field_types(cls: type) -> dict[str, Any]:
    """Name to type of every field of a configuration dataclass."""
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def leaves(cls: type = Config, prefix: str = "") -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Dotted name to (type, field) of every setting, in the order of the file."""
    found: dict[str, tuple[Any, dataclasses.Field[Any]]] = {}
    hints = field_types(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            found |= leaves(typing.cast(type, kind), f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = (kind, item)
    return found


def _build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    arguments: dict[str, Any] = {}
    for name, kind in field_types(cls).items():
        if dataclasses.is_dataclass(kind):
            arguments[name] = _build(typing.cast(type, kind), values, f"{prefix}{name}.")
        elif prefix + name in values:
            arguments[name] = values[prefix + name]
    return cls(**arguments)


def from_tree(*layers: tuple[str, Mapping[str, Any]]) -> Config:
    """Build a configuration from layers of differences, later ones winning.

    Args:
        layers: pairs of (where it comes from, for error messages; nested mapping of settings).

    Raises:
        DmxError: for an unknown setting, a value of the wrong type or outside its limits, and settings that
            do not fit each other.
    """
    known = leaves()
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, tree in layers:
        for name, value in flatten(tree, known, origin).items():
            kind, item = known[name]
            values[name] = convert(value, kind, name, origin)
            check_limits(values[name], item, name, origin)
            origins[name] = origin
    try:
        if values.get("compat") == "official":
            # Here a quota that was asked for can be told from the default.
            quota = values.setdefault("batch.source_share", None)
            if quota is not None:
                raise _quota_of_official(quota)
        config: Config = _build(Config, values)
    except _ConflictError as conflict:
        where = dict.fromkeys(origins[name] for name in conflict.names if name in origins)
        raise DmxError(f"{', '.join(where)}: {conflict}") from conflict
    return config


def with_absolute_paths(config: Config) -> Config:
    """The same configuration for a process in any folder: relative paths start from the current one."""
    data = dataclasses.replace(
        config.data,
        source=_absolute(config.data.source),
        target=_absolute(config.data.target),
        tests=tuple(_absolute(path) for path in config.data.tests),
    )
    model = dataclasses.replace(config.model, weights=_absolute(config.model.weights))
    return dataclasses.replace(config, data=data, model=model)


@typing.overload
def _absolute(path: str) -> str: ...
@typing.overload
def _absolute(path: None) -> None: ...
def _absolute(path: str | None) -> str | None:
    """An absolute path; a URI stays as it is."""
    return path if path is None or "://" in path else str(Path(path).expanduser().absolute())


def to_tree(config: Config) -> dict[str, Any]:
    """The configuration as nested plain mappings, ready for YAML and JSON."""
    tree: dict[str, Any] = dataclasses.asdict(config)
    return typing.cast(dict[str, Any], yaml.safe_load(yaml.safe_dump(_plain(tree))))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted name to (old, new) of every setting in which two configurations differ."""
    known = leaves()
    before, after = (flatten(to_tree(config), known, "configuration") for config in (old, new))
    return {name: (before[name], after[name]) for name in known if before[name] != after[name]}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises DmxError when the file is missing, broken or no mapping."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DmxError(f"{path}: wanted a YAML file, found: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise DmxError(f"{path}: wanted a mapping of settings, found {type(tree).__name__}")
    return tree


def recipe_names() -> list[str]:
    """The recipes that come with DMX."""
    folder = importlib.resources.files("dmx.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe(name: str) -> tuple[str, dict[str, Any]]:
    """A layer for `from_tree`: a recipe by the name of one that comes with DMX, or by its path."""
    if name in recipe_names():
        with importlib.resources.as_file(importlib.resources.files("dmx.recipes") / f"{name}.yaml") as path:
            return f"recipe {name}", read_yaml(path)
    if not Path(name).is_file():
        raise DmxError(f"there is no recipe {name}: wanted a YAML file or one of {', '.join(recipe_names())}")
    return name, read_yaml(Path(name))


def overrides(items: list[str]) -> tuple[str, dict[str, Any]]:
    """A layer from the command line: `name=value` with dotted names and YAML values."""
    values: list[tuple[str, Any]] = []
    for item in items:
        name, sign, text = item.partition("=")
        if not sign:
            raise DmxError(f"--set wants name=value, found {item!r}")
        try:
            values.append((name, yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise DmxError(f"--set {name}: {text!r} is no YAML value") from error
    return "--set", unflatten(values)
