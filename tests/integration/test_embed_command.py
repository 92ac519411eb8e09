"""`dmx embed`: killed, it goes on; what it writes is what embedding on one machine gives, to the bit."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from dmx.cli import main
from dmx.config import from_tree
from dmx.data.dataset import open_dataset
from dmx.data.shards import DatasetWriter, Split
from dmx.data.storage import locate
from dmx.embedding import decode_rows, unit_features
from dmx.errors import DmxError
from dmx.features import Features
from dmx.model import build_model
from dmx.train.checkpoint import Progress, load_model, write_checkpoint

SHARDS, ROWS, BATCH = 24, 50, 16
BROKEN = (3, 120, 121, 122, ROWS * SHARDS - 1)
OPTIONS = ["--batch-size", str(BATCH), "--cpus-per-actor", "1", "--actors", "1", "--precision", "fp32"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any]) -> Path:
    """A checkpoint of an untrained model, whose statistics are those of some images."""
    folder = tmp_path_factory.mktemp("model")
    config = from_tree(("test", {name: tiny_settings[name] for name in ("model", "data")}))
    torch.manual_seed(0)
    model = build_model(config.model)
    model(torch.randn(64, 3, config.data.height, config.data.width))
    write_checkpoint(folder / "run", Progress(seed=0), config, {"model": model.state_dict()}, keep=1)
    return folder / "run"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any]) -> Path:
    """Many small shards of JPEGs, some of them broken."""
    folder = tmp_path_factory.mktemp("images")
    write_dataset(folder / "set", SHARDS * ROWS, open_dataset(tiny_settings["data"]["source"]).split("train"))
    return folder / "set"


def write_dataset(folder: Path | str, images: int, source: Split) -> None:
    with DatasetWriter(folder, layout="folders", rows_per_shard=ROWS) as writer:
        for row in range(images):
            encoded = source.image_bytes(row % len(source))
            broken = encoded[:300] if row % 2 else b"no image"
            writer.add("train", broken if row in BROKEN else encoded, row % 7, row % 3, f"{row}.jpg")


def expected(run: Path, split: Split) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The features of what can be decoded, in the batches of the parts."""
    torch.set_num_threads(1)
    model, config = load_model(run)
    model = model.to(memory_format=torch.channels_last)
    size = (config.data.height, config.data.width)
    found = []
    with torch.inference_mode():
        for begin in range(0, len(split), ROWS):
            for start in range(begin, min(begin + ROWS, len(split)), BATCH):
                rows = np.arange(start, min(start + BATCH, begin + ROWS, len(split)))
                pixels, _, _ = decode_rows(split, rows, *size)
                if len(pixels):
                    found.append(unit_features(model, pixels, "cpu"))
    return np.concatenate(found)


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dmx", "embed", *map(str, words), *OPTIONS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def await_parts(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while len(list(out.glob("part-*.parquet"))) < count:
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < deadline, f"no {count} parts within 200 s"
        time.sleep(0.01)


def descendants(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if name in " ".join(p.cmdline())]


@pytest.mark.timeout(580)
def test_killed_it_goes_on_and_finished_it_repeats_nothing(
    run_folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 of the command, then of the actor that holds the model."""
    out = tmp_path / "features"
    first = start(run_folder, dataset, "--out", out)
    await_parts(first, out, 2)
    family = [*descendants(first, "ray::MapWorker"), *descendants(first, "raylet")]
    first.kill()
    first.communicate(timeout=60)
    assert not psutil.wait_procs(family, timeout=60)[1], "its cluster ended with it"
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 2 <= len(done) < SHARDS
    with pytest.raises(DmxError, match="has not ended"):
        Features(out)

    second = start(run_folder, dataset, "--out", out)
    await_parts(second, out, len(done) + 2)
    (actor,) = descendants(second, "MapWorker(MapBatches(Forward))")
    os.kill(actor.pid, signal.SIGKILL)
    printed, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert f"{len(done)} of {SHARDS} parts are done; going on with the others" in printed
    assert f"{SHARDS * ROWS - len(BROKEN)} images embedded, {len(BROKEN)} that cannot be decoded" in printed
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet") if path.name in done}
    assert kept == done

    split = open_dataset(dataset).split("train")
    features = Features(out)
    rows = np.delete(np.arange(len(split)), BROKEN)
    assert features.read_column("row").to_pylist() == rows.tolist()
    assert features.read_column("key").to_pylist() == [split.keys[row] for row in rows]
    assert features.read_column("identity").to_pylist() == split.identities[rows].tolist()
    assert features.read_column("camera").to_pylist() == split.cameras[rows].tolist()
    np.testing.assert_array_equal(features.read_rows(0, len(features)), expected(run_folder, split))
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["key"]) for line in skipped] == [(row, f"{row}.jpg") for row in BROKEN]
    assert {line["reason"].split(":")[0] for line in skipped} == {"not an image", "not decodable"}
    assert not list(out.glob(".*"))

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(["embed", str(run_folder), str(dataset), "--out", str(out), *OPTIONS]) == 0
    assert f"is finished: {len(rows)} images embedded" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_settings_and_other_folders_are_refused(
    run_folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dmx.extraction.plan import Output, Settings

    begun = Settings("m", "w", "d", "s", "train", 1, 1, 64, 32, 16, "fp32", False)
    assert not Output(str(tmp_path / "out")).begin(begun, {}, 64)
    words = ["embed", str(run_folder), str(dataset), "--out"]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "made with other settings (weights_sha256 'w', not '" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.txt").write_text("")
    assert main([*words, str(tmp_path / "other")]) == 2
    assert "wanted an empty or new folder, found holiday.txt" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "new"), "--batch-size", "0"]) == 2
    assert "--batch-size: wanted at least 1, found 0" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "new"), "--split", "query"]) == 2
    assert "wanted the split 'query', found ['train']" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server in this process, as a URI without its end."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs as pafs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    options = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    pafs.FileSystem.from_uri(f"s3://people/{options}&allow_bucket_creation=true")[0].create_dir("people")
    yield f"s3://people/{{}}{options}"
    server.stop()


@pytest.mark.timeout(300)
def test_object_stores(
    run_folder: Path, bucket: str, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """From S3 to S3; a part that is lost is made again, and nothing else is."""
    images, out = bucket.format("set"), bucket.format("features")
    write_dataset(images, 3 * ROWS, open_dataset(tiny_settings["data"]["source"]).split("train"))
    words = ["embed", str(run_folder), images, "--out", out, *OPTIONS]
    assert main(words) == 0
    split = open_dataset(images).split("train")
    features = Features(out)
    np.testing.assert_array_equal(features.read_rows(0, len(features)), expected(run_folder, split))
    location = locate(out)
    assert [name for name in location.names() if name.startswith(".")] == []
    assert location.read("skipped.jsonl").count(b"\n") == 4

    location.delete("part-00001.parquet")
    capsys.readouterr()
    assert main(words) == 0
    assert "2 of 3 parts are done; going on with the others" in capsys.readouterr().out
    assert len(Features(out)) == 3 * ROWS - 4


IDLE = """
import json, os, time, ray
from dmx.ray_cluster import ray_cluster
def work():
    time.sleep(1)
    return os.getpid()
with ray_cluster(cpus=1):
    task = ray.remote(num_cpus=0)(work)
    pids = []
    for pause_s in (0, 6):
        time.sleep(pause_s)
        pids.append(ray.get([task.remote() for _ in range(3)]))
print(json.dumps(pids))
"""


def test_workers_stay_between_their_tasks() -> None:
    """Those that decode would start again after every pause, and import for seconds."""
    done = subprocess.run(
        [sys.executable, "-c", IDLE], capture_output=True, text=True, timeout=120, check=True
    )
    first, second = json.loads(done.stdout)
    assert len(set(first)) == 3
    assert set(second) <= set(first)
