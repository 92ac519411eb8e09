"""An S3 server that fails now and then, always, half way, or never answers: bounded tries, clear errors."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaky import Fault, FlakyStore, flaky_store

from dmx.cli import main
from dmx.data import storage
from dmx.data.dataset import open_dataset
from dmx.data.shards import DatasetWriter
from dmx.data.storage import locate
from dmx.errors import DmxError
from dmx.extraction.plan import Output, Part
from dmx.extraction.stages import FEATURES
from dmx.extraction.writing import write_part
from dmx.features import Features

FAULTS: tuple[Fault, ...] = ("503", "stall", "cut")


@pytest.fixture(scope="module")
def server() -> Iterator[FlakyStore]:
    with flaky_store("people") as store:
        yield store


@pytest.fixture
def store(server: FlakyStore, monkeypatch: pytest.MonkeyPatch) -> FlakyStore:
    """As patient as always would take minutes here."""
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    monkeypatch.setattr(storage, "SILENT_S", 1.0)
    server.heal()
    return server


@pytest.fixture(scope="module")
def people(server: FlakyStore, tiny_settings: dict[str, Any]) -> str:
    """A data set in the store, of several shards."""
    uri = server.uri("people/set")
    split = open_dataset(tiny_settings["data"]["source"]).split("train")
    with DatasetWriter(uri, layout="folders", rows_per_shard=64) as writer:
        for row in range(len(split)):
            writer.add("train", split.image_bytes(row), row % 7, row % 3, f"{row}.jpg")
    return uri


def _raw(folder: Path, tiny_settings: dict[str, Any]) -> Path:
    split = open_dataset(tiny_settings["data"]["source"]).split("train")
    for row in range(20):
        (folder / f"{row % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"{row % 2}" / f"{row}.jpg").write_bytes(split.image_bytes(row))
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_outlasted(
    store: FlakyStore, people: str, tmp_path: Path, tiny_settings: dict[str, Any], fault: Fault
) -> None:
    """Reading and writing when some requests go wrong: nothing is lost, nothing is there twice."""
    store.fail(lambda method, path, before: fault if before in (1, 12) else None)
    split = open_dataset(people).split("train")
    whole = open_dataset(tiny_settings["data"]["source"]).split("train")
    assert all(split.image_bytes(row) == whole.image_bytes(row) for row in (0, 70, 140))
    uri = store.uri(f"people/ingested-{fault}")
    assert main(["ingest", str(_raw(tmp_path / "raw", tiny_settings)), uri]) == 0
    assert len(store.requests) > 12
    store.heal()
    assert len(open_dataset(uri).split("train")) == 20


@pytest.mark.parametrize("fault", FAULTS)
def test_what_stays_is_an_error_soon(
    store: FlakyStore, people: str, tmp_path: Path, tiny_settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str], fault: Fault,
) -> None:  # fmt: skip
    """It names the place and what the store said; tries are counted; what was there is as it was."""
    raw = _raw(tmp_path / "raw", tiny_settings)
    place = store.uri(f"people/lost-{fault}")
    split = open_dataset(people).split("train")
    store.fail(lambda method, path, before: fault)
    start = time.monotonic()
    assert main(["ingest", str(raw), place]) == 2
    assert len(store.requests) <= 2 * storage.ATTEMPTS
    assert time.monotonic() - start < 40
    told = capsys.readouterr().err
    assert f"people/lost-{fault}" in told
    assert "AWS Error" in told
    assert "look at the store and the way to it, and give the same command again" in told
    with pytest.raises(DmxError, match=r"set.*/train-00000\.arrow: .*AWS Error.*; look at the store"):
        split.image_bytes(0)
    store.heal()
    assert main(["ingest", str(raw), place]) == 0
    assert len(open_dataset(place).split("train")) == 20


def test_a_store_that_fails_in_the_middle_leaves_no_data_set(
    store: FlakyStore, people: str, tmp_path: Path, tiny_settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The new one is not there, the old one whole."""
    raw = _raw(tmp_path / "raw", tiny_settings)
    place = store.uri("people/half")
    assert main(["ingest", str(raw), place]) == 0
    before = open_dataset(place).split("train").keys
    store.fail(lambda method, path, before: "503" if method in ("PUT", "POST") and before > 4 else None)
    assert main(["ingest", str(raw), place, "--overwrite", "--rows-per-shard", "5"]) == 2
    assert "wanted to write the data set" in capsys.readouterr().err
    store.heal()
    assert open_dataset(place).split("train").keys == before


def test_features(store: FlakyStore, tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    """Written by a task of `dmx embed`, read by `dmx cluster`: an error, and later the same whole."""
    split = open_dataset(tiny_settings["data"]["source"]).split("train")
    values = np.random.default_rng(0).normal(size=(len(split), 16)).astype(np.float32)
    rows = np.arange(len(split)).tobytes()
    batch = pa.table([[0], [0], [rows], [values.tobytes()], ["[]"]], schema=FEATURES)
    output, part = Output(store.uri("people/features")), Part(0, 0, len(split))
    store.fail(lambda method, path, before: "500")
    with pytest.raises(DmxError, match=r"wanted to write part-00000\.parquet, found: .*AWS Error"):
        write_part(output, part, split, 16, [batch])
    store.heal()
    write_part(output, part, split, 16, [batch])
    features = Features(store.uri("people/features"))
    store.fail(lambda method, path, before: "cut")
    with pytest.raises(DmxError, match=r"features.*: column embedding: .*AWS Error.*; look at the store"):
        features.read_rows(0, 10)
    store.heal()
    np.testing.assert_array_equal(features.read_rows(0, len(features)), values)


def test_the_tries_of_every_day_end_within_minutes(server: FlakyStore) -> None:
    """As many as are said (`test_what_stays_is_an_error_soon` counts them), each as long as is said."""
    file = locate(server.uri("people/x")).filesystem
    _, (options,) = file.__reduce__()
    assert (options["request_timeout"], options["connect_timeout"]) == (storage.SILENT_S, storage.CONNECT_S)
    assert storage.ATTEMPTS * storage.SILENT_S <= 60


@pytest.mark.parametrize("password", ["very-secret", "very/secret", "1/very+secret/"])
def test_a_password_in_a_uri_is_refused_and_not_repeated(password: str) -> None:
    """It would stand in manifests, settings and logs."""
    with pytest.raises(DmxError) as caught:
        locate(f"s3://AKIAEXAMPLE:{password}@people/set")
    assert "secret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
    assert "wanted a URI without a password" in str(caught.value)


def test_parquet_that_was_cut_is_no_fault_of_the_store(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"x": [1.0]}), buffer)
    (tmp_path / "cut.parquet").write_bytes(buffer.getvalue()[:-8])
    with pytest.raises(DmxError, match="copy or write it again"):
        Features(tmp_path / "cut.parquet")
