"""`dmx evaluate` on raw and ingested data sets, with a checkpoint of a small model."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from dmx.commands import evaluate, ingest
from dmx.config import from_tree, to_tree
from dmx.data.layouts import LAYOUTS
from dmx.data.writer import DatasetWriter
from dmx.errors import DmxError
from dmx.evaluation import Metrics
from dmx.model import build_model

IDENTITIES, CAMERAS = 6, 2


def picture(identity: int, camera: int) -> bytes:
    """A person of one colour, noisy and brighter or darker by camera."""
    rng = np.random.default_rng([identity, camera])
    colour = np.random.default_rng(identity).integers(30, 220, 3)
    pixels = colour + 12 * camera + rng.normal(0, 8, (64, 32, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Market-1501's layout."""
    root = tmp_path_factory.mktemp("raw") / "Market-1501-v15.09.15"
    for folder, camera in (("bounding_box_train", 1), ("query", 1), ("bounding_box_test", 2)):
        (root / folder).mkdir(parents=True)
        for identity in range(1, IDENTITIES + 1):
            name = f"{identity:04d}_c{camera}s1_{identity:06d}_00.jpg"
            (root / folder / name).write_bytes(picture(identity, camera))
    (root / "bounding_box_test" / "-1_c1s1_000099_00.jpg").write_bytes(picture(1, 1))
    (root / "bounding_box_test" / "0000_c1s1_000098_00.jpg").write_bytes(picture(99, 1))
    return root


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ingested") / "set"
    with DatasetWriter(root, layout="folder") as writer:
        for split, camera in (("query", 1), ("gallery", 2)):
            for identity in range(1, IDENTITIES + 1):
                writer.add(split, picture(identity, camera), identity, camera, f"{split}/{identity}.jpg")
        writer.add("gallery", picture(99, 1), 0, 1, "gallery/distractor.jpg")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    tree = {
        "data": {"height": 64, "width": 32},
        "model": {"backbone": "resnet18", "backbone_args": {"channels": [8, 8, 16, 16]}},
    }
    config = from_tree(("test", tree))
    save_file(build_model(config.model).state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    return folder


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return evaluate.run(parser.parse_args([str(argument) for argument in arguments]))


def test_raw_and_ingested_give_the_same_table(
    checkpoint: Path, raw: Path, ingested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert command(checkpoint, raw, ingested, "--batch-size", 5, "--device", "cpu", "--json", out) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["data", "set", "queries", "mAP", "rank-1", "rank-5", "rank-10", "mINP"]
    assert first.split()[0] == str(raw)
    assert first.split()[1:] == second.split()[1:]
    assert first.split()[1] == str(IDENTITIES)
    content = json.loads(out.read_text())
    assert content["average_precision"] == "default"
    assert content["rerank"] is None
    one, two = (Metrics(**values) for values in content["results"].values())
    assert one == two
    assert 1 / 7 < one.map <= 1.0
    assert f"{100 * one.map:.1f}" == first.split()[2]


def test_options_reach_the_protocol(
    checkpoint: Path, ingested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, options in {
        "plain": [],
        "rerank": ["--rerank", "--k1", 3],
        "trapezoid": ["--ap", "trapezoid"],
    }.items():
        out = tmp_path / f"{name}.json"
        command(checkpoint, ingested, "--device", "cpu", "--flip", "--json", out, *options)
        found[name] = json.loads(out.read_text())
    assert found["rerank"]["rerank"] == {"k1": 3, "k2": 6, "lambda": 0.3}
    plain, trapezoid = (found[name]["results"][str(ingested)] for name in ("plain", "trapezoid"))
    assert trapezoid["map"] <= plain["map"]
    assert trapezoid["rank1"] == plain["rank1"]
    assert "mAP" in capsys.readouterr().out


def test_thresholds_are_told_in_percent_and_fractions(
    checkpoint: Path, ingested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert command(checkpoint, ingested, "--device", "cpu", "--roc", "--json", out) == 0
    heads, line = capsys.readouterr().out.splitlines()[-2:]
    assert heads.split()[2] == "EER"
    assert heads.endswith("TPR at FPR 1%")
    roc = json.loads(out.read_text())["roc"][str(ingested)]
    assert f"{100 * roc['equal_error_rate']:.1f} ({roc['distance']:.3f})" in line
    assert [point["false_positive_rate"] for point in roc["points"]] == [1e-4, 1e-3, 1e-2]
    last = roc["points"][-1]
    assert line.endswith(f"{100 * last['true_positive_rate']:.1f} ({last['distance']:.3f})")
    # Of 30 pairs of different people none may be within: a share of 1/30 is more than is allowed.
    assert 0 <= last["true_positive_rate"] < 1


def test_what_cannot_be_evaluated_is_named(checkpoint: Path, ingested: Path, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "train", layout="folder") as writer:
        writer.add("train", picture(1, 1), 1, 1, "a.jpg")
    with pytest.raises(DmxError, match="wanted query and gallery to evaluate on, found only train"):
        command(checkpoint, tmp_path / "train")
    with pytest.raises(DmxError, match="wanted a run folder"):
        command(tmp_path, ingested)
    with pytest.raises(DmxError, match="--device: cannot use 'gpu'"):
        command(checkpoint, ingested, "--device", "gpu")
    with DatasetWriter(tmp_path / "apart", layout="folder") as writer:
        writer.add("query", picture(1, 1), 1, 1, "q.jpg")
        writer.add("gallery", picture(2, 2), 2, 2, "g.jpg")
    with pytest.raises(DmxError, match="apart: no valid query among 1"):
        command(checkpoint, tmp_path / "apart", "--device", "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rerank", "--k1", 0], "k1: re-ranking wants at least 1, found 0"),
        (["--rerank", "--k2", -1], "k2: re-ranking wants at least 1, found -1"),
        (["--rerank", "--lambda", 1.5], "lambda: re-ranking wants a share from 0 to 1, found 1.5"),
        (["--batch-size", 0], "--batch-size: wanted at least 1, found 0"),
        (["--height", -8], "--height: wanted at least 1, found -8"),
        (["--json", "absent/results.json"], "found no folder .*absent"),
        (["--json", "."], "wanted a file to write, found the folder"),
    ],
)
def test_mistakes_are_noticed_before_anything_is_opened(
    options: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DmxError, match=message):
        command("no-checkpoint", "no-data", *options)


def test_a_run_without_a_best_checkpoint_says_so(checkpoint: Path, ingested: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(checkpoint, tmp_path / "checkpoints/step-00000001")
    (tmp_path / "checkpoints/latest").write_text("step-00000001\n")
    with pytest.raises(DmxError, match=r"only `compat: official` records one.*leave --best out"):
        command(tmp_path, ingested, "--best", "--device", "cpu")
    assert command(tmp_path, ingested, "--device", "cpu") == 0


def test_a_folder_of_identities_takes_its_cameras_from_file_names(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, camera in (("query", 1), ("gallery", 2)):
        for identity in (1, 2):
            path = tmp_path / f"set/{split}/{identity}/x_c{camera}.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(picture(identity, camera))
    (tmp_path / "set/query/loose.jpg").write_bytes(picture(3, 1))
    arguments = (checkpoint, tmp_path / "set", "--layout", "folder", "--device", "cpu")
    assert command(*arguments, "--camera-pattern", r"_c(\d+)") == 0
    shown = capsys.readouterr()
    assert "dmx evaluate: warning:" in shown.err
    assert "query/loose.jpg" in shown.err


def test_layouts_are_the_same_everywhere() -> None:
    for module in (evaluate, ingest):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        (action,) = (action for action in parser._actions if action.dest == "layout")
        assert action.choices == ("auto", *LAYOUTS)
        assert all(name in (action.help or "") for name in LAYOUTS)
