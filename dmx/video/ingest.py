"""Videos in, shards of person crops out: each crop keeps its camera, frame and box.

A thread decodes ahead, the detector looks at a batch of frames at a time, and threads encode; what is in
memory does not grow with the length of a video. Batches depend on the video and the settings alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dmx.cores import cores
from dmx.data.ingest import warn_dataset
from dmx.data.manifest import Manifest
from dmx.data.prefetch import map_ahead
from dmx.data.shards import DatasetWriter
from dmx.data.storage import locate
from dmx.data.writer import ROWS_PER_SHARD, VIDEO_SCHEMA
from dmx.errors import DmxError
from dmx.progress import Bar, progress_bar
from dmx.video.boxes import Boxes
from dmx.video.crops import Refused, Rules, cut, encode
from dmx.video.decode import Frame, Stride, Video, import_av, open_video
from dmx.video.detector import Detector, Found
from dmx.video.films import Film
from dmx.video.finders import BoxesFinder, DetectorFinder, Finder
from dmx.video.journal import Journal

LAYOUT = "video"
SPLIT = "train"
# Batches of frames that wait for the detector.
AHEAD = 2
IDENTITIES = ("none", "tracks", "shared-tracks")


@dataclass(frozen=True)
class Request:
    """What is cut out of which videos.

    Attributes:
        films: the videos.
        stride: which frames are looked at.
        rules: which boxes become crops.
        batch_size: frames that a detector gets at a time.
        identities: `none`: unknown; `tracks`: a track is an identity of its own, numbered through all videos;
            `shared-tracks`: the number of a track is that of the identity in every video.
    """

    films: Sequence[Film]
    stride: Stride
    rules: Rules = field(default_factory=Rules)
    batch_size: int = 8
    identities: str = "none"


@dataclass
class Tally:
    """What came out of one video: frames looked at, boxes in them, crops; and what was left out."""

    film: Film
    frames: int = 0
    boxes: int = 0
    crops: int = 0
    refused: Refused = field(default_factory=Refused)


@dataclass(frozen=True)
class _Crop:
    """A crop before it is encoded."""

    frame: Frame
    box: list[int]
    score: float
    track: int


class _Numbers:
    """Identities of tracks, in the order in which they appear."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._known: dict[tuple[str, int], int] = {}

    def of(self, film: Film, track: int) -> int:
        if track < 0 or self._kind == "none":
            return -1
        if self._kind == "shared-tracks":
            return track
        return self._known.setdefault((film.name, track), len(self._known))


def ingest_videos(
    request: Request,
    out: str | Path,
    source: Detector | dict[str, Boxes],
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    overwrite: bool = False,
    warn: Callable[[str], None] = warn_dataset,
) -> tuple[Manifest, list[Tally]]:
    """Cut people out of videos into shards.

    `out` changes only at the end. What a detector found is kept there meanwhile, where that is a local
    folder, so that the same call after an interruption goes on and ends with the same shards.

    Args:
        request: what is cut out of which videos.
        out: local path or URI of the folder to write.
        source: finds the people, or their boxes by the names of the videos.
        rows_per_shard: crops in a shard.
        overwrite: replace a data set that is already in `out`.
        warn: called with each sentence about what is wrong with a video.

    Returns:
        The manifest that was written, and what came out of each video.

    Raises:
        DmxError: a video that was named cannot be read, no crop comes out, or `out` holds something already.
    """
    require(request)
    videos, unreadable = _open_all(request.films)
    writer = DatasetWriter(
        out,
        layout=LAYOUT,
        rows_per_shard=rows_per_shard,
        overwrite=overwrite,
        more_columns=VIDEO_SCHEMA,
    )
    if isinstance(source, dict):
        finder: Finder = BoxesFinder(source)
        journal = Journal(None, {})  # looking up takes no time
    else:
        journal = Journal(_local_folder(out), _settings(request, source))
        finder = DetectorFinder(source, journal)
    with writer:
        for film, reason in unreadable:
            writer.skip(film.name, reason)
            writer.warnings.append(f"left out: {reason}")
        with journal:
            tallies = _read_all(request, videos, finder, writer)
        _require_crops(request, tallies)
    journal.delete()
    for message in writer.warnings:
        warn(message)
    if writer.manifest is None:
        raise RuntimeError("the writer left no manifest")
    return writer.manifest, tallies


def require(request: Request) -> None:
    """Check numbers before anything is opened.

    Raises:
        DmxError: one is out of its range.
    """
    stride, rules = request.stride, request.rules
    if (stride.every is None) == (stride.fps is None):
        raise DmxError("wanted either --every or --fps, found both or neither")
    limits: list[tuple[str, float | None, float]] = [
        ("--every", stride.every, 1),
        ("--batch-size", request.batch_size, 1),
        ("--min-height", rules.least_height_px, 1),
        ("--margin", rules.margin, 0),
    ]
    for option, value, least in limits:
        if value is not None and value < least:
            raise DmxError(f"{option}: wanted at least {least:g}, found {value}")
    if stride.fps is not None and not stride.fps > 0:
        raise DmxError(f"--fps: wanted more than 0 frames a second, found {stride.fps}")
    if not 0 < rules.least_aspect <= rules.most_aspect:
        raise DmxError(
            "--aspect: wanted the least and the most height by width, above 0, found "
            f"{rules.least_aspect} and {rules.most_aspect}"
        )
    if request.identities not in IDENTITIES:
        raise DmxError(f"--identities: wanted {' or '.join(IDENTITIES)}, found {request.identities!r}")
    for film in request.films:
        if not 0 <= film.camera < 2**31:
            raise DmxError(f"{film.path}: wanted a camera number from 0 to {2**31 - 1}, found {film.camera}")


def _open_all(films: Sequence[Film]) -> tuple[dict[str, Video], list[tuple[Film, str]]]:
    """Every video by its name; those of a folder that cannot be read, with the reason."""
    videos: dict[str, Video] = {}
    unreadable: list[tuple[Film, str]] = []
    for film in films:
        try:
            videos[film.name] = open_video(film.path)
        except DmxError as error:
            if film.asked_for:
                raise
            unreadable.append((film, str(error)))
    if not videos:
        raise DmxError(
            f"wanted a video that can be read, found {len(films)} that cannot, the first: {unreadable[0][1]}"
        )
    return videos, unreadable


def _local_folder(out: str | Path) -> Path | None:
    location = locate(out)
    return Path(location.path) if location.is_local else None


def _settings(request: Request, detector: Detector) -> dict[str, Any]:
    """What detections depend on."""
    return {
        "detector": detector.fingerprint,
        "decoder": import_av().__version__,
        "stride": asdict(request.stride),
        "batch_size": request.batch_size,
        "films": [
            [film.name, stat.st_size, stat.st_mtime_ns]
            for film, stat in ((film, film.path.stat()) for film in request.films)
        ],
    }


def _read_all(
    request: Request, videos: dict[str, Video], finder: Finder, writer: DatasetWriter
) -> list[Tally]:
    expected = [video.expected(request.stride) for video in videos.values()]
    total = None if None in expected else sum(count or 0 for count in expected)
    numbers, tallies = _Numbers(request.identities), []
    with (
        ThreadPoolExecutor(cores(), thread_name_prefix="encode") as pool,
        progress_bar(total, "ingest", "frames") as bar,
    ):
        for film in request.films:
            if film.name not in videos:
                continue
            video, tally = videos[film.name], Tally(film)
            tallies.append(tally)
            crops = _crops(request, video, finder, tally, bar, sum(t.crops for t in tallies))
            with closing(crops):
                for crop, encoded in map_ahead(pool, _encoded, crops, 2 * cores()):
                    _add(writer, film, crop, encoded, numbers)
            writer.warnings += _complaints(film, video, finder, tally)
    return tallies


def _crops(
    request: Request, video: Video, finder: Finder, tally: Tally, bar: Bar, before: int
) -> Generator[_Crop, None, None]:
    """What is cut out of one video, counted in `tally`; `before`: crops of the videos before it."""
    taken = batches(video.frames(request.stride), request.batch_size)
    with closing(taken), closing(_ahead(taken)) as ready:
        for frames in ready:
            for frame, people in zip(frames, finder.find(tally.film, frames), strict=True):
                yield from _cut_out(frame, people, request.rules, tally)
            tally.frames += len(frames)
            bar.set_postfix_str(f"{before + tally.crops:,} crops", refresh=False)
            bar.update(len(frames))


def batches(frames: Iterable[Frame], size: int) -> Generator[list[Frame], None, None]:
    """Up to `size` frames at a time, which are of one size: a video may change it on the way."""
    batch: list[Frame] = []
    for frame in frames:
        if batch and (len(batch) == size or batch[0].pixels.shape != frame.pixels.shape):
            yield batch
            batch = []
        batch.append(frame)
    if batch:
        yield batch


def _ahead(taken: Iterator[list[Frame]]) -> Generator[list[Frame], None, None]:
    """The same, taken in a thread while the last ones are looked at."""
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        results = map_ahead(pool, lambda _: next(taken, None), itertools.count(), AHEAD)
        while batch := next(results):
            yield batch


def _cut_out(frame: Frame, people: Found, rules: Rules, tally: Tally) -> Iterator[_Crop]:
    height, width = frame.pixels.shape[:2]
    tally.boxes += len(people)
    for box, score, track in zip(
        people.boxes.tolist(), people.scores.tolist(), people.tracks.tolist(), strict=True
    ):
        pixels = cut(box, height, width, rules, tally.refused)
        if pixels is not None:
            tally.crops += 1
            yield _Crop(frame, pixels, score, track)


def _encoded(crop: _Crop) -> tuple[_Crop, bytes]:
    return crop, encode(crop.frame.pixels, crop.box)


def _add(writer: DatasetWriter, film: Film, crop: _Crop, encoded: bytes, numbers: _Numbers) -> None:
    key = f"{film.name}#frame={crop.frame.number}&box={','.join(map(str, crop.box))}"
    more = {
        "source": film.name,
        "frame": crop.frame.number,
        "time_s": crop.frame.time_s,
        "box": crop.box,
        "score": crop.score,
        "track": crop.track,
    }
    writer.add(SPLIT, encoded, numbers.of(film, crop.track), film.camera, key, more)


def _complaints(film: Film, video: Video, finder: Finder, tally: Tally) -> list[str]:
    said = video.complaints()
    if isinstance(finder, BoxesFinder):
        said += finder.complaints(film, video.condition.frames)
    if tally.crops == 0:
        said.append(f"{film.path}: no crop came out of it: {_told(tally)}")
    return said


def _told(tally: Tally) -> str:
    return (
        f"{tally.frames:,} frames were looked at, with {tally.boxes:,} boxes of people, of which "
        f"{tally.refused.small:,} are too low and {tally.refused.odd:,} of another shape than a person"
    )


def _require_crops(request: Request, tallies: Sequence[Tally]) -> None:
    if any(tally.crops for tally in tallies):
        return
    lines = "".join(f"\n  {tally.film.path}: {_told(tally)}" for tally in tallies[:3])
    rules = request.rules
    raise DmxError(
        "wanted people in the videos, found no crop. Lower --score or --min-height (now "
        f"{rules.least_height_px}), widen --aspect (now {rules.least_aspect:g} {rules.most_aspect:g}), look "
        f"at more frames, or take another detector{lines}"
    )
