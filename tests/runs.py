"""Runs of training side by side: prepared, and held against each other to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dmx.config import from_tree
from dmx.train.checkpoint import latest
from dmx.train.clusters import cluster_files
from dmx.train.runlog import STEPS, describe_run, read_lines


def prepare(run: Path, settings: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """A run folder of `settings`, with those of some sections changed."""
    tree = copy.deepcopy(settings)
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    describe_run(run, from_tree(("test", tree)))
    return run


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the latest checkpoint, by file and name."""
    folder = latest(run)
    assert folder is not None
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def losses_of(run: Path) -> list[float]:
    """The loss of every step."""
    return [line.get("loss", line.get("domain")) for line in read_lines(run / STEPS)]


def clusters_of(run: Path) -> dict[str, bytes]:
    """The files of the clusters that were kept."""
    return {file.name: file.read_bytes() for file in cluster_files(run).values()}


def assert_bit_identical(run: Path, other: Path) -> None:
    """Parameters, buffers, moments, classifier rows, every logged loss and every epoch's clusters."""
    a, b = tensors_of(run), tensors_of(other)
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing
    assert losses_of(run) == losses_of(other)
    assert clusters_of(run) == clusters_of(other)
