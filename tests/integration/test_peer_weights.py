"""Checkpoints that torchreid and FastReID themselves save are starting points, with the same features."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
import torch

from dmx.errors import DmxError
from dmx.model import EmbeddingModel, build_model
from dmx.model.weights import Loaded, load_weights
from dmx.sections import ModelConfig

TORCHREID = {
    "resnet50_fc512": ("resnet50", 1, {"fc", "classifier"}),
    "resnet50_ibn_a": ("resnet50_ibn_a", 2, {"classifier"}),
    "se_resnet50": ("legacy_seresnet50", 2, {"classifier"}),
    "osnet_x0_5": ("osnet_x0_5", 1, {"fc", "classifier"}),
    "osnet_ibn_x1_0": ("osnet_ibn_x1_0", 1, {"fc", "classifier"}),
    "osnet_ain_x0_25": ("osnet_ain_x0_25", 1, {"fc", "classifier"}),
}
GENERALISED = "gem:BACKBONE.DEPTH='18x',BACKBONE.FEAT_DIM=512,HEADS.POOL_LAYER='GeneralizedMeanPoolingP'"
IBN_AND_MORE = "ibn:BACKBONE.WITH_IBN=True,BACKBONE.WITH_NL=True"
REDUCED = "reduced:BACKBONE.DEPTH='18x',BACKBONE.FEAT_DIM=512,HEADS.EMBEDDING_DIM=64"


@pytest.fixture(scope="module")
def torchreid(peer_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("torchreid")
    peers.run(peer_tools, "torchreid_checkpoints.py", folder, *TORCHREID)
    yield folder
    shutil.rmtree(folder)  # a third of a gigabyte, which pytest would keep


@pytest.fixture(scope="module")
def fastreid(peer_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fastreid")
    peers.run(peer_tools, "fastreid_checkpoints.py", folder, IBN_AND_MORE, REDUCED, GENERALISED)
    yield folder
    shutil.rmtree(folder)


def started(weights: Path, backbone: str, **settings: Any) -> tuple[EmbeddingModel, Loaded]:
    torch.manual_seed(1)
    model = build_model(ModelConfig(backbone=backbone, **settings))
    loaded = load_weights(model, weights, backbone)
    return model.eval(), loaded


def features(model: EmbeddingModel, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """f and b of the images that the tool computed on."""
    with torch.inference_mode():
        return model(torch.from_numpy(np.load(folder / "images.npy")))


def stored(folder: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / f"{name}.npy"))


@pytest.mark.parametrize("name", TORCHREID)
def test_torchreid(torchreid: Path, name: str) -> None:
    """Optimiser, scheduler and a score of NumPy's lie beside the weights, as its engine saves them."""
    backbone, last_stride, left_out = TORCHREID[name]
    model, loaded = started(torchreid / name / "model.pth.tar-1", backbone, last_stride=last_stride)
    assert {key.split(".")[0] for key in loaded.left_out} == left_out
    assert loaded.backbone == len(model.backbone.state_dict())
    assert not loaded.neck
    found, _ = features(model, torchreid / name)
    torch.testing.assert_close(found, stored(torchreid / name, "features"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TORCHREID if name.startswith("osnet")])
def test_an_osnet_is_named_to_who_wants_another_backbone(torchreid: Path, name: str) -> None:
    with pytest.raises(DmxError, match=rf"nothing in it fits .* resnet50: .* model\.backbone={name}$"):
        build_model(ModelConfig(backbone="resnet50", weights=str(torchreid / name / "model.pth.tar-1")))


def test_fastreid(fastreid: Path) -> None:
    """IBN-a and BNNeck as they are; what DMX has no place for, and the pool that differs, are told."""
    model, loaded = started(fastreid / "ibn" / "model.pth", "resnet50_ibn_a")
    assert loaded.neck
    assert loaded.backbone == len(model.backbone.state_dict())
    parts = {".".join(key.split(".")[:2]) for key in loaded.left_out}
    assert parts == {"heads.weight", "backbone.NL_2", "backbone.NL_3"}
    f, b = features(model, fastreid / "ibn")
    torch.testing.assert_close(f, stored(fastreid / "ibn", "aligned"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b, stored(fastreid / "ibn", "embeddings"), rtol=1e-4, atol=1e-4)
    # Its own stem pools other windows, so its own features are near these and not the same.
    similarity = torch.cosine_similarity(f, stored(fastreid / "ibn", "features"))
    assert 0.99 < similarity.min() < 1 - 1e-6


def test_fastreid_with_a_generalised_mean(fastreid: Path) -> None:
    model, loaded = started(fastreid / "gem" / "model.pth", "resnet18", pooling="gem")
    assert loaded.neck
    assert "heads.pool_layer.p" not in loaded.left_out
    _, b = features(model, fastreid / "gem")
    torch.testing.assert_close(b, stored(fastreid / "gem", "embeddings"), rtol=1e-4, atol=1e-4)
    _, loaded = started(fastreid / "gem" / "model.pth", "resnet18")
    assert "heads.pool_layer.p" in loaded.left_out


def test_a_neck_behind_a_reduction_is_left_out(fastreid: Path) -> None:
    """With EMBEDDING_DIM, `heads.bottleneck.0` is a convolution."""
    model, loaded = started(fastreid / "reduced" / "model.pth", "resnet18")
    assert not loaded.neck
    assert "heads.bottleneck.0.weight" in loaded.left_out
    assert torch.equal(model.neck.running_var, torch.ones(512))
    found, _ = features(model, fastreid / "reduced")
    torch.testing.assert_close(found, stored(fastreid / "reduced", "aligned"), rtol=1e-5, atol=1e-5)
