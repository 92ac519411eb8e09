"""Real pedestrians, cut by a detector from a surveillance clip, no labels: ingest, embed, cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dmx.cluster import pseudo_labels
from dmx.config import ModelConfig
from dmx.data.dataset import open_dataset
from dmx.embedding import embed
from dmx.model import build_model

# Kept beside the project, not in it; elsewhere by this variable.
FOLDER = Path(os.environ.get("DMX_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
CROPS = FOLDER / "real_crops.zip"
IMAGES = 1932

pytestmark = pytest.mark.skipif(not CROPS.exists(), reason=f"no real crops at {CROPS}: set DMX_REAL_DATA")


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder"])
def test_real_crops_become_pseudo_identities(packed: bool, tmp_path: Path) -> None:
    import torch

    source = CROPS
    if not packed:
        source = tmp_path / "crops"
        zipfile.ZipFile(CROPS).extractall(source)
    ingest = [sys.executable, "-m", "dmx", "ingest", str(source), str(tmp_path / "data")]
    done = subprocess.run(ingest, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    split = open_dataset(tmp_path / "data").split("train")
    assert len(split) == IMAGES
    assert (split.identities == -1).all()
    with zipfile.ZipFile(CROPS) as archive:
        name = next(item for item in archive.namelist() if item.endswith(split.keys[7].rsplit("/", 1)[-1]))
        assert split.image_bytes(7) == archive.read(name), "encoded bytes are kept as they came"
    if not packed:
        return  # The rest is the same.

    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet10t", backbone_args={"channels": [16, 32, 64, 128]})
    features = embed(
        build_model(config), split, height=128, width=64, batch_size=64, device="cpu", label="embed"
    )
    assert features.shape[0] == IMAGES
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    found = pseudo_labels(features)
    assert found.num_identities >= 5, "about a dozen people, in several appearances each"
    kept = np.flatnonzero(found.labels >= 0)
    assert len(kept) > IMAGES // 10
    # Neighbouring frames show the same people: images of a cluster stand closer in time than any two do.
    frames = np.array([int(key.rsplit("/", 1)[-1][1:5]) for key in split.keys])
    within = [np.ptp(frames[found.labels == label]) for label in range(found.num_identities)]
    assert np.median(within) < np.ptp(frames) / 2
