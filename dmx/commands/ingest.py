"""Turn a data set, or people in videos, into shards that training reads in place.

Recognises the layouts of Market-1501, MSMT17, CUHK03-NP, RandPerson, UnrealPerson, PersonX, ClonedPerson,
DukeMTMC-reID, VeRi-776 and LUPerson, a folder for each identity, flat crops without labels (a folder or a zip
archive), and WebDataset tars. Counts are checked against the published ones. Images that cannot be decoded or
have no place in the layout are left out and listed, with their reason, in OUT/skipped.jsonl.

With --video, people are cut out of videos by a detector, or by the boxes of another program; each crop keeps
its camera, frame and box. Then OUT alone is given. Interrupted, the same command goes on.

  dmx ingest Market-1501-v15.09.15 data/market
  dmx ingest crops.zip data/crops
  dmx ingest people data/people --layout folder --camera-pattern '_c(\\d+)'
  dmx ingest --video cam1.mp4 --video cam2.mp4 data/ours --detector PekingU/rtdetr_v2_r18vd
  dmx ingest --video cam1.mp4 data/ours --boxes cam1.txt --identities tracks
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmx.commands.sources import add_layout_arguments, warn_as

if TYPE_CHECKING:
    from dmx.video.boxes import Boxes
    from dmx.video.detector import Detector
    from dmx.video.films import Film
    from dmx.video.ingest import Request, Tally

SUMMARY = "turn a data set, or people in videos, into shards"
LEAST_SCORE = 0.6
DEFAULT_FPS = 2.0
VIDEO_OPTIONS = (
    "detector", "boxes", "cameras", "score", "label", "every", "fps", "min_height", "aspect", "margin",
    "identities", "batch_size", "device",
)  # fmt: skip


class _TakeVideo(argparse.Action):
    """Keeps a video, after which OUT alone is wanted: it stands in the place of SOURCE."""

    def __init__(self, *args: Any, out: argparse.Action, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._out = out

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        self._out.required = False
        namespace.video = [*(namespace.video or []), values]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source", metavar="SOURCE", help="folder or archive of the data set; not with --video"
    )
    out = parser.add_argument(
        "out", metavar="OUT", help="folder to write: a local path or a URI such as s3://..."
    )
    add_layout_arguments(parser, "SOURCE")
    parser.add_argument(
        "--rows-per-shard",
        type=int,
        default=16384,
        metavar="N",
        help="images in a shard (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is already in OUT")
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="threads that decode (default: one a core)"
    )
    _add_video_arguments(parser, out)


def _add_video_arguments(parser: argparse.ArgumentParser, out: argparse.Action) -> None:
    group = parser.add_argument_group("people in videos")
    group.add_argument(
        "--video",
        action=_TakeVideo,
        out=out,
        metavar="PATH",
        help="a video, a folder of videos or a pattern; once for each. Every file is a camera of its own, "
        "counted from 1, unless --cameras or --camera-pattern tells",
    )
    group.add_argument(
        "--detector",
        metavar="NAME",
        help="folder of an object detector of transformers, or its name on the Hugging Face hub",
    )
    group.add_argument(
        "--boxes",
        action="append",
        metavar="FILE",
        help="boxes of another program instead, in the format of MOTChallenge; once for each video in the "
        "same order, or a folder with NAME.txt for each",
    )
    group.add_argument(
        "--cameras", metavar="N,N...", help="camera number of each --video, with commas between them"
    )
    group.add_argument(
        "--score",
        type=float,
        metavar="S",
        help=f"leave out boxes that are less sure (default: {LEAST_SCORE}; of --boxes none)",
    )
    group.add_argument(
        "--label", metavar="WORD", help="what the detector calls a person (default: person or pedestrian)"
    )
    pace = group.add_mutually_exclusive_group()
    pace.add_argument(
        "--every", type=int, metavar="N", help="look at every N-th frame (default with --boxes: 1)"
    )
    pace.add_argument(
        "--fps", type=float, metavar="F", help=f"look at F frames a second (default: {DEFAULT_FPS:g})"
    )
    group.add_argument(
        "--min-height", type=int, metavar="PX", help="leave out crops that are lower (default: 64)"
    )
    group.add_argument(
        "--aspect",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="leave out crops of another height by width (default: 1 6)",
    )
    group.add_argument(
        "--margin", type=float, metavar="M", help="widen boxes by this share on each side (default: 0)"
    )
    group.add_argument(
        "--identities",
        choices=("none", "tracks", "shared-tracks"),
        help="of --boxes: none; tracks: each id of each video is an identity; shared-tracks: ids mean the "
        "same people in all videos (default: none)",
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="frames a forward pass (default: 8)")
    group.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)"
    )


def run(args: argparse.Namespace) -> int:
    """Ingest, then print what was found."""
    from dmx.data.ingest import ingest, summary

    if args.video:
        return _run_video(args)
    _refuse_video_options(args)
    manifest = ingest(
        args.source,
        args.out,
        args.layout,
        rows_per_shard=args.rows_per_shard,
        overwrite=args.overwrite,
        camera=args.camera,
        camera_pattern=args.camera_pattern,
        workers=args.workers,
        warn=warn_as("ingest"),
    )
    print(summary(manifest))
    return 0


def _refuse_video_options(args: argparse.Namespace) -> None:
    from dmx.errors import DmxError

    for name in VIDEO_OPTIONS:
        if getattr(args, name) is not None:
            raise DmxError(f"--{name.replace('_', '-')}: wanted only with --video, found without it")


def _run_video(args: argparse.Namespace) -> int:
    from dmx.data.ingest import make_options, summary
    from dmx.video.films import find_films
    from dmx.video.ingest import ingest_videos, require

    _check_video(args)
    make_options(camera_pattern=args.camera_pattern)
    films = find_films(args.video, _numbers(args.cameras), args.camera_pattern)
    request = _request(args, films)
    require(request)
    manifest, tallies = ingest_videos(
        request,
        args.source,
        _people(args, films),
        rows_per_shard=args.rows_per_shard,
        overwrite=args.overwrite,
        warn=warn_as("ingest"),
    )
    print(_table(tallies))
    print(summary(manifest))
    return 0


def _check_video(args: argparse.Namespace) -> None:
    from dmx.errors import DmxError

    if args.out is not None:
        raise DmxError(
            f"with --video wanted OUT alone, found {args.source} and {args.out}; give every video with a "
            "--video of its own"
        )
    if (args.detector is None) == (args.boxes is None):
        raise DmxError(
            "--video: wanted --detector (a folder, or a name on the Hugging Face hub such as "
            "PekingU/rtdetr_v2_r18vd) or --boxes (a file of another program), found "
            f"{'neither' if args.detector is None else 'both'}"
        )
    if args.layout != "auto" or args.workers is not None or args.camera != "scene":
        raise DmxError(
            "--layout, --camera and --workers: wanted with images, found with --video; leave them out"
        )
    if args.boxes is None and args.identities not in (None, "none"):
        raise DmxError(
            "--identities: wanted with --boxes, found with --detector, which looks at each frame alone"
        )
    if args.score is not None and not 0 <= args.score <= 1:
        raise DmxError(f"--score: wanted a number from 0 to 1, found {args.score}")


def _numbers(text: str | None) -> list[int] | None:
    from dmx.errors import DmxError

    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise DmxError(f"--cameras: wanted numbers with commas between them, found {text!r}") from None


def _request(args: argparse.Namespace, films: Sequence[Film]) -> Request:
    from dmx.video.crops import Rules
    from dmx.video.decode import Stride
    from dmx.video.ingest import Request

    every, fps = args.every, args.fps
    if every is None and fps is None:
        every, fps = (1, None) if args.boxes else (None, DEFAULT_FPS)
    least, most = args.aspect or (Rules.least_aspect, Rules.most_aspect)
    rules = Rules(
        margin=Rules.margin if args.margin is None else args.margin,
        least_height_px=Rules.least_height_px if args.min_height is None else args.min_height,
        least_aspect=least,
        most_aspect=most,
    )
    batch_size = Request.batch_size if args.batch_size is None else args.batch_size
    return Request(films, Stride(every, fps), rules, batch_size, args.identities or "none")


def _people(args: argparse.Namespace, films: Sequence[Film]) -> Detector | dict[str, Boxes]:
    """Who finds them."""
    from dmx.video.decode import import_av

    import_av()  # before a detector is loaded, which takes longer
    if args.boxes is not None:
        from dmx.video.boxes import files_of_boxes, read_boxes

        paths = files_of_boxes(args.boxes, films)
        return {film.name: read_boxes(path, args.score) for film, path in zip(films, paths, strict=True)}
    from dmx.device import chosen_device
    from dmx.video.transformers_detector import load_detector

    return load_detector(
        args.detector,
        least_score=LEAST_SCORE if args.score is None else args.score,
        device=chosen_device(args.device or "auto", "--device"),
        label=args.label,
    )


def _table(tallies: Sequence[Tally]) -> str:
    """A line a video: which camera it is, and what came out of it."""
    lines = []
    for tally in tallies:
        refused = tally.refused
        left_out = f", {refused.small:,} too low and {refused.odd:,} of another shape left out"
        lines.append(
            f"camera {tally.film.camera}: {tally.film.name}, {tally.frames:,} frames looked at, "
            f"{tally.crops:,} crops{left_out if refused.small or refused.odd else ''}"
        )
    return "\n".join(lines)
