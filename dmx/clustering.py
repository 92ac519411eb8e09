"""`dmx cluster`: features in Parquet to pseudo-labels, by as many workers as there are.

Each worker reads an equal share of the rows. The neighbours, which take by far the longest, are kept in OUT
until the job is finished: one that was interrupted, or whose workers were started again, goes on from there,
also with another number of workers.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from dmx.cluster.reliability import Fate
from dmx.cluster.sharded import Group, ShardedPseudoLabels, sharded_pseudo_labels
from dmx.cluster.validation import as_features
from dmx.distributed import World, meet, use_cores, world
from dmx.errors import DmxError
from dmx.features import Features
from dmx.kernels.knn import Neighbours
from dmx.kernels.progress import listening
from dmx.neighbours import Cameras, as_clustered, find_neighbours, label_settings
from dmx.progress import progress_bar, say, silence
from dmx.sections import ClusterConfig
from dmx.writing import whole_file, write_whole, writing

TASK = "dmx.clustering:cluster_worker"
LABELS, RESULT, JOB = "labels.parquet", "clusters.json", "job.json"
NEIGHBOURS = "neighbours"
CENTROIDS = "centroids-{}.parquet"
CAMERA = "camera"  # the column that says which camera took an image
KEY_ROWS = 1 << 16  # rows whose keys are copied at a time
_NOT_COMPARED = ("settings", "timeout_s")
SAVED_ROWS = 1 << 17  # rows of neighbours in a file: 50 MB at k1 = 30


@dataclass(frozen=True)
class ClusterJob:
    """What is clustered, and how.

    Attributes:
        features: path or URI of Parquet.
        column: of the features; None as `Features` chooses.
        fingerprint: of the features, so that kept neighbours are not taken for those of others.
        settings: as of training.
        independence_threshold: of an earlier clustering; None to derive it.
        centroids: also write the mean of each pseudo-identity.
        timeout_s: how long a worker waits for the others, seconds.
    """

    features: str
    column: str | None
    fingerprint: str
    settings: ClusterConfig
    independence_threshold: float | None
    centroids: bool
    timeout_s: float

    @staticmethod
    def read(folder: Path) -> ClusterJob:
        """The job that was written into a folder."""
        tree = json.loads((folder / JOB).read_text(encoding="utf-8"))
        return ClusterJob(**{**tree, "settings": ClusterConfig(**tree["settings"])})

    def write(self, folder: Path) -> None:
        """Write the job into a folder, for its workers.

        Raises:
            DmxError: the folder holds another job's result or beginning, or cannot be written to.
        """
        with writing(folder, "the clustering"):
            self._write(folder)

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tree = dataclasses.asdict(self)
        if (folder / JOB).exists():
            saved = _flat(json.loads((folder / JOB).read_text(encoding="utf-8")))
            changed = {name: value for name, value in _flat(tree).items() if value != saved.get(name)}
            if changed:
                told = ", ".join(
                    f"{name} {saved.get(name)!r} -> {value!r}" for name, value in changed.items()
                )
                raise DmxError(
                    f"{folder} holds another clustering ({told}): choose another --out, or remove this one"
                )
        write_whole(folder / JOB, json.dumps(tree, indent=1) + "\n")


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """What decides about the labels, by name."""
    return {name: value for name, value in (tree | tree["settings"]).items() if name not in _NOT_COMPARED}


def cluster_worker(folder: str, *, local: tuple[int, int] | None = None) -> None:
    """Be one worker of the job in `folder`, to its end.

    Args:
        folder: with `job.json`, seen by all hosts; gets labels.parquet and clusters.json.
        local: (local rank, workers on this host) where the environment does not tell.
    """
    out = Path(folder)
    job = ClusterJob.read(out)
    with world(job.timeout_s, local) as place, listening(progress_bar):
        use_cores(place)
        if not place.leads:
            silence()
        meet(place, "the start of clustering")
        features = Features(job.features, job.column)
        timings: dict[str, float] = {}
        with _timed(place, timings, "read"):
            bounds = [len(features) * rank // place.size for rank in range(place.size + 1)]
            begin, end = bounds[place.rank], bounds[place.rank + 1]
            group = Group(None, place.rank, place.size, tuple(bounds))
            rows, squares = _prepared(job, group, place, features.read_rows(begin, end))
            cameras = read_cameras(features) if job.settings.needs_cameras else None
        with _timed(place, timings, "neighbours"):
            seen, seen_squares = as_clustered(group, rows, squares, job.settings, cameras)
            neighbours = _neighbours(job, group, place, out / NEIGHBOURS, seen, seen_squares, cameras)
        with _timed(place, timings, "cluster"):
            found = sharded_pseudo_labels(
                seen,
                group=group,
                device=place.device.type,
                neighbours=neighbours,
                centroids_of=(rows, squares),
                independence_threshold=job.independence_threshold,
                **label_settings(job.settings),
            )
        with writing(out, "the labels", stays="neighbours are kept"):
            _write(job, features, place, out, found, timings)


@contextmanager
def _timed(place: World, timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    timings[f"{name}_s"] = round(time.monotonic() - start, 3)
    if place.leads:
        say(f"{name}: {timings[f'{name}_s']:.1f} s")


def read_cameras(features: Features) -> NDArray[np.int32]:
    """(N,) which camera took the image of each row, numbered from 0; -1 where that is unknown.

    Raises:
        DmxError: no column `camera` of whole numbers, or no number in it; names it.
    """
    column = features.read_column(CAMERA)
    if not pa.types.is_integer(column.type):
        raise DmxError(
            f"{features.path}: column {CAMERA}: wanted whole numbers, found {column.type}; number the cameras"
        )
    given = column.cast(pa.int64()).fill_null(-1).to_numpy()
    if given.max(initial=-1) < 0:
        raise DmxError(
            f"{features.path}: column {CAMERA}: wanted cameras, found none that is known; leave "
            "--centre-cameras and --same-camera-share out"
        )
    cameras = np.full(len(given), -1, np.int32)
    # Whoever wrote them may have numbered them as they liked.
    cameras[given >= 0] = np.unique(given[given >= 0], return_inverse=True)[1]
    return cameras


def _neighbours(
    job: ClusterJob, group: Group, place: World, folder: Path, rows: torch.Tensor, squares: torch.Tensor,
    cameras: Cameras,
) -> Neighbours:  # fmt: skip
    """Kept ones, or new ones that are kept from now on."""
    kept = _read_neighbours(folder, group)
    everybody_has = int(group.collect([kept is not None], "word of neighbours that are kept").min())
    if kept is not None and everybody_has:
        if place.leads:
            say("neighbours are kept from an earlier start")
        return Neighbours(kept.indices.to(place.device), kept.similarities.to(place.device))
    found = find_neighbours(group, rows, squares, job.settings, cameras)
    with writing(folder, "neighbours to go on from", stays="those of the rows before these are kept"):
        _keep_neighbours(folder, found, group, place)
    meet(place, "keeping the neighbours")
    return found


def _keep_neighbours(folder: Path, found: Neighbours, group: Group, place: World) -> None:
    folder.mkdir(exist_ok=True)
    for begin in range(0, group.own, SAVED_ROWS):
        end = min(begin + SAVED_ROWS, group.own)
        name = f"{group.first + begin:012d}-{group.first + end:012d}.safetensors"
        tensors = {"indices": found.indices[begin:end], "similarities": found.similarities[begin:end]}
        temporary = folder / f".{name}.{place.rank}"
        try:
            save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, temporary)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def _read_neighbours(folder: Path, group: Group) -> Neighbours | None:
    """Kept neighbours of this worker's rows; None unless those of all rows are there."""
    files = sorted(folder.glob("*.safetensors"))
    spans = [tuple(int(part) for part in file.stem.split("-")) for file in files]
    reached = 0
    for begin, end in spans:
        if begin > reached:
            return None
        reached = max(reached, end)
    if reached < group.rows:
        return None
    indices, similarities, at = [], [], group.first
    for file, (begin, end) in zip(files, spans, strict=True):
        last = min(end, group.first + group.own)
        if begin <= at < last:
            with safe_open(file, "pt") as saved:
                indices.append(saved.get_slice("indices")[at - begin : last - begin])
                similarities.append(saved.get_slice("similarities")[at - begin : last - begin])
            at = last
    if not indices:
        with safe_open(files[0], "pt") as saved:
            columns = saved.get_slice("indices").get_shape()[1]
        return Neighbours(torch.empty((0, columns), dtype=torch.int32), torch.empty((0, columns)).double())
    return Neighbours(torch.cat(indices), torch.cat(similarities))


def _prepared(
    job: ClusterJob, group: Group, place: World, rows: NDArray[np.float32]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as the kernels take them, and their squared lengths."""
    try:
        return as_features(rows, place.device.type, may_be_empty=True)
    except ValueError as error:
        where = f", in the rows from {group.first} on" if group.first else ""
        raise DmxError(f"{job.features}{where}: {error}") from error


def _write(
    job: ClusterJob, features: Features, place: World, out: Path, found: ShardedPseudoLabels,
    timings: dict[str, float],
) -> None:  # fmt: skip
    """Centroids by every worker; the rest by the first."""
    if job.centroids:
        first = found.num_identities * place.rank // place.size
        _write_centroids(out / CENTROIDS.format(f"{place.rank:05d}"), first, found.centroids.cpu().numpy())
    meet(place, "writing the centroids")
    if not place.leads:
        return
    for left in out.glob(CENTROIDS.format("*")):  # of an earlier start with more workers
        if left.name > CENTROIDS.format(f"{place.size - 1:05d}") or not job.centroids:
            left.unlink()
    _write_labels(out / LABELS, features, found)
    kept = int((found.labels >= 0).sum())
    result = {
        "features": job.features,
        "rows": len(features),
        "width": features.width,
        "clusters": found.num_identities,
        "kept": kept,
        "dropped": _dropped(found),
        "independence_threshold": found.independence_threshold,
        "settings": dataclasses.asdict(job.settings),
        "workers": place.size,
        **timings,
    }
    write_whole(out / RESULT, json.dumps(result, indent=1) + "\n")
    remove_beginnings(out)


def remove_beginnings(out: Path) -> None:
    """Remove what only an unfinished job needs; one that was killed behind its result has it still."""
    shutil.rmtree(out / NEIGHBOURS, ignore_errors=True)


def _dropped(found: ShardedPseudoLabels) -> dict[str, int]:
    """How many rows were dropped for which reason, as the first worker knows."""
    assert found.evidence is not None
    counts = np.bincount(found.evidence.fates, minlength=len(Fate))
    return {fate.name.lower(): int(counts[fate]) for fate in Fate if fate != Fate.KEPT}


def _write_labels(path: Path, features: Features, found: ShardedPseudoLabels) -> None:
    """Columns row, key where the features have one, and label."""
    keyed = "key" in features.columns
    fields = [("row", pa.int64()), *([("key", pa.string())] if keyed else []), ("label", pa.int64())]
    with (
        whole_file(path, "the labels") as temporary,
        pq.ParquetWriter(temporary, pa.schema(fields)) as writer,
    ):
        for begin in range(0, len(features), KEY_ROWS):
            end = min(begin + KEY_ROWS, len(features))
            columns: dict[str, Any] = {"row": np.arange(begin, end)}
            if keyed:
                columns["key"] = features.read_column("key", begin, end)
            columns["label"] = found.labels[begin:end]
            writer.write_table(pa.table(columns, schema=pa.schema(fields)))


def _write_centroids(path: Path, first: int, centroids: NDArray[np.float32]) -> None:
    width = centroids.shape[1]
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(centroids.ravel()), width)
    labels = pa.array(np.arange(first, first + len(centroids)))
    with whole_file(path, "the centroids") as temporary:
        pq.write_table(pa.table({"label": labels, "embedding": embedding}), temporary)
