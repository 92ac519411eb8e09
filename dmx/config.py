"""What a training run is made of: its sections together, recipes of differences, overrides.

A `Config` is a tree of frozen dataclasses. A recipe (YAML) holds only the fields that differ from the
defaults; the command line overrides single fields by their dotted name (`--schedule.epochs 3`, or
`--set schedule.epochs=3`). The resolved configuration is saved with the run and reads back as it was.

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
from dmx.sections import (
    AugmentConfig,
    BatchConfig,
    ClassifierConfig,
    ClusterConfig,
    DataConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    doc,
)
from dmx.settings import assignment, check_limits, convert, flatten, unflatten

# Here, where nothing heavy is imported, because the command line names them.
Launcher = Literal["ray", "torchrun", "srun", "inline"]
LAUNCHERS: tuple[Launcher, ...] = typing.get_args(Launcher)


class _ConflictError(DmxError):
    """Settings that do not fit each other. `from_tree` adds where they were set."""

    def __init__(self, text: str, *names: str) -> None:
        super().__init__(text)
        self.names = names


@dataclass(frozen=True)
class Config:
    """One training run."""

    compat: Literal["official", "fixed"] = doc(
        "fixed", "official reproduces the faults of the published code that change results"
    )
    seed: int = doc(0, "seed of weights, sampling and augmentation", low=0)
    deterministic: bool = doc(
        False,
        "on a GPU, compute in ways that give the same bits every time, where torch has them (slower); on a "
        "CPU runs with one seed on one machine are the same to the bit anyway",
    )
    timeout_s: float = doc(
        1800.0,
        "how long a process waits for the others, in seconds; evaluating by the first process while the "
        "others wait has to fit in",
        low=1,
    )
    on_nan: Literal["stop", "skip"] = doc(
        "stop",
        "what to do at a step whose loss or gradient is not finite, which changes nothing in either case: "
        "end with an error that names its images, or leave it out (but no more than 10 in a row)",
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
    log: LogConfig = field(default_factory=LogConfig)

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
    except RecursionError as error:
        raise DmxError(f"{path}: wanted a mapping of settings, found one nested without end") from error
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
    return "--set", unflatten(assignment(item) for item in items)
