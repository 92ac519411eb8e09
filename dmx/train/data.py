"""What a run trains on: the source and the target as one set of identities, batch by batch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmx.config import Config
from dmx.data.dataset import Dataset, open_dataset
from dmx.data.fingerprint import describe_dataset
from dmx.data.loader import TrainLoader
from dmx.data.sampler import IdentityBatchSampler, quota_sizes
from dmx.data.shards import Split
from dmx.data.transforms import TrainTransform
from dmx.distributed import World
from dmx.errors import DmxError
from dmx.evaluation import require_answers
from dmx.sections import BatchConfig


@dataclass(frozen=True)
class EpochLabels:
    """The pseudo-labels of one epoch.

    Attributes:
        labels: (N,) int64 of the target images, -1 where dropped.
        identities: how many pseudo-identities there are, C.
    """

    labels: Tensor
    identities: int


@dataclass(frozen=True)
class TrainingData:
    """The splits of a run.

    Attributes:
        config: the run's configuration.
        source: labelled images to train on.
        source_labels: (N,) int64, their identities renumbered from 0 to S - 1, -1 where unknown.
        target: unlabelled images to train on; None trains on the source alone.
        tests: name to (query, gallery) of the sets that are reported on.
        datasets: what they are splits of: `source`, `target`, and `test NAME`.
    """

    config: Config
    source: Split
    source_labels: NDArray[np.int64]
    target: Split | None
    tests: dict[str, tuple[Split, Split]]
    datasets: Mapping[str, Dataset] = field(default_factory=dict)

    @classmethod
    def open(cls, config: Config, processes: int = 1) -> TrainingData:
        """Open every data set of the configuration; what is certain to fail later on fails here.

        Raw layouts are read with the cameras of `compat`. An ingested set keeps those it was ingested with:
        for RandPerson as the published code reads it, use `dmx ingest --camera camera`.

        Args:
            config: the resolved configuration.
            processes: how many will train.

        Raises:
            DmxError: naming the data set that is missing, without labels, without a needed split or without
                anything to measure, or the settings that do not fit.
        """
        if config.data.source is None:
            raise DmxError("data.source is missing: wanted a labelled data set")
        _require_settings(config, processes)
        # The published code takes RandPerson's camera without its scene.
        camera = "camera" if config.compat == "official" else "scene"
        datasets = {"source": open_dataset(config.data.source, camera=camera)}
        source = datasets["source"].split("train")
        labels = _numbered(source.identities)
        if labels.max(initial=-1) < 1:
            raise DmxError(
                f"{config.data.source}: wanted labels of at least 2 identities in split train, found fewer"
            )
        target = None
        if config.data.target is not None:
            datasets["target"] = open_dataset(config.data.target, camera=camera)
            target = datasets["target"].split("train")
            if config.cluster.labels == "identities" and target.identities.max(initial=-1) < 0:
                raise DmxError(
                    f"{config.data.target}: cluster.labels is identities, which wants a target with "
                    "identities, found none in split train; leave cluster.labels out to cluster"
                )
            if config.cluster.needs_cameras and target.cameras.max(initial=-1) < 0:
                raise DmxError(
                    f"{config.data.target}: cluster.centre_cameras and cluster.same_camera_share want a "
                    "target with cameras, found none in split train; set them to false and 1"
                )
        sets = {name: open_dataset(path) for name, path in names_of_tests(config.data.tests).items()}
        tests = {name: _sides(dataset) for name, dataset in sets.items()}
        datasets |= {f"test {name}": dataset for name, dataset in sets.items()}
        return cls(config, source, labels, target, tests, datasets)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Of every data set, by what it is to the run, what tells it from what it was before."""
        return {role: describe_dataset(dataset) for role, dataset in self.datasets.items()}

    @property
    def num_source(self) -> int:
        """Identities of the source, S."""
        return int(self.source_labels.max()) + 1

    def true_labels(self) -> Tensor:
        """(N,) int64 identities of the target, numbered from 0; -1 where unknown."""
        assert self.target is not None
        return torch.from_numpy(_numbered(self.target.identities))

    def least_pseudo_identities(self) -> int:
        """How many pseudo-identities a batch wants; with fewer, the same ones would fill every batch."""
        batch = self.config.batch
        return 2 if batch.source_share is None else max(2, _domain_sizes(batch)[1])

    def steps(
        self, epoch: int, first: int, labels: EpochLabels | None, world: World
    ) -> Generator[list[tuple[Tensor, Tensor]]]:
        """This process's micro-batches of the steps from `first` to the epoch's end.

        A batch is dealt out by identities: each micro-batch of each process has its share of both domains.

        Args:
            epoch: number of the epoch.
            first: the first step wanted.
            labels: pseudo-labels of the target; None takes the source alone.
            world: this process among the others.

        Yields:
            For every step, pairs of images (B, 3, H, W) and labels (B,), on this process's device.
        """
        settings = self.config.batch
        sampler = self._sampler(labels)
        parts = settings.accumulation * world.size
        with ExitStack() as stack:
            loaders = [
                stack.enter_context(self._loader(sampler, part * world.size + world.rank, parts))
                for part in range(settings.accumulation)
            ]
            streams = [
                loader.batches(epoch, self.config.schedule.steps_per_epoch, first) for loader in loaders
            ]
            for batches in zip(*streams, strict=True):
                yield [
                    (self._placed(batch["images"], world), batch["label"].to(world.device))
                    for batch in batches
                ]

    def images_of(self, epoch: int, step: int, labels: EpochLabels | None) -> list[str]:
        """The keys of a step's images on all processes, each behind its data set's name."""
        batch = self._sampler(labels).batch(epoch, step)
        splits = [("source", self.source)] + ([] if self.target is None else [("target", self.target)])
        return [
            f"{splits[domain][0]}: {splits[domain][1].keys[row]}"
            for domain, row in zip(batch.domain.tolist(), batch.row.tolist(), strict=True)
        ]

    @staticmethod
    def _placed(images: Tensor, world: World) -> Tensor:
        if world.device.type == "cpu":
            # Convolutions on the CPU are quicker in this layout.
            return images.contiguous(memory_format=torch.channels_last)
        return images.to(world.device, non_blocking=True)

    def _sampler(self, labels: EpochLabels | None) -> IdentityBatchSampler:
        settings = self.config.batch
        splits, by_domain, share = [self.source], [self.source_labels], settings.source_share
        if labels is not None and labels.identities and self.target is not None:
            pseudo = labels.labels.numpy()
            by_domain.append(np.where(pseudo >= 0, pseudo + self.num_source, -1))
            splits.append(self.target)
        quota = None if share is None else (1.0,) if len(splits) == 1 else (share, 1 - share)
        return IdentityBatchSampler(
            by_domain,
            batch_identities=settings.identities,
            instances=settings.instances,
            quota=quota,
            seed=self.config.seed,
            cameras_by_domain=[split.cameras for split in splits],
        )

    def _loader(self, sampler: IdentityBatchSampler, rank: int, parts: int) -> TrainLoader:
        config = self.config
        splits = [self.source] if self.target is None else [self.source, self.target]
        return TrainLoader(
            splits,
            sampler,
            train_transform(config),
            seed=config.seed,
            num_workers=config.data.workers,
            rank=rank,
            world=parts,
        )


def _numbered(identities: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same identities numbered from 0 without gaps; -1 stays."""
    names, numbers = np.unique(identities, return_inverse=True)
    return np.maximum(numbers.astype(np.int64) - int((names < 0).sum()), -1)


def train_transform(config: Config) -> TrainTransform:
    """The augmentation of a run; the published code erases to the raw mean of already normalised images."""
    return TrainTransform(
        config.data.height,
        config.data.width,
        flip=config.augment.flip,
        pad=config.augment.pad,
        erase=config.augment.erase,
        colour_jitter=config.augment.colour_jitter,
        erase_fill="raw" if config.compat == "official" else "normalised",
    )


def shares_batches(config: Config, processes: int) -> bool:
    """Whether this many processes can take equal shares of every batch."""
    return config.batch.identities % (config.batch.accumulation * processes) == 0


def _require_settings(config: Config, processes: int) -> None:
    """What the number of processes makes fail at the first batch fails now."""
    batch = config.batch
    if not shares_batches(config, processes):
        raise DmxError(
            f"batch.identities wants a multiple of batch.accumulation x processes = {batch.accumulation} x "
            f"{processes}, so that each has its share, found {batch.identities}; change one of the three"
        )
    if batch.norm_by_domain:
        _require_both_domains(config, processes)


def _require_both_domains(config: Config, processes: int) -> None:
    """Normalising by domain, every process has to take part in both domains of every micro-batch."""
    batch = config.batch
    parts = batch.accumulation * processes
    sizes = (0,) if batch.source_share is None else _domain_sizes(batch)
    if min(sizes) < parts:
        raise DmxError(
            "batch.norm_by_domain wants identities of both domains in every micro-batch of every process: "
            f"batch.source_share (found {batch.source_share}) has to leave each domain at least "
            f"batch.accumulation x processes = {parts} of the {batch.identities} identities of a batch"
        )


def _domain_sizes(batch: BatchConfig) -> tuple[int, ...]:
    """Identities of source and target in a batch, where neither is empty."""
    assert batch.source_share is not None
    return tuple(quota_sizes((batch.source_share, 1 - batch.source_share), (1, 1), batch.identities))


def names_of_tests(paths: Sequence[str]) -> dict[str, str]:
    """The path of each test set by the name of its folder; by the whole path where names repeat."""
    names = [Path(path).name for path in paths]
    return {name if names.count(name) == 1 else path: path for path, name in zip(paths, names, strict=True)}


def _sides(dataset: Dataset) -> tuple[Split, Split]:
    """Query and gallery of a test set."""
    query, gallery = dataset.split("query"), dataset.split("gallery")
    try:
        require_answers(query, gallery)
    except DmxError as error:
        raise DmxError(f"{dataset.path}: {error}") from error
    return query, gallery
