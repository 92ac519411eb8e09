"""`dmx cluster`: features in Parquet to labels, interrupted and gone on with, with any number of workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from dmx import clustering
from dmx.cameras import few_of_own_camera
from dmx.cli import main
from dmx.cluster import pseudo_labels
from dmx.cluster.sharded import Group, sharded_pseudo_labels
from dmx.features import Features
from dmx.kernels.knn import self_knn
from dmx.train.purity import cluster_report


def people(n: int, d: int = 32, spread: float = 0.7) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((n // 15, d))
    rows = centres[rng.integers(len(centres), size=n)] + spread * rng.standard_normal((n, d))
    return np.asarray(rows, np.float32)


def write(folder: Path, x: NDArray[np.float32], parts: int = 3, **columns: Any) -> Path:
    """Parts of uneven length, as `dmx embed` leaves them."""
    folder.mkdir(parents=True)
    edges = np.linspace(0, np.sqrt(len(x)), parts + 1) ** 2
    for part, (a, b) in enumerate(zip(edges[:-1].astype(int), edges[1:].astype(int), strict=True)):
        lists = pa.FixedSizeListArray.from_arrays(pa.array(x[a:b].ravel()), x.shape[1])
        table = {"embedding": lists} | {name: values[a:b] for name, values in columns.items()}
        pq.write_table(pa.table(table), folder / f"part-{part:05d}.parquet")
    return folder


def labels_in(out: Path) -> NDArray[np.int64]:
    table = pq.read_table(out / "labels.parquet")
    np.testing.assert_array_equal(table["row"].to_numpy(), np.arange(len(table)))
    return np.asarray(table["label"].to_numpy())


def test_labels_are_those_of_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = people(700)
    keys = [f"camera/{i}.jpg" for i in range(700)]
    features = write(tmp_path / "features", x, key=keys)
    out = tmp_path / "out"
    command = [
        "cluster",
        str(features),
        "--out",
        str(out),
        "--launcher",
        "inline",
        "--eps",
        "0.55",
        "--k1",
        "20",
    ]
    assert main([*command, "--centroids"]) == 0
    expected = pseudo_labels(x, eps=0.55, k1=20)
    assert expected.num_identities > 10
    np.testing.assert_array_equal(labels_in(out), expected.labels)
    assert pq.read_table(out / "labels.parquet")["key"].to_pylist() == keys
    result = json.loads((out / "clusters.json").read_text())
    assert result["clusters"] == expected.num_identities
    assert result["kept"] == (expected.labels >= 0).sum()
    assert result["independence_threshold"] == expected.independence_threshold
    centroids = pq.read_table(out / "centroids-00000.parquet")
    assert centroids["label"].to_pylist() == list(range(expected.num_identities))
    np.testing.assert_array_equal(np.stack(centroids["embedding"].to_numpy()), expected.centroids)
    told = f"{expected.num_identities} pseudo-identities of {result['kept']} of 700 rows"
    assert told in capsys.readouterr().out
    assert not (out / "neighbours").exists()
    # Once more: nothing to do, but for what a command left that was killed as it ended.
    (out / ".launch-1/0").mkdir(parents=True)
    assert main([*command, "--centroids"]) == 0
    assert f"{out} is finished\n{told}" in capsys.readouterr().out
    assert not (out / ".launch-1").exists()


def before_cameras(n: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """People whom each of three cameras shifts as it does all it sees: features, people, cameras."""
    rng = np.random.default_rng(1)
    who, where = rng.integers(n // 30, size=n), rng.integers(3, size=n)
    x = rng.standard_normal((n // 30, 32))[who] + 1.5 * rng.standard_normal((3, 32))[where]
    return np.asarray(x + 0.5 * rng.standard_normal((n, 32)), np.float32), who, where


def test_cameras_are_kept_out_where_asked(tmp_path: Path) -> None:
    """Numbers of cameras are names; lists are limited and features centred, by one worker as by two."""
    x, who, where = before_cameras(900)
    features = write(tmp_path / "features", x, camera=where * 10**9 + 7)

    def cluster(name: str, *words: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        out = tmp_path / name
        command = ["cluster", str(features), "--out", str(out), "--centroids", *words]
        assert main(command if "--launcher" in words else [*command, "--launcher", "inline"]) == 0
        parts = sorted(out.glob("centroids-*.parquet"))
        return labels_in(out), np.concatenate(
            [np.stack(pq.read_table(part)["embedding"].to_numpy()) for part in parts]
        )

    def recall(labels: NDArray[np.int64]) -> float:
        return cluster_report(labels, who)["pair_recall"]

    plain, share, centre = ("--k1", "20"), ("--same-camera-share", "0.25"), ("--centre-cameras", "true")
    as_they_are, limited = cluster("plain", *plain)[0], cluster("limited", *plain, *share)[0]
    labels, centroids = cluster("both", *plain, *share, *centre)
    assert recall(labels) > 0.9 > 0.6 > recall(as_they_are)
    rows = torch.from_numpy(x)
    lists = few_of_own_camera(self_knn(rows, 40), where, where, 20, 0.25)
    expected = sharded_pseudo_labels(rows, group=Group.of(len(x)), neighbours=lists, k1=20, device="cpu")
    np.testing.assert_array_equal(limited, expected.labels)
    assert not np.array_equal(limited, as_they_are)
    unit = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    for label, centroid in enumerate(centroids):  # of the features that were given, not of centred ones
        mean = unit[labels == label].mean(0)
        np.testing.assert_allclose(centroid, mean / np.linalg.norm(mean), atol=1e-6)
    two = cluster("two", *plain, *share, *centre, "--launcher", "torchrun", "--workers", "2")
    np.testing.assert_array_equal(two[0], labels)
    np.testing.assert_array_equal(two[1], centroids)


def test_a_folder_is_one_clustering(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = write(tmp_path / "features", people(200))
    out = str(tmp_path / "out")
    command = ["cluster", str(features), "--out", out, "--launcher", "inline"]
    assert main(command) == 0
    assert main([*command, "--eps", "0.5"]) == 2
    assert f"{out} holds another clustering (eps 0.6 -> 0.5): choose another --out" in capsys.readouterr().err
    write(tmp_path / "again", people(200) + 1)
    for part in (tmp_path / "again").iterdir():
        part.replace(features / part.name)
    assert main(command) == 2
    assert "holds another clustering (fingerprint " in capsys.readouterr().err


def test_what_other_starts_of_the_same_job_left_is_removed(tmp_path: Path) -> None:
    """One with more workers was killed behind its centroids, another behind its result."""
    features, out = write(tmp_path / "features", people(200)), tmp_path / "out"
    out.mkdir()
    (out / "centroids-00003.parquet").write_bytes(b"of the fourth worker")
    command = ["cluster", str(features), "--out", str(out), "--launcher", "inline", "--centroids"]
    assert main(command) == 0
    wanted = ["centroids-00000.parquet", "clusters.json", "job.json", "labels.parquet"]
    assert sorted(path.name for path in out.iterdir()) == wanted
    (out / "neighbours").mkdir()
    assert main(command) == 0
    assert sorted(path.name for path in out.iterdir()) == wanted


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--column", "row"], "wanted lists of float16, float32 or float64, found int64"),
        (["--eps", "1.5"], "cluster.eps must be between 0 and 1, found 1.5"),
        (["--launcher", "inline", "--workers", "2"], "--launcher inline is one process, found --workers 2"),
        (["--centre-cameras", "true"], "part-00000.parquet: wanted a column camera, found embedding ("),
    ],
)
def test_what_cannot_be_clustered_is_said(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = write(tmp_path / "features", people(60), row=np.arange(60))
    assert main(["cluster", str(features), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cameras_want_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = write(tmp_path / "features", people(60), camera=["door"] * 60)
    command = ["cluster", str(features), "--out", str(tmp_path / "out"), "--same-camera-share", "0.5"]
    assert main(command) == 2
    assert "column camera: wanted whole numbers, found string; number the cameras" in capsys.readouterr().err


def test_unknown_cameras_are_nobodys_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, _, where = before_cameras(300)
    known = pa.array([None, *where[1:].tolist()], pa.uint8())
    features = write(tmp_path / "features", x, parts=1, camera=known)
    np.testing.assert_array_equal(clustering.read_cameras(Features(features)), [-1, *where[1:]])
    command = ["cluster", str(features), "--out", str(tmp_path / "out"), "--launcher", "inline"]
    assert main([*command, "--centre-cameras", "true"]) == 0
    nobody = write(tmp_path / "nobody", people(60), camera=np.full(60, -1))
    assert main(["cluster", str(nobody), "--out", str(tmp_path / "no"), "--centre-cameras", "true"]) == 2
    assert "column camera: wanted cameras, found none that is known; leave" in capsys.readouterr().err


def test_identities_are_no_clustering(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = write(tmp_path / "features", people(60))
    assert main(["cluster", str(features), "--out", str(tmp_path / "out"), "--labels", "identities"]) == 2
    assert "there is no option --labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--eps", "wide", "--eps: cluster.eps wants a number, found 'wide'"),
        ("--k1", "0", "--k1: cluster.k1 must be at least 1, found 0"),
        ("--eps-gap", "0.7", "--eps-gap: cluster.eps_gap: wanted eps - eps_gap > 0"),
    ],
)
def test_a_wrong_value_is_told_by_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert main(["cluster", str(tmp_path), "--out", str(tmp_path / "out"), option, value]) == 2
    assert message in capsys.readouterr().err


def test_a_row_that_cannot_be_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = people(90)
    x[40] = 0
    features = write(tmp_path / "features", x)
    assert main(["cluster", str(features), "--out", str(tmp_path / "out"), "--launcher", "inline"]) == 2
    assert "row 40, which is zero, so it has no direction" in capsys.readouterr().err


def test_a_killed_job_goes_on_from_its_neighbours_with_other_workers(tmp_path: Path) -> None:
    x = people(12_000, 24)
    features, out = write(tmp_path / "features", x), tmp_path / "out"
    command = [sys.executable, "-m", "dmx", "cluster", str(features), "--out", str(out)]
    with subprocess.Popen([*command, "--launcher", "inline"], stderr=subprocess.PIPE) as job:
        deadline = time.monotonic() + 120
        while not list((out / "neighbours").glob("0*.safetensors")):
            assert job.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
    assert not (out / "clusters.json").exists()
    again = subprocess.run(
        [*command, "--launcher", "torchrun", "--workers", "2"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    assert "neighbours are kept from an earlier start" in again.stderr
    np.testing.assert_array_equal(labels_in(out), pseudo_labels(x).labels)


def test_kept_neighbours_of_a_worker_without_rows_are_as_wide_as_the_others(tmp_path: Path) -> None:
    """There may be more workers than images, the second time."""
    lists = {"indices": torch.zeros((3, 2), dtype=torch.int32), "similarities": torch.zeros(3, 2).double()}
    save_file(lists, tmp_path / f"{0:012d}-{3:012d}.safetensors")
    kept = clustering._read_neighbours(tmp_path, cast(Any, SimpleNamespace(first=3, own=0, rows=3)))
    assert kept is not None
    assert kept.indices.shape == kept.similarities.shape == (0, 2)
