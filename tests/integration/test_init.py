"""`dmx train --init`: training starts from a file of weights, and one that does not fit starts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from dmx.cli import main
from dmx.config import from_tree
from dmx.model import build_model
from dmx.train.checkpoint import load_model


@pytest.fixture
def command(tmp_path: Path, tiny_settings: dict[str, Any]) -> list[str]:
    """One step at a rate that changes nothing."""
    schedule = {"epochs": 1, "steps_per_epoch": 1, "source_epochs": 1, "warmup_epochs": 1}
    settings = {
        **tiny_settings,
        "schedule": {**tiny_settings["schedule"], **schedule},
        "optim": {"lr": 1e-9},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    recipe = ["--recipe", str(tmp_path / "recipe.yaml")]
    return ["train", "--run", str(tmp_path / "run"), "--launcher", "inline", *recipe]


def test_training_starts_from_a_checkpoint_of_torchreids_kind(
    command: list[str], tmp_path: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_tree(("test", {"model": tiny_settings["model"]}))
    torch.manual_seed(7)
    donor = build_model(config.model).backbone
    state = {f"module.{name}": value for name, value in donor.state_dict().items()}
    state["module.classifier.weight"] = torch.zeros(751, 64)
    torch.save({"state_dict": state, "epoch": 60, "rank1": np.float32(0.9)}, tmp_path / "model.pth.tar-60")
    assert main([*command, "--init", str(tmp_path / "model.pth.tar-60")]) == 0
    said = capsys.readouterr().out
    assert (
        f"{len(donor.state_dict())} tensors of the backbone, no neck; left out: module.classifier.weight"
        in said
    )
    model, saved = load_model(tmp_path / "run")
    assert saved.model.weights == str(tmp_path / "model.pth.tar-60")
    for name, value in donor.named_parameters():
        torch.testing.assert_close(model.backbone.get_parameter(name), value, rtol=0, atol=1e-6)


def test_a_recipe_that_asks_for_weights_takes_a_file(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those with IBN-a do, for which timm has none to download."""
    model = {"backbone": "resnet18_ibn_a", "backbone_args": {"channels": [8, 8, 8, 8]}}
    donor = build_model(from_tree(("test", {"model": model})).model).backbone
    torch.save(donor.state_dict(), tmp_path / "ibn.pth")
    words = [f"model.{name}={value}" for name, value in {**model, "pretrained": "true"}.items()]
    asking = [*command, *(word for setting in words for word in ("--set", setting))]
    assert main(asking) == 2
    assert "name the file in model.weights (--init)" in capsys.readouterr().err
    assert main([*asking, "--init", str(tmp_path / "ibn.pth")]) == 0
    found, _ = load_model(tmp_path / "run")
    for name, value in donor.named_parameters():
        torch.testing.assert_close(found.backbone.get_parameter(name), value, rtol=0, atol=1e-6)


def test_a_file_that_does_not_fit_begins_no_run(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert main([*command, "--init", str(tmp_path / "other.safetensors")]) == 2
    assert "nothing in it fits the backbone resnet10t: wanted conv1.0.weight" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--init", str(tmp_path / "none.pth")]) == 2
    assert (
        "none.pth: wanted a .safetensors file or a torch state dict, found no such file"
        in capsys.readouterr().err
    )
