"""`dmx export` and `dmx.load`: a trained model out and in again, the same everywhere."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from runs import prepare
from tiny import HEIGHT, WIDTH

import dmx
from dmx.checksums import write_sums
from dmx.cli import main
from dmx.data.dataset import open_dataset
from dmx.data.transforms import normalise_batch
from dmx.deployment import onnx as onnx_module
from dmx.embedding import embed
from dmx.errors import DmxError
from dmx.model import build_model
from dmx.sections import ModelConfig
from dmx.train.checkpoint import latest, load_model
from dmx.train.worker import train_worker


@pytest.fixture(scope="module")
def trained(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "first"
    train_worker(prepare(run, tiny_settings))
    return run


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", str(trained), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def pictures(tiny_settings: dict[str, Any]) -> list[bytes]:
    split = open_dataset(tiny_settings["data"]["tests"][0]).split("gallery")
    return [split.image_bytes(row) for row in range(7)]


def test_an_export_is_the_run_for_every_command(
    trained: Path, exported: Path, tiny_settings: dict[str, Any]
) -> None:
    """Weights to the bit, and `dmx evaluate` says the same of both."""
    (a, _), (b, config) = load_model(trained), load_model(exported)
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    assert (config.data.height, config.data.width) == (HEIGHT, WIDTH)
    found = []
    for model in (trained, exported):
        file = exported.parent / "results.json"
        assert main(["evaluate", str(model), tiny_settings["data"]["tests"][0], "--json", str(file)]) == 0
        found.append(json.loads(file.read_text())["results"])
    assert found[0] == found[1]


def test_onnx_computes_what_torch_does(exported: Path, pictures: list[bytes]) -> None:
    """On pictures, one at a time and together, with the batch that the file says is free."""
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 3, HEIGHT, WIDTH])
    assert (made.name, made.type, made.shape[0]) == ("embeddings", "tensor(float)", "batch")
    assert onnx.load(exported / "model.onnx").opset_import[0].version == 18
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in pictures])
    images = normalise_batch(torch.from_numpy(pixels)).contiguous().numpy()
    wanted = dmx.load(exported).embed(pixels)
    (together,) = session.run(None, {"images": images})
    alone = np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])
    np.testing.assert_allclose(together, wanted, atol=1e-4)
    np.testing.assert_allclose(alone, wanted, atol=1e-4)


def test_the_card_tells_data_results_and_use(trained: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    tests = json.loads((trained / "result.json").read_text())["tests"]["unseen"]
    assert card.startswith("---\nlibrary_name: dmx\n")
    assert "# first\n" in card
    assert "- source, labelled: source, 180 images of 20 identities by 3 cameras" in card
    assert "- target, unlabelled: target, 144 images" in card
    assert f"| unseen | {100 * tests['map']:.1f} | {100 * tests['rank1']:.1f} |" in card
    assert "48 steps in 4 epochs" in card
    assert '`model.backbone`: "resnet10t"' in card
    assert "## Intended use" in card
    assert f"torch {torch.__version__.split('+')[0]}" in card
    assert str(trained.parent) not in card + (exported / "config.yaml").read_text(), "a path of this machine"


def test_embedding_is_the_same_however_images_are_given(
    trained: Path, pictures: list[bytes], tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    """As the evaluation embeds them; in any batches."""
    model = dmx.load(trained)
    split = open_dataset(tiny_settings["data"]["tests"][0]).split("gallery")
    wanted = embed(
        load_model(trained)[0],
        split,
        height=HEIGHT,
        width=WIDTH,
        batch_size=8,
        device="cpu",
        rows=list(range(7)),
    )
    paths = [tmp_path / f"{place}.jpg" for place in range(7)]
    for path, encoded in zip(paths, pictures, strict=True):
        path.write_bytes(encoded)
    decoded = [Image.open(io.BytesIO(encoded)) for encoded in pictures]
    ways = (paths, list(map(str, paths)), pictures, decoded, [np.asarray(image) for image in decoded])
    for images in ways:
        found = model.embed(images, batch_size=3)
        assert (found.dtype, found.shape) == (np.float32, (7, model.dimensions))
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(model.embed(paths[2]), wanted[2:3], atol=1e-6)
    np.testing.assert_allclose(model.embed(np.asarray(decoded[2])), wanted[2:3], atol=1e-6)
    np.testing.assert_allclose(
        model.embed([paths[2]], flip=True)
        @ model.embed(decoded[2].transpose(Image.Transpose.FLIP_LEFT_RIGHT), flip=True).T,
        1,
        atol=1e-5,
    )
    assert model.embed([]).shape == (0, model.dimensions)


def test_images_that_cannot_be_are_named(trained: Path, tmp_path: Path) -> None:
    model = dmx.load(trained)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    good = np.zeros((8, 8, 3), np.uint8)
    for images, message in (
        ([good, tmp_path / "cut.jpg"], r"image 1 \(.*cut.jpg\)"),
        ([tmp_path / "none.jpg"], r"image 0 \(.*none.jpg\): cannot be read: No such file"),
        ([good, good.astype(float)], r"image 1 .* of uint8, RGB, found \(8, 8, 3\) of float64"),
        ([good[..., 0]], r"image 0 .* found \(8, 8\)"),
        ([3], "a path, bytes, a Pillow image or an array, found int"),
    ):
        with pytest.raises(DmxError, match=message):
            model.embed(images)  # type: ignore[arg-type]
    with pytest.raises(DmxError, match="batch_size: wanted at least 1, found 0"):
        model.embed([good], batch_size=0)


def test_a_model_by_its_name_on_the_hub(exported: Path, tmp_path: Path) -> None:
    """As the hub's own cache keeps it, without a network."""
    kept = tmp_path / "hub" / "models--someone--street"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots").mkdir()
    exported.rename(kept / "snapshots" / ("0" * 40))
    try:
        code = "import dmx; print(dmx.load('someone/street').dimensions); dmx.load('someone/other')"
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": ""}
        done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    finally:
        (kept / "snapshots" / ("0" * 40)).rename(exported)
    assert done.stdout == f"{load_model(exported)[0].width}\n"
    assert "someone/other: wanted a folder, or a model of this name on the Hugging Face hub" in done.stderr
    with pytest.raises(DmxError, match="nowhere: wanted a run folder"):
        dmx.load("nowhere")


@pytest.mark.parametrize("backbone", ["resnet18_ibn_a", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_other_networks(backbone: str, tmp_path: Path) -> None:
    """With a transformer and IBN: `write_onnx` itself compares, and a file stands there only if it agrees."""
    size = (224, 224) if backbone.startswith("vit") else (64, 32)
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=backbone)).eval()
    assert onnx_module.write_onnx(model, *size, tmp_path / "m.onnx") <= 1e-4
    assert (tmp_path / "m.onnx").exists()


def test_a_model_that_onnx_computes_otherwise_is_not_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the exporter had lost the neck; and no folder is left half full."""
    from dmx.model import Retrieval
    from dmx.model.embedding_model import pooled

    right = Retrieval.forward

    def without_neck(self: Retrieval, images: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return torch.nn.functional.normalize(pooled(self, images), dim=1)
        return right(self, images)

    monkeypatch.setattr(Retrieval, "forward", without_neck)
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert re.search(
        r"wanted onnxruntime's embeddings within 0.0001 of torch's, found 0\.\d", capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said(
    trained: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", str(trained), str(exported)]) == 2
    assert "wanted a new or empty folder to export to" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["export", str(trained), str(tmp_path / "file")]) == 2
    assert "wanted a new or empty folder to export to, found a file" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "wanted a run folder" in capsys.readouterr().err
    monkeypatch.setattr(onnx_module, "PACKAGES", ("onnx", "onnx_of_tomorrow"))
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert (
        'found no onnx_of_tomorrow: pip install "dmx[export]", or export with --formats'
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert main(["export", str(trained), str(tmp_path / "out"), "--formats", "safetensors"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.yaml",
        "README.md",
    }


def test_an_opset_that_torch_does_not_make_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves the file at the one that it makes, which must not be told as another."""
    assert main(["export", str(trained), str(tmp_path / "out"), "--opset", "9"]) == 2
    assert "wanted opset 9, found that torch makes opset 18" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_card_of_a_model_without_a_target_names_no_method_that_it_was_not_trained_by(
    trained: Path, tmp_path: Path
) -> None:
    folder = latest(trained)
    assert folder is not None
    shutil.copytree(folder, tmp_path / "alone")
    tree = yaml.safe_load((tmp_path / "alone" / "config.yaml").read_text())
    tree["data"]["target"] = None
    (tmp_path / "alone" / "config.yaml").write_text(yaml.safe_dump(tree))
    write_sums(tmp_path / "alone")
    assert main(["export", str(tmp_path / "alone"), str(tmp_path / "out"), "--formats", "safetensors"]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "trained with DMX on labelled images alone." in card
    assert "DomainMix" not in card


def test_a_device_that_is_not_there_is_named(trained: Path) -> None:
    with pytest.raises(DmxError, match=r"dmx\.load: device: cannot use 'abacus'"):
        dmx.load(trained, device="abacus")


def test_an_export_of_an_export_says_what_it_does_not_know(exported: Path, tmp_path: Path) -> None:
    checkpoint = latest(exported)
    assert checkpoint is None
    assert (
        main(["export", str(exported), str(tmp_path / "out"), "--formats", "safetensors", "--name", "x"]) == 0
    )
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.count("Not recorded: this was made from an export.") == 2
    assert "# x\n" in card
