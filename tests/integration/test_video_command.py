"""People out of videos, end to end: rendered walkers, a detector trained here, shards, a search page.

The detector is an RT-DETR of transformers with weights of its own, small enough to learn in half a minute.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import footage
import numpy as np
import pytest
import yaml
from safetensors.torch import save_file

from dmx.cli import main
from dmx.config import from_tree, recipe, to_tree
from dmx.data.dataset import open_dataset
from dmx.data.images import decode
from dmx.data.manifest import read_manifest
from dmx.data.shards import ShardSplit
from dmx.errors import DmxError
from dmx.model import build_model
from dmx.video.crops import Rules
from dmx.video.decode import Stride
from dmx.video.detector import Found
from dmx.video.films import find_films
from dmx.video.ingest import Request, ingest_videos
from dmx.video.journal import NAME
from dmx.video.transformers_detector import TransformersDetector, load_detector

ROOT = Path(__file__).parents[2]
SCORE = 0.5
PATIENCE_S = 180


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[footage.Footage]]:
    """A folder with cam1.mp4, cam2.mp4 and the detector, and what is in the videos."""
    folder = tmp_path_factory.mktemp("world")
    films = [footage.walk(1), footage.walk(2)]
    videos = [
        footage.write_video(folder / f"cam{number}.mp4", film.frames) for number, film in enumerate(films, 1)
    ]
    footage.train_detector(folder / "detector", list(map(footage.as_read, films, videos)))
    return folder, films


@pytest.fixture(scope="module")
def ingested(world: tuple[Path, list[footage.Footage]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of both videos, all frames."""
    out = tmp_path_factory.mktemp("ingested") / "ours"
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as every test of this folder, whose bits these are
    done = subprocess.run(command(world[0], out), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("camera 1: cam1.mp4, 18 frames looked at, ")
    return out


def command(folder: Path, out: Path, *more: str) -> list[str]:
    films = [word for name in ("cam1.mp4", "cam2.mp4") for word in ("--video", str(folder / name))]
    options = ["--detector", str(folder / "detector"), "--every", "1", "--score", str(SCORE), *more]
    return [sys.executable, "-m", "dmx", "ingest", *films, str(out), *options, "--batch-size", "4"]


def test_the_crops_are_the_people_of_each_camera_and_frame(
    world: tuple[Path, list[footage.Footage]], ingested: Path
) -> None:
    split = open_dataset(ingested).split("train")
    assert isinstance(split, ShardSplit)
    films = world[1]
    people = sum(len(boxes) for film in films for boxes in film.boxes)
    assert len(split) == people
    places = zip(
        split.cameras.tolist(),
        split.column("frame").to_pylist(),
        split.column("box").to_pylist(),
        strict=True,
    )
    for row, (camera, frame, box) in enumerate(places):
        film = films[camera - 1]
        true = max(film.boxes[frame], key=lambda other: footage.overlap(box, other))
        assert footage.overlap(box, true) > 0.5, f"{split.keys[row]}: {true}"
        left, top, right, bottom = box
        crop = decode(split.image_bytes(row)).astype(int)
        # As drawn, but for two lossy encoders.
        assert np.abs(crop - film.frames[frame][top:bottom, left:right]).mean() < 8
        assert split.keys[row] == f"cam{camera}.mp4#frame={frame}&box={left},{top},{right},{bottom}"
    assert split.column("source").to_pylist() == [f"cam{camera}.mp4" for camera in split.cameras]
    assert split.column("time_s").to_pylist() == [f / footage.RATE for f in split.column("frame").to_pylist()]
    assert all(SCORE <= score <= 1 for score in split.column("score").to_pylist())
    assert set(split.identities.tolist()) == {-1}
    manifest, _ = read_manifest(ingested, verify=True)
    assert (manifest.layout, manifest.schema_version, manifest.splits["train"].cameras) == ("video", 2, 2)
    assert not (ingested / NAME).exists()


class Counting:
    """A detector that counts the frames which it is shown."""

    def __init__(self, detector: TransformersDetector) -> None:
        self._detector, self.fingerprint, self.frames = detector, detector.fingerprint, 0

    def detect(self, frames: Any) -> list[Found]:
        self.frames += len(frames)
        return self._detector.detect(frames)


def test_killed_it_goes_on_and_ends_with_the_same_shards(
    world: tuple[Path, list[footage.Footage]], ingested: Path, tmp_path: Path
) -> None:
    folder, out = world[0], tmp_path / "killed"
    run = subprocess.Popen(command(folder, out), stderr=subprocess.DEVNULL)
    end = time.monotonic() + PATIENCE_S
    while run.poll() is None and not (noted := _lines(out / NAME))[3:]:
        assert time.monotonic() < end, "no batch was looked at"
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    with pytest.raises(DmxError, match=r"found no manifest\.json"):
        read_manifest(out)
    with (out / NAME).open("a") as journal:
        journal.write('{"film": "cam2.mp4", "fra')  # as a machine that loses its power leaves it
    known = len(_lines(out / NAME)) - 2
    assert 3 <= known < 10

    detector = Counting(load_detector(str(folder / "detector"), least_score=SCORE, device="cpu"))
    films = find_films([str(folder / "cam1.mp4"), str(folder / "cam2.mp4")])
    ingest_videos(Request(films, Stride(every=1), Rules(), batch_size=4), out, detector)
    shown = sum(len(film.frames) for film in world[1])
    # The last batch of a video of 18 frames has two.
    assert shown - 4 * known <= detector.frames <= shown - 4 * known + 4
    assert detector.frames < shown
    assert _contents(out) == _contents(ingested)
    assert noted


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_settings_do_not_take_over_what_was_found(
    world: tuple[Path, list[footage.Footage]], ingested: Path, tmp_path: Path
) -> None:
    """What a surer detector found is not that of this one."""
    folder, out = world[0], tmp_path / "out"
    out.mkdir()
    poisoned = {"film": "cam1.mp4", "frames": [0, 1, 2, 3], "found": [[[[0, 0, 40, 100]], [1.0], [-1]]] * 4}
    (out / NAME).write_text(
        json.dumps({"settings": {"detector": "another"}}) + "\n" + json.dumps(poisoned) + "\n"
    )
    assert main(command(folder, out)[3:]) == 0
    assert _contents(out) == _contents(ingested)


def test_a_model_searches_them_by_camera_and_frame(ingested: Path, tmp_path: Path) -> None:
    """Downstream it is a data set as any other: embedded, ranked, shown."""
    config = from_tree(recipe("demo"))
    (tmp_path / "run").mkdir()
    save_file(build_model(config.model).state_dict(), tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(to_tree(config)), encoding="utf-8")
    page = tmp_path / "page.html"
    words = [str(ingested), str(ingested), "--model", str(tmp_path / "run"), "--top", "3", "--out", str(page)]
    assert main(["search", *words, "--split", "train", "--device", "cpu"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "camera 1" in text
    assert "camera 2" in text
    assert "cam2.mp4#frame=17&amp;box=" in text


def test_nobody_sure_enough_names_the_threshold(
    world: tuple[Path, list[footage.Footage]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(world[0], tmp_path / "out")[3:], "--score", "1"]) == 2
    said = capsys.readouterr().err
    assert "found no crop. Lower --score" in said
    assert "18 frames were looked at, with 0 boxes of people" in said
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_detectors_that_are_not_there(
    world: tuple[Path, list[footage.Footage]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: object, **options: Any) -> None:
        load_detector(str(name), least_score=SCORE, device="cpu", **options)

    detector = world[0] / "detector"
    with pytest.raises(DmxError, match=r"wanted the folder of a detector .*, found a file"):
        load(detector / "config.json")
    with pytest.raises(DmxError, match="found neither"):
        load(tmp_path / "nowhere")
    with pytest.raises(DmxError, match=r"found one without config\.json"):
        load(world[0])
    with pytest.raises(DmxError, match=r"knows 'pig', found the labels person"):
        load(detector, label="pig")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in detector.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    with pytest.raises(DmxError, match="found one that cannot be loaded"):
        load(broken)


def test_without_a_network_it_says_how_to_bring_a_detector(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    footage.write_video(tmp_path / "a.mp4", [np.zeros((64, 64, 3), np.uint8)] * 2)
    words = ["--video", str(tmp_path / "a.mp4"), str(tmp_path / "out"), "--detector", "somebody/detector"]
    done = subprocess.run(
        [sys.executable, "-m", "dmx", "ingest", *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "hf download somebody/detector --local-dir detector" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_documents_commands_run(
    world: tuple[Path, list[footage.Footage]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, films = world
    monkeypatch.chdir(folder)
    lines = [
        f"{frame},{who},{x1},{y1},{x2 - x1},{y2 - y1},1"
        for frame, boxes in enumerate(films[0].boxes, 1)
        for who, (x1, y1, x2, y2) in enumerate(boxes, 1)
    ]
    (folder / "cam1.txt").write_text("\n".join(lines))
    guide = (ROOT / "docs" / "how-to" / "video.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^dmx ingest --video '?cam.*$", guide + readme, re.MULTILINE)
    assert len(shown) == 6
    for line in shown:
        assert main([*shlex.split(line)[1:], "--overwrite", "--min-height", "40"]) == 0, line
    assert set(open_dataset(folder / "data/numbered").split("train").cameras.tolist()) == {4, 9}
    assert set(open_dataset(folder / "data/named").split("train").cameras.tolist()) == {1, 2}
    assert set(open_dataset(folder / "data/tracked").split("train").identities.tolist()) == {0, 1}
    capsys.readouterr()
    (example,) = re.findall(r"^```python not-run: [^\n]*\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    exec(example, {})
    first = capsys.readouterr().out.splitlines()
    assert len(first) == 3
    assert first[0].startswith("cam1.mp4#frame=0&box=")
