"""Videos: which frames come out of them, which boxes become crops, and what is said of broken ones."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from footage import RATE, write_video
from numpy.typing import NDArray
from PIL import Image

from dmx.cli import build_parser, main
from dmx.data import writer as writer_module
from dmx.data.dataset import open_dataset
from dmx.data.images import decode
from dmx.data.manifest import read_manifest
from dmx.data.shards import DatasetWriter, ShardSplit
from dmx.errors import DmxError
from dmx.video.boxes import files_of_boxes, read_boxes
from dmx.video.crops import Refused, Rules, cut
from dmx.video.decode import Frame, Stride, open_video
from dmx.video.films import Film, find_films
from dmx.video.ingest import AHEAD, Request, _ahead, batches, ingest_videos

ALL = Stride(every=1)
FRAMES = 40


def grey(number: int) -> int:
    return 30 + 5 * number


def painted(count: int = FRAMES, height: int = 96, width: int = 160) -> list[NDArray[np.uint8]]:
    """Frames whose grey tells their number; a red square in the upper left corner."""
    frames = []
    for number in range(count):
        frame = np.full((height, width, 3), grey(number), np.uint8)
        frame[:32, :32] = (220, 20, 20)
        frames.append(frame)
    return frames


def numbers_seen(frames: list[Frame]) -> list[int]:
    """The numbers that the pixels tell."""
    return [round((float(frame.pixels[-20:, -20:].mean()) - 30) / 5) for frame in frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="module")
def film(folder: Path) -> Path:
    # A key frame in every ten, as cameras write them.
    return write_video(folder / "plain.mkv", painted(), options={"g": "10"})


@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", "mp4"), ("libx265", "mp4"), ("mpeg4", "avi"), ("libx264", "ts")]
)
def test_frames_come_in_order_with_number_and_time(tmp_path: Path, codec: str, suffix: str) -> None:
    options = {"b": "8M"} if codec == "mpeg4" else {}
    video = open_video(write_video(tmp_path / f"film.{suffix}", painted(25), codec, options=options))
    frames = list(video.frames(ALL))
    assert [frame.number for frame in frames] == numbers_seen(frames) == list(range(25))
    assert [frame.time_s for frame in frames] == pytest.approx([number / RATE for number in range(25)])
    assert video.complaints() == []


def test_strides_by_number_and_by_time(film: Path) -> None:
    video = open_video(film)
    assert [frame.number for frame in video.frames(Stride(every=7))] == [0, 7, 14, 21, 28, 35]
    assert [frame.number for frame in video.frames(Stride(fps=2))] == list(range(0, 40, 5))
    assert [frame.number for frame in video.frames(Stride(fps=100))] == list(range(40))
    assert video.expected(Stride(every=7)) == 6
    assert video.expected(Stride(fps=2)) == 8


def test_a_variable_rate_is_gone_by_in_seconds(tmp_path: Path) -> None:
    """Ten frames in the first second, then one every two."""
    times = [*range(10), 10, 30, 50, 70]
    video = open_video(write_video(tmp_path / "slow.mkv", painted(len(times)), times=times))
    frames = list(video.frames(Stride(fps=1)))
    assert [frame.time_s for frame in frames] == [0.0, 1.0, 3.0, 5.0, 7.0]
    assert [frame.number for frame in frames] == numbers_seen(frames) == [0, 10, 11, 12, 13]


@pytest.mark.parametrize(
    ("degrees", "corner"), [(90, "lower left"), (180, "lower right"), (-90, "upper right")]
)
def test_frames_are_turned_as_they_are_shown(tmp_path: Path, degrees: int, corner: str) -> None:
    """The display matrix turns anticlockwise: by 90 degrees, the upper left gets to the lower left."""
    path = write_video(tmp_path / "turned.mp4", painted(3), rotation=degrees)
    (frame, *_) = open_video(path).frames(ALL)
    assert frame.pixels.shape == ((96, 160, 3) if degrees == 180 else (160, 96, 3))
    rows, columns = corner.split()
    square = frame.pixels[slice(0, 24) if rows == "upper" else slice(-24, None)]
    square = square[:, slice(0, 24) if columns == "left" else slice(-24, None)]
    assert square[..., 0].min() > 180
    assert square[..., 1].max() < 80


def test_a_video_that_was_cut_off_keeps_what_is_there(tmp_path: Path, film: Path) -> None:
    whole = film.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    video = open_video(tmp_path / "cut.mkv")
    frames = list(video.frames(ALL))
    assert 5 < len(frames) < FRAMES - 5
    assert [frame.number for frame in frames] == numbers_seen(frames) == list(range(len(frames)))
    (said,) = video.complaints()
    assert f"cut.mkv: the video ends with frame {len(frames) - 1}" in said
    assert "its header tells of 4.0 s" in said


def test_an_mp4_whose_index_comes_first_is_read_up_to_the_cut(tmp_path: Path) -> None:
    path = write_video(tmp_path / "fast.mp4", painted(), container={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.8)])
    video = open_video(path)
    frames = list(video.frames(ALL))
    assert 0 < len(frames) < FRAMES
    assert numbers_seen(frames) == list(range(len(frames)))
    assert "its header tells of 40 frames" in " ".join(video.complaints())


def test_frames_behind_damage_keep_their_numbers(tmp_path: Path, film: Path) -> None:
    content = bytearray(film.read_bytes())
    with av.open(str(film)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        content_of = [bytes(packet) for packet in packets]
    # The whole of the fifteenth packet but the length that leads it.
    start = bytes(content).index(content_of[14]) + 4
    content[start : start + len(content_of[14]) - 4] = b"\xff" * (len(content_of[14]) - 4)
    (tmp_path / "hurt.mkv").write_bytes(content)
    video = open_video(tmp_path / "hurt.mkv")
    frames = list(video.frames(ALL))
    assert frames[0].number == 0
    last = [frame for frame in frames if frame.number >= 20]
    assert [frame.number for frame in last] == numbers_seen(last) == list(range(20, 40))
    (said,) = video.complaints()
    assert "cannot be decoded, the first is frame 1" in said


def test_what_is_no_video_is_told(tmp_path: Path, film: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(DmxError, match=r"empty\.mp4: wanted a video, found an empty file"):
        open_video(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    with pytest.raises(DmxError, match=r"text\.mp4: wanted a video, found 600 bytes that FFmpeg cannot open"):
        open_video(tmp_path / "text.mp4")
    whole = write_video(tmp_path / "late.mp4", painted(5)).read_bytes()
    (tmp_path / "late.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DmxError, match="cut off before its index was written"):
        open_video(tmp_path / "late.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        sound = file.add_stream("pcm_s16le", rate=8000)
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        wave.rate = 8000
        file.mux(sound.encode(wave))
        file.mux(sound.encode(None))
    with pytest.raises(
        DmxError, match=r"sound\.wav: wanted a video, found a file with audio but no pictures"
    ):
        open_video(tmp_path / "sound.wav")


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile 'http://127.0.0.1:{port}/a.mp4'\n",
    ],
)
def test_a_playlist_leads_nowhere(tmp_path: Path, text: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        path = tmp_path / "a.mp4"
        path.write_text(text.format(port=server.getsockname()[1]))
        with pytest.raises(DmxError, match=r"a\.mp4: wanted a video"):
            open_video(path)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_more_than_a_few_batches_are_decoded_ahead() -> None:
    taken: list[int] = []

    def frames() -> Iterator[Frame]:
        for number in range(1000):
            taken.append(number)
            yield Frame(number, 0.0, np.zeros((4, 4, 3), np.uint8))

    ready = _ahead(batches(frames(), 8))
    for index in range(20):
        assert [frame.number for frame in next(ready)] == list(range(8 * index, 8 * index + 8))
        # Those that wait, the one in work, and the frame that tells where a batch ends.
        assert len(taken) <= 8 * (index + 1 + AHEAD + 1) + 1
    ready.close()


def test_a_batch_holds_frames_of_one_size() -> None:
    shapes = [(4, 4, 3)] * 3 + [(6, 4, 3)] * 2
    frames = [Frame(number, 0.0, np.zeros(shape, np.uint8)) for number, shape in enumerate(shapes)]
    assert [[frame.number for frame in batch] for batch in batches(frames, 2)] == [[0, 1], [2], [3, 4]]


@pytest.mark.parametrize(
    ("box", "rules", "expected"),
    [
        ((10.2, 20.7, 49.5, 119.1), Rules(), [10, 20, 50, 120]),
        ((-30, -5, 40, 100), Rules(), [0, 0, 40, 100]),
        ((290, 100, 400, 300), Rules(), [290, 100, 320, 240]),
        ((100, 100, 140, 200), Rules(margin=0.1), [96, 90, 144, 210]),
        ((100, 100, 140, 163), Rules(), "small"),
        ((100, 100, 140, 164), Rules(), [100, 100, 140, 164]),
        ((330, 20, 400, 200), Rules(), "small"),
        ((100, 100, 200, 190), Rules(), "odd"),
        ((100, 10, 110, 200), Rules(), "odd"),
        ((100, 100, 200, 190), Rules(least_aspect=0.5), [100, 100, 200, 190]),
    ],
)
def test_which_boxes_become_crops(box: tuple[float, ...], rules: Rules, expected: list[int] | str) -> None:
    refused = Refused()
    found = cut(box, 240, 320, rules, refused)
    assert found == (None if isinstance(expected, str) else expected)
    assert (refused.small, refused.odd) == (expected == "small", expected == "odd")


def test_cameras_are_numbered_by_file_by_source_or_by_name(tmp_path: Path) -> None:
    for name in ("north/7.mp4", "north/8.MP4", "south/7.mkv", "south/.hidden.mp4", "south/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    folders = [str(tmp_path / "north"), str(tmp_path / "south")]

    def told(films: list[Film]) -> list[tuple[str, int]]:
        return [(film.name, film.camera) for film in films]

    assert told(find_films(folders)) == [("north/7.mp4", 1), ("north/8.MP4", 2), ("south/7.mkv", 3)]
    assert [film.camera for film in find_films(folders, cameras=[4, 9])] == [4, 4, 9]
    assert [film.camera for film in find_films(folders, camera_pattern=r"/(\d+)\.")] == [7, 8, 7]
    assert told(find_films([str(tmp_path / "*/7.*")])) == [("north/7.mp4", 1), ("south/7.mkv", 2)]
    assert told(find_films([str(tmp_path / "south/note.txt")])) == [("note.txt", 1)]
    with pytest.raises(DmxError, match="a number for each --video, 2 in all, found 1"):
        find_films(folders, cameras=[1])
    with pytest.raises(DmxError, match=r"found .*8\.MP4 twice"):
        find_films([folders[0], str(tmp_path / "north/8.MP4")])
    with pytest.raises(DmxError, match=r"digits in the name of the video north/7\.mp4, found no match"):
        find_films(folders, camera_pattern=r"cam(\d+)")
    with pytest.raises(DmxError, match="found nothing there"):
        find_films([str(tmp_path / "west")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DmxError, match="a folder of videos"):
        find_films([str(tmp_path / "empty")])
    with pytest.raises(DmxError, match="found an address"):
        find_films(["rtsp://camera/1"])


MOT = """\
1,3,10,5,30,80,1,-1,-1,-1
3,3,12,5,30,80,0.4

3,4,100,5.5,30.5,80,0.9
4,-1,0,0,30,80,-1
5,8,0,0,30,80,0
"""


def test_boxes_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(MOT)
    boxes = read_boxes(tmp_path / "a.txt", None)
    assert boxes.last_frame == 3
    assert boxes.of(0).boxes.tolist() == [[10, 5, 40, 85]]
    assert boxes.of(1).boxes.shape == (0, 4)
    assert boxes.of(2).boxes.tolist() == [[12, 5, 42, 85], [100, 5.5, 130.5, 85.5]]
    assert boxes.of(2).tracks.tolist() == [3, 4]
    assert math.isnan(boxes.of(3).scores[0])
    assert boxes.of(3).tracks.tolist() == [-1]
    assert read_boxes(tmp_path / "a.txt", 0.5).of(2).tracks.tolist() == [4]
    for line in (
        "1,2,3",
        "x,1,1,1,1,1,1",
        "0,1,1,1,9,9,1",
        "1,1,1,1,0,9,1",
        "1.5,1,1,1,9,9,1",
        "1,1,nan,1,9,9,1",
    ):
        (tmp_path / "bad.txt").write_text(f"1,1,1,1,9,9,1\n{line}\n")
        with pytest.raises(DmxError, match=r"bad\.txt, line 2: wanted"):
            read_boxes(tmp_path / "bad.txt", None)
    with pytest.raises(DmxError, match="cannot be read"):
        read_boxes(tmp_path / "none.txt", None)


def test_every_video_gets_its_own_boxes(tmp_path: Path) -> None:
    films = [Film(tmp_path / name, name, 1, True) for name in ("a.mp4", "b/c.mkv")]
    (tmp_path / "boxes/b").mkdir(parents=True)
    (tmp_path / "boxes/a.txt").touch()
    with pytest.raises(DmxError, match=r"wanted b/c\.txt for b/c\.mkv"):
        files_of_boxes([str(tmp_path / "boxes")], films)
    (tmp_path / "boxes/b/c.txt").touch()
    wanted = [tmp_path / "boxes/a.txt", tmp_path / "boxes/b/c.txt"]
    assert files_of_boxes([str(tmp_path / "boxes")], films) == wanted
    assert files_of_boxes([str(path) for path in wanted], films) == wanted
    with pytest.raises(DmxError, match="a file for each of 2 videos"):
        files_of_boxes([str(wanted[0])], films)


@pytest.fixture
def tracked(tmp_path: Path) -> list[str]:
    """Two videos and tracks in them, as arguments."""
    words = []
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", painted(12))
        lines = [f"{frame},{track},{10 * track},8,30,80,0.9" for frame in range(1, 13, 2) for track in (2, 5)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        words += ["--video", str(tmp_path / f"{name}.mp4"), "--boxes", str(tmp_path / f"{name}.txt")]
    return words


@pytest.mark.parametrize(
    ("kind", "identities"), [("none", {-1}), ("tracks", {0, 1, 2, 3}), ("shared-tracks", {2, 5})]
)
def test_tracks_become_identities_when_asked(
    tmp_path: Path, tracked: list[str], kind: str, identities: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ingest", *tracked, str(tmp_path / "out"), "--identities", kind]) == 0
    split = open_dataset(tmp_path / "out").split("train")
    assert isinstance(split, ShardSplit)
    assert set(split.identities.tolist()) == identities
    assert split.column("track").to_pylist() == [2, 5] * 12
    assert split.column("frame").to_pylist() == [f for _ in "ab" for f in range(0, 12, 2) for _ in (2, 5)]
    assert split.column("source").to_pylist() == ["a.mp4"] * 12 + ["b.mp4"] * 12
    assert split.column("box").to_pylist()[:2] == [[20, 8, 50, 88], [50, 8, 80, 88]]
    assert split.cameras.tolist() == [1] * 12 + [2] * 12
    assert split.keys[3] == "a.mp4#frame=2&box=50,8,80,88"
    crop = decode(split.image_bytes(3))
    assert crop.shape == (80, 30, 3)
    assert abs(float(crop.mean()) - grey(2)) < 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        f"camera {n}: {f}.mp4, 12 frames looked at, 12 crops" for n, f in ((1, "a"), (2, "b"))
    ]


def test_a_sequence_of_motchallenge_keeps_its_pixels_in_a_container(tmp_path: Path) -> None:
    """Its JPEGs, put into a video as they are, and the ground truth with what is not to be looked at."""
    (tmp_path / "img1").mkdir()
    for number in range(1, 9):
        Image.fromarray(painted(number)[-1]).save(tmp_path / "img1" / f"{number:06d}.jpg", quality=95)
    with (
        av.open(str(tmp_path / "img1" / "%06d.jpg"), options={"framerate": "30"}) as pictures,
        av.open(str(tmp_path / "MOT17-02.mkv"), "w") as film,
    ):
        stream = film.add_stream_from_template(pictures.streams.video[0])
        for packet in pictures.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                film.mux(packet)
    truth = [f"{frame},7,40,10,30,80,1,1,0.9\n{frame},8,90,10,30,80,0,8,1" for frame in range(1, 9)]
    (tmp_path / "gt.txt").write_text("\n".join(truth))
    words = ["--video", str(tmp_path / "MOT17-02.mkv"), "--boxes", str(tmp_path / "gt.txt")]
    assert main(["ingest", *words, str(tmp_path / "out"), "--identities", "tracks"]) == 0
    split = open_dataset(tmp_path / "out").split("train")
    assert isinstance(split, ShardSplit)
    assert split.column("track").to_pylist() == [7] * 8
    assert split.column("time_s").to_pylist() == pytest.approx([frame / 30 for frame in range(8)], abs=2e-3)
    crop = decode(split.image_bytes(3))
    whole = np.asarray(Image.open(tmp_path / "img1" / "000004.jpg"))
    assert np.abs(crop.astype(int) - whole[10:90, 40:70]).max() <= 3  # one more JPEG


def test_boxes_behind_the_end_are_told(
    tmp_path: Path, tracked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "a.txt").open("a") as file:
        file.write("\n400,2,10,8,30,80,0.9\n")
    assert main(["ingest", *tracked, str(tmp_path / "out")]) == 0
    assert "has boxes up to frame 400 (counted from 1)" in capsys.readouterr().err
    assert any("has 12 frames" in said for said in read_manifest(tmp_path / "out")[0].warnings)


def test_a_broken_video_of_a_folder_is_left_out_and_listed(
    tmp_path: Path, tracked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.mp4").write_bytes(b"")
    (tmp_path / "c.txt").write_text("1,1,1,1,30,80,1\n")
    words = ["--video", str(tmp_path), "--boxes", str(tmp_path), str(tmp_path / "out")]
    assert main(["ingest", *words]) == 0
    assert "left out" in capsys.readouterr().err
    (line,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "c.mp4"
    assert (
        main(
            [
                "ingest",
                *tracked,
                "--video",
                str(tmp_path / "c.mp4"),
                "--boxes",
                str(tmp_path / "c.txt"),
                str(tmp_path / "other"),
            ]
        )
        == 2
    )
    assert "c.mp4: wanted a video, found an empty file" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_no_crop_at_all_is_an_error_that_says_why(tmp_path: Path, tracked: list[str]) -> None:
    films = find_films([str(tmp_path / "a.mp4")])
    boxes = {"a.mp4": read_boxes(tmp_path / "a.txt", None)}
    with pytest.raises(DmxError, match=r"(?s)found no crop.*12 boxes of people, of which 12 are too low"):
        ingest_videos(Request(films, ALL, Rules(least_height_px=200)), tmp_path / "out", boxes)
    assert not (tmp_path / "out").exists()


def test_images_are_ingested_as_before(tmp_path: Path) -> None:
    parser = build_parser()
    args = parser.parse_args(["ingest", "in", "--layout", "folder", "out"])
    assert (args.source, args.out) == ("in", "out")
    for words in (["--video", "a", "--video", "b", "out"], ["out", "--video", "a", "--video", "b"]):
        args = build_parser().parse_args(["ingest", *words])
        assert (args.source, args.out, args.video) == ("out", None, ["a", "b"])
    with pytest.raises(SystemExit):
        parser.parse_args(["ingest", "in"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["in", "out", "--every", "5"], "--every: wanted only with --video"),
        (["in", "out", "--video", "a.mp4", "--detector", "d"], "wanted OUT alone, found in and out"),
        (["out", "--video", "a.mp4"], "found neither"),
        (["out", "--video", "a.mp4", "--detector", "d", "--boxes", "b"], "found both"),
        (["out", "--video", "a.mp4", "--detector", "d", "--layout", "crops"], "wanted with images"),
        (["out", "--video", "a.mp4", "--detector", "d", "--identities", "tracks"], "wanted with --boxes"),
        (["out", "--video", "a.mp4", "--detector", "d", "--score", "60"], "from 0 to 1, found 60"),
        (["out", "--video", "a.mp4", "--detector", "d", "--cameras", "1;2"], "numbers with commas"),
        (["out", "--video", "a.mp4", "--detector", "d", "--every", "0"], "--every: wanted at least 1"),
        (["out", "--video", "a.mp4", "--detector", "d", "--fps", "0"], "--fps: wanted more than 0"),
        (["out", "--video", "a.mp4", "--detector", "d", "--aspect", "3", "2"], "--aspect: wanted"),
        (["out", "--video", "a.mp4", "--detector", "d", "--cameras", "-4"], "a camera number from 0"),
        (["out", "--video", "a.mp4", "--detector", "d", "--camera-pattern", "x"], "one group of digits"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"x")
    assert main(["ingest", *words]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("package", ["av", "transformers"])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    assert (
        main(["ingest", "--video", str(tmp_path / "a.mp4"), str(tmp_path / "out"), "--detector", "a/b"]) == 2
    )
    assert 'pip install "dmx[video]"' in capsys.readouterr().err


def test_readers_pass_over_columns_that_they_do_not_know(tmp_path: Path) -> None:
    more = pa.schema([("weather", pa.string())])
    with DatasetWriter(tmp_path / "set", layout="x", rows_per_shard=2, more_columns=more) as writer:
        for row in range(5):
            writer.add("train", bytes([row]), row, 0, f"k{row}", {"weather": f"w{row}"})
    split = open_dataset(tmp_path / "set").split("train")
    assert isinstance(split, ShardSplit)
    assert [split.image_bytes(row) for row in range(5)] == [bytes([row]) for row in range(5)]
    assert split.more_columns == ("weather",)
    assert split.column("weather").to_pylist() == [f"w{row}" for row in range(5)]
    assert read_manifest(tmp_path / "set", verify=True)[0].schema_version == 2
    with pytest.raises(DmxError, match=r"wanted the column 'frame', found .*'weather'"):
        split.column("frame")


def test_data_sets_without_more_columns_are_those_of_version_1(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set", layout="x") as writer:
        writer.add("train", b"x", 1, 2, "k")
    assert json.loads((tmp_path / "set/manifest.json").read_text())["schema_version"] == 1
    split = open_dataset(tmp_path / "set").split("train")
    assert isinstance(split, ShardSplit)
    assert split.more_columns == ()
    with pa.memory_map(str(tmp_path / "set/train-00000.arrow")) as source:
        assert pa.ipc.open_file(source).schema == writer_module.SCHEMA
