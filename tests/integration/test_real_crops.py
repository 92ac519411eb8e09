"""Real pedestrians cut from a surveillance clip, without labels: ingest, train, embed, cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dmx.cluster import pseudo_labels
from dmx.data.dataset import open_dataset
from dmx.embedding import embed
from dmx.train.checkpoint import load_model
from dmx.train.runlog import read_lines

# Kept beside the project, not in it; elsewhere by this variable.
FOLDER = Path(os.environ.get("DMX_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
CROPS = FOLDER / "real_crops.zip"
IMAGES = 1932
NEAR_FRAMES = 20

pytestmark = pytest.mark.skipif(not CROPS.exists(), reason=f"no real crops at {CROPS}: set DMX_REAL_DATA")


def dmx(*words: object) -> str:
    command = [sys.executable, "-m", "dmx", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    dmx("ingest", CROPS, folder / "real")
    return folder / "real"


def test_every_crop_is_kept_as_it_came(ingested: Path, tmp_path: Path) -> None:
    split = open_dataset(ingested).split("train")
    assert len(split) == IMAGES
    assert (split.identities == -1).all()
    zipfile.ZipFile(CROPS).extractall(tmp_path)
    files = {path.name: path for path in tmp_path.rglob("*.jpg")}
    for row, key in enumerate(split.keys):
        assert split.image_bytes(row) == files.pop(Path(key).name).read_bytes()
    assert not files

    dmx("ingest", tmp_path / "real_crops", tmp_path / "unpacked")
    unpacked = open_dataset(tmp_path / "unpacked").split("train")
    assert [Path(key).name for key in unpacked.keys] == [Path(key).name for key in split.keys]


@pytest.mark.timeout(600)
def test_real_crops_become_pseudo_identities(ingested: Path, tmp_path: Path) -> None:
    """A model that has only seen rendered people groups real ones by who is there at the same time."""
    dmx("synth", tmp_path / "people", "--identities", 40, "--images", 8, "--height", 128)
    settings = {
        "data.height": 64,
        "data.width": 32,
        "model.backbone_args": "{channels: [32, 64, 96, 128]}",
        "schedule.epochs": 4,
        "schedule.steps_per_epoch": 60,
        "schedule.source_epochs": 3,
        "schedule.stage_two_epoch": 4,
        "batch.identities": 8,
        # There is one camera, and nobody told its number.
        "cluster.centre_cameras": "false",
        "cluster.same_camera_share": 1,
        "cluster.k1": 20,
    }
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    data = ("--source", tmp_path / "people", "--target", ingested)
    dmx("train", "--recipe", "demo", *data, "--run", tmp_path / "run", "--launcher", "inline", *chosen)
    clusters = read_lines(tmp_path / "run" / "epochs.jsonl")[-1]["clusters"]
    assert clusters["clusters"] >= 10, "about a dozen people, most of them in several appearances"
    assert "purity" not in clusters, "nobody knows who they are"

    split = open_dataset(ingested).split("train")
    model, config = load_model(tmp_path / "run")
    height, width = config.data.height, config.data.width
    features = embed(model, split, height=height, width=width, batch_size=64, device="cpu")
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    found = pseudo_labels(features, k1=config.cluster.k1, eps=config.cluster.eps)
    kept = found.labels >= 0
    assert kept.sum() > IMAGES // 5
    frames = np.array([int(Path(key).name[1:5]) for key in split.keys])[kept]
    labels = found.labels[kept]
    pairs = ~np.eye(len(labels), dtype=bool)
    near = (np.abs(frames[:, None] - frames) <= NEAR_FRAMES) & pairs
    together = (labels[:, None] == labels) & pairs
    lift = near[together].mean() / near[pairs].mean()
    assert lift > 3, f"images of a cluster are {lift:.1f} times as often near in time as any two images"
