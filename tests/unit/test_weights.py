"""Weights from files: every tensor in its place, whichever tool named it; and what does not fit is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from networks import narrow
from safetensors.torch import save_file
from torch import Tensor, nn

from dmx.errors import DmxError
from dmx.model import EmbeddingModel, build_model
from dmx.model.backbone import build_backbone
from dmx.model.weights import load_weights
from dmx.sections import ModelConfig


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def used(module: nn.Module) -> nn.Module:
    """With statistics unlike a new one's."""
    with torch.no_grad():
        module.train()(torch.randn(8, 3, 64, 32))
    return module.eval()


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "model.backbone."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_backbone(tmp_path: Path, prefix: str, suffix: str) -> None:
    donor = narrow(backbone="resnet18_ibn_a")
    state = {prefix + key: value for key, value in donor.backbone.state_dict().items()}
    state["module.fc.weight" if prefix.startswith("module.") else "fc.weight"] = torch.zeros(7, 32)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    torch.manual_seed(1)
    loaded = narrow(backbone="resnet18_ibn_a", weights=str(path))
    for key, value in donor.backbone.state_dict().items():
        torch.testing.assert_close(loaded.backbone.state_dict()[key], value, rtol=0, atol=0)


def test_a_model_of_dmx_brings_its_neck(tmp_path: Path) -> None:
    donor = used(narrow())
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    found = narrow(weights=str(tmp_path / "model.safetensors")).eval()
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(found(images)[1], donor(images)[1], rtol=0, atol=0)


class Published(nn.Module):
    """A ResNet-18 with BNNeck and classifier, under the names that `layout` has for them.

    Sources: dg/models/resnet.py of DomainMix (WangWenhao0716/DomainMix), mmt/models/resnet.py of MMT
    (yxgeee/MMT), openunreid/models/builder.py and layers/embedding.py of OpenUnReID (open-mmlab/OpenUnReID),
    modeling/baseline.py of Bag of Tricks (michuanhaohao/reid-strong-baseline).
    """

    def __init__(self, layout: str) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        stages = [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
        del resnet.fc
        neck = nn.BatchNorm1d(512)
        if layout == "DomainMix":
            self.base = nn.Sequential(resnet.conv1, resnet.bn1, resnet.maxpool, resnet.relu, *stages)
            self.feat_bn = neck
            self.classifier_D = nn.Sequential(nn.Linear(512, 64), nn.BatchNorm1d(64))
        elif layout == "MMT":
            self.base = nn.Sequential(resnet.conv1, resnet.bn1, resnet.maxpool, *stages)
            self.feat_bn = neck
        elif layout == "OpenUnReID":
            self.backbone = resnet
            self.head = nn.Module()
            self.head.feat_bn = neck
        else:
            self.base = resnet
            self.bottleneck = neck
        self.classifier = nn.Linear(512, 7, bias=False)
        self.parts = (resnet, neck)

    def state(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.state_dict().items() if not key.startswith("parts")}

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """f and b, as torchvision computes them."""
        resnet, neck = self.parts
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
        f = resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x)))).mean((2, 3))
        return f, neck(f)


@pytest.mark.parametrize("layout", ["DomainMix", "MMT", "OpenUnReID", "Bag of Tricks"])
def test_published_checkpoints(layout: str, tmp_path: Path) -> None:
    """By `nn.DataParallel`, with a score of NumPy's; OpenUnReID's with a student beside the teacher."""
    theirs = Published(layout)
    with torch.no_grad():
        theirs.train().features(torch.randn(8, 3, 64, 32))
    theirs.eval()
    state = {f"module.{key}": value for key, value in theirs.state().items()}
    saved: dict[str, Any] = {"state_dict": state, "epoch": 60, "best_mAP": np.float64(0.5)}
    if layout == "OpenUnReID":
        teacher = {key.replace("module.", "module.mean_net."): value for key, value in state.items()}
        student = {key.replace("mean_net", "net"): torch.zeros_like(value) for key, value in teacher.items()}
        saved = {"state_dict_1": student | teacher, "epoch": 60, "best_mAP": np.float32(0.5)}
    torch.save(saved, tmp_path / "checkpoint.pth.tar")
    model = EmbeddingModel(build_backbone(ModelConfig(backbone="resnet18", last_stride=2)))
    loaded = load_weights(model, tmp_path / "checkpoint.pth.tar", "resnet18")
    assert (loaded.backbone, loaded.neck) == (120, True)
    assert any(key.endswith("classifier.weight") for key in loaded.left_out)
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(model.eval()(images), theirs.features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zipped", [True, False])
def test_scores_of_numpy_before_2(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As old files name them, in both formats of torch's."""
    state = narrow().backbone.state_dict()
    content = {"state_dict": state, "rank1": np.float32(0.5), "best": np.float64(1), "n": np.int64(3)}
    monkeypatch.setattr(np._core.multiarray.scalar, "__module__", "numpy.core.multiarray", raising=False)
    torch.save(content, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    loaded = narrow(weights=str(tmp_path / "w.pth.tar"))
    assert torch.equal(loaded.backbone.state_dict()["conv1.weight"], state["conv1.weight"])


class Payload:
    """What a hostile pickle is."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def test_a_file_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": narrow().backbone.state_dict(), "extra": Payload(tmp_path / "made")}, path)
    with pytest.raises(DmxError, match=r"cannot be read as weights alone: .*mkdir.*save its weights"):
        narrow(weights=str(path))
    assert not (tmp_path / "made").exists()


def test_a_neck_with_a_trained_bias_is_left_out(tmp_path: Path) -> None:
    state = narrow().state_dict()
    state["neck.bias"] = torch.ones(32)
    save_file(state, tmp_path / "w.safetensors")
    model = narrow()
    loaded = load_weights(model, tmp_path / "w.safetensors", "resnet18")
    assert not loaded.neck
    assert "neck.bias" in loaded.left_out
    assert not model.neck.bias.any()
    assert (
        "126 tensors of the backbone, no neck; left out: neck.num_batches_tracked, neck.bias"
        in loaded.told("w")
    )


def test_a_part_that_the_backbone_lacks_is_left_out_and_told(tmp_path: Path) -> None:
    state = narrow().backbone.state_dict()
    save_file({**state, "NL_2.0.g.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    loaded = load_weights(narrow(), tmp_path / "w.safetensors", "resnet18")
    assert loaded.left_out == ["NL_2.0.g.weight"]
    assert loaded.told("w").endswith("left out: NL_2.0.g.weight")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = narrow().backbone.state_dict()
    save_file(state, path)
    with pytest.raises(DmxError, match=r"lacks layer1\.0\.bn1\.IN\.weight"):
        narrow(backbone="resnet18_ibn_a", weights=str(path))
    with pytest.raises(DmxError, match=r"conv1.*instead of"):
        narrow(backbone_args={"channels": (4, 16, 24, 32)}, weights=str(path))
    save_file({**state, "layer1.7.conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(DmxError, match=r"no place for layer1\.7\.conv1\.weight"):
        narrow(weights=str(path))
    save_file({"backbone.bn1.dsbn.0.weight": torch.zeros(1)}, path)
    with pytest.raises(DmxError, match="statistics for several domains"):
        narrow(weights=str(path))
    path.write_bytes(b"not weights")
    with pytest.raises(DmxError, match=r"cannot be read"):
        narrow(weights=str(path))
    with pytest.raises(DmxError, match="no such file"):
        narrow(weights=str(tmp_path / "none.pth"))
    with pytest.raises(DmxError, match=r"a folder: give the model\.safetensors in it"):
        narrow(weights=str(tmp_path))
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(DmxError, match="a mapping of names to tensors"):
        narrow(weights=str(tmp_path / "tensor.pth"))


def test_own_weights_go_before_those_of_timm(tmp_path: Path) -> None:
    """A recipe that wants ImageNet weights takes them from a file, whatever timm could download."""
    donor = narrow(backbone="resnet18_ibn_a")
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    found = narrow(backbone="resnet18_ibn_a", pretrained=True, weights=str(tmp_path / "w.safetensors"))
    for key, value in donor.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value)


@pytest.mark.parametrize("fitting", ["resnet34", "resnet101_ibn_a", "legacy_seresnet50", "osnet_ain_x0_5"])
def test_the_backbone_that_would_fit_is_named(fitting: str, tmp_path: Path) -> None:
    if fitting.startswith("legacy"):
        donor = timm.create_model(fitting, num_classes=5)
    else:
        donor = build_backbone(ModelConfig(backbone=fitting))
    save_file(
        {f"backbone.{key}": value for key, value in donor.state_dict().items()}, tmp_path / "w.safetensors"
    )
    with pytest.raises(DmxError, match=f"it fits --set model.backbone={fitting}$"):
        build_model(ModelConfig(backbone="resnet50", weights=str(tmp_path / "w.safetensors")))
