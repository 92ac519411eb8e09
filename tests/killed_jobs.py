"""The commands that are killed, on little data: what they are given, and what their results must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import yaml
from jobs import run_difference
from runs import clusters_of, write_run
from safetensors import SafetensorError, safe_open

from dmx.checksums import damage
from dmx.train.checkpoint import latest

TEMPORARY = (".tmp", ".part")
KEPT = {".writer"}  # hidden files that belong to a result
CROPS, SHARD_ROWS = 6000, 500
EMBED_SHARDS, PEOPLE_A_SHARD = 8, 4
FEATURES, FEATURE_PEOPLE, WIDTH = 8000, 400, 64


@dataclass(frozen=True)
class Job:
    """A command, and what its results are.

    Attributes:
        name: what it is called.
        folder: where it runs; its results lie there, too.
        words: the command, but for where its results go.
        place: the words that tell where.
        begun: whether it has written anything there.
        partial: what has a final name and is not whole, beside the undisturbed results.
        differences: from the undisturbed results, once it is through.
        refuses: whether it refuses to write where results are, which are whole then.
        heals: whether it starts processes again that were killed.
    """

    name: str
    folder: Path
    words: list[str]
    place: Callable[[Path], list[str]]
    begun: Callable[[Path], bool]
    partial: Callable[[Path, Path], list[str]]
    differences: Callable[[Path, Path], list[str]]
    refuses: bool = False
    heals: bool = False

    def left(self, out: Path) -> list[str]:
        """Temporary files in the results of a command that is through, and beside them."""
        inside = [path for path in out.rglob("*") if is_temporary(path) and path.name not in KEPT]
        return [str(path) for path in [*inside, *out.parent.glob(f".{out.name}*")]]


def is_temporary(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(TEMPORARY)


def contents(folder: Path, but: Collection[str] = ()) -> dict[str, bytes]:
    """Files below a folder by name: those that are not temporary."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(is_temporary(part) for part in (path, *path.relative_to(folder).parents))
        and path.name not in but
    }


def unlike(out: Path, whole: Path, but: Collection[str] = ()) -> list[str]:
    """Files that are not as in the undisturbed results, to the byte."""
    wanted = contents(whole, but)
    return [name for name, content in contents(out, but).items() if content != wanted.get(name)]


def missing(out: Path, whole: Path) -> list[str]:
    return sorted(contents(whole).keys() - contents(out).keys())


def same_bytes(out: Path, whole: Path, but: Collection[str] = ()) -> list[str]:
    return [f"other {name}" for name in unlike(out, whole, but)] + [
        f"no {name}" for name in missing(out, whole)
    ]


def _json(file: Path, but: Callable[[str], bool] = lambda name: False) -> dict[str, Any]:
    """The entries of a file of JSON; none when it is not there."""
    tree = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: value for name, value in tree.items() if not but(name)}


def _unreadable(files: Collection[Path]) -> list[str]:
    found = []
    for file in files:
        try:
            with safe_open(file, "pt") as saved:
                for name in saved.keys():  # noqa: SIM118  # no mapping
                    saved.get_tensor(name)
        except (OSError, SafetensorError) as error:
            found.append(f"{file.name}: {error}")
    return found


def ingest(folder: Path) -> Job:
    """Many small crops, in many shards."""
    crops = folder / "crops"
    if not crops.exists():
        crops.mkdir()
        for number in range(CROPS):
            data = tiny.picture_of(6, number % 40, number % 3, number)
            (crops / f"{number:05d}.jpg").write_bytes(data)
    return Job(
        "ingest",
        folder,
        ["ingest", str(crops), "--layout", "crops", "--rows-per-shard", str(SHARD_ROWS)],
        place=lambda out: [str(out)],
        begun=lambda out: out.exists() and any(out.iterdir()),
        partial=lambda out, whole: unlike(out, whole) if out.exists() else [],
        differences=same_bytes,
        refuses=True,
    )


def synth(folder: Path) -> Job:
    """A few people as a test set, by two processes."""
    size = ["--identities", "8", "--cameras", "2", "--images", "6", "--height", "64", "--jobs", "2"]
    return Job(
        "synth",
        folder,
        ["synth", "--style", "campus", "--split", "test", *size],
        place=lambda out: [str(out)],
        begun=lambda out: any(out.rglob("*.jpg")),
        partial=lambda out, whole: unlike(out, whole) if out.exists() else [],
        differences=same_bytes,
    )


def _settings(folder: Path) -> dict[str, Any]:
    """Of the tiny run, which its data lie beside; written once."""
    file = folder / "tiny.yaml"
    if not file.exists():
        settings = tiny.tiny_settings(folder / "data")
        settings["schedule"] |= {"epochs": 2, "stage_two_epoch": 1, "steps_per_epoch": 10}
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def _model(folder: Path) -> Path:
    run = folder / "model"
    return run if run.exists() else write_run(run, _settings(folder), seed=3)


def embed(folder: Path) -> Job:
    """Many small shards; images are enlarged, so that it takes some seconds."""
    shards = folder / "shards"
    if not shards.exists():
        people = EMBED_SHARDS * PEOPLE_A_SHARD
        tiny.write_set(shards, 4, {"train": people}, PEOPLE_A_SHARD * tiny.CAMERAS * tiny.PER_CAMERA)

    def differences(out: Path, whole: Path) -> list[str]:
        found = same_bytes(out, whole, {"embeddings.json"})
        a, b = _json(out / "embeddings.json"), _json(whole / "embeddings.json")
        return found + (["other embeddings.json"] if a != b else [])

    return Job(
        "embed",
        folder,
        ["embed", str(_model(folder)), str(shards), "--height", "128", "--width", "64", "--timeout", "60"],
        place=lambda out: ["--out", str(out)],
        begun=lambda out: (out / "embeddings.json").exists(),
        partial=lambda out, whole: unlike(out, whole, {"embeddings.json"}) if out.exists() else [],
        differences=differences,
    )


def cluster(folder: Path) -> Job:
    """Drawn features, by one process."""
    return _cluster(folder, "cluster", "inline")


def cluster_ray(folder: Path) -> Job:
    """The same by a worker of Ray."""
    return _cluster(folder, "cluster-ray", "ray")


def _cluster(folder: Path, name: str, launcher: str) -> Job:
    features = folder / "features.parquet"
    if not features.exists():
        rng = np.random.default_rng(5)
        people, shape = rng.normal(size=(FEATURE_PEOPLE, 1, WIDTH)), (FEATURE_PEOPLE, -1, WIDTH)
        rows = people + 0.5 * rng.normal(size=(FEATURES, WIDTH)).reshape(shape)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(np.float32).ravel()), WIDTH)
        pq.write_table(pa.table({"embedding": lists}), features)

    def timed(name: str) -> bool:
        return name.endswith("_s")

    def partial(out: Path, whole: Path) -> list[str]:
        if not out.exists():
            return []
        kept = list((out / "neighbours").glob("*.safetensors"))
        _json(out / "clusters.json")
        names = {"clusters.json", *(file.name for file in kept)}
        return unlike(out, whole, names) + _unreadable(kept)

    def differences(out: Path, whole: Path) -> list[str]:
        found = same_bytes(out, whole, {"clusters.json"})
        a, b = (_json(x / "clusters.json", timed) for x in (out, whole))
        return found + (["other clusters.json"] if a != b else [])

    return Job(
        name,
        folder,
        ["cluster", str(features), "--launcher", launcher, "--centroids"],
        place=lambda out: ["--out", str(out)],
        begun=lambda out: (out / "job.json").exists(),
        partial=partial,
        differences=differences,
        heals=launcher == "ray",
    )


def _train(folder: Path, name: str, *launcher: str) -> Job:
    _settings(folder)

    def partial(out: Path, whole: Path) -> list[str]:
        checkpoints = list(out.glob("checkpoints/step-*"))
        found = [told for path in checkpoints if (told := damage(path)) is not None]
        named = latest(out)
        if named is not None and named not in checkpoints:
            found.append(f"latest names {named}, which is not there")
        _json(out / "result.json")
        return found + _unreadable(list(out.glob("clusters/*.safetensors")))

    def differences(out: Path, whole: Path) -> list[str]:
        found = [told] if (told := run_difference(out, whole)) else []
        return found + (["other clusters"] if clusters_of(out) != clusters_of(whole) else [])

    return Job(
        name,
        folder,
        ["train", "--recipe", str(folder / "tiny.yaml"), "--launcher", *launcher],
        place=lambda out: ["--run", str(out)],
        begun=lambda out: (out / "metrics.jsonl").exists(),
        partial=partial,
        differences=differences,
        heals="inline" not in launcher,
    )


def train(folder: Path) -> Job:
    """The tiny run over two epochs, in one process."""
    return _train(folder, "train", "inline")


def train_torchrun(folder: Path) -> Job:
    """The same on two processes of torchrun."""
    return _train(folder, "train-torchrun", "torchrun", "--workers", "2")


def train_ray(folder: Path) -> Job:
    """The same on two workers of Ray."""
    return _train(folder, "train-ray", "ray", "--workers", "2")


def export(folder: Path) -> Job:
    """An untrained model, in all formats."""
    return Job(
        "export",
        folder,
        ["export", str(_model(folder))],
        place=lambda out: [str(out)],
        begun=lambda out: out.exists() or out.with_name(f".{out.name}.tmp").exists(),
        partial=lambda out, whole: same_bytes(out, whole) if out.exists() else [],
        differences=same_bytes,
        refuses=True,
    )


# `...-ray` and the like are the same command under other launchers.
JOBS: dict[str, Callable[[Path], Job]] = {
    "ingest": ingest,
    "synth": synth,
    "embed": embed,
    "cluster": cluster,
    "train": train,
    "export": export,
    "cluster-ray": cluster_ray,
    "train-torchrun": train_torchrun,
    "train-ray": train_ray,
}
