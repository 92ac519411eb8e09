"""Runs of training side by side: prepared, and held against each other to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dmx.config import from_tree
from dmx.model import build_model
from dmx.train.checkpoint import Progress, latest, write_checkpoint
from dmx.train.clusters import cluster_files
from dmx.train.runlog import STEPS, describe_run, read_lines


def prepare(run: Path, settings: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """A run folder of `settings`, with those of some sections changed."""
    tree = copy.deepcopy(settings)
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    describe_run(run, from_tree(("test", tree)))
    return run


def write_run(folder: Path, settings: dict[str, Any], seed: int) -> Path:
    """A checkpoint of an untrained model, whose statistics are those of some images."""
    config = from_tree(("test", {name: settings[name] for name in ("model", "data")}))
    torch.manual_seed(seed)
    model = build_model(config.model)
    model(torch.randn(64, 3, config.data.height, config.data.width))
    write_checkpoint(folder, Progress(seed=0), config, {"model": model.state_dict()}, keep=1)
    return folder


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
