"""Every published layout, in miniature: recognised, read and counted."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmx.data.dataset import open_dataset
from dmx.data.ingest import DatasetWarning, ingest
from dmx.data.layouts import LAYOUTS, Expected, Options, recognise
from dmx.data.layouts.luperson import LmdbRef, load_keys
from dmx.data.layouts.market import MARKET_COUNTS
from dmx.data.layouts.randperson import parse_name
from dmx.data.manifest import SplitCounts
from dmx.data.published import count_warnings
from dmx.errors import DmxError

Numbers = dict[str, tuple[list[int], list[int]]]  # split: identities, cameras


@cache
def noise(kind: str = "JPEG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 12, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(root: Path, *names: str) -> Path:
    """Write a small image, each another, under every name."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise("PNG" if name.endswith(".png") else "JPEG", seed))
    return root


def put_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def market(root: Path) -> Numbers:
    put(
        root,
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0002_c3s2_000452_01.jpg",
        "bounding_box_train/0007_c6s1_000453_01.jpg",
        "query/0001_c1s1_001051_00.jpg",
        "bounding_box_test/-1_c1s1_000401_03.jpg",
        "bounding_box_test/0000_c2s1_000151_01.jpg",
        "bounding_box_test/0001_c4s6_000151_01.jpg",
        "gt_bbox/0001_c4s6_000151_01.jpg",
    )
    (root / "bounding_box_train/Thumbs.db").write_bytes(b"x")
    (root / "bounding_box_train/._0002_c1s1_000451_03.jpg").write_bytes(b"x")
    return {"train": ([2, 2, 7], [1, 3, 6]), "query": ([1], [1]), "gallery": ([-1, 0, 1], [1, 2, 4])}


def duke(root: Path) -> Numbers:
    put(
        root,
        "bounding_box_train/0001_c2_f0046182.jpg",
        "query/0005_c2_f0046985.jpg",
        "bounding_box_test/0002_c8_f0044158.jpg",
    )
    return {"train": ([1], [2]), "query": ([5], [2]), "gallery": ([2], [8])}


def cuhk03(root: Path) -> Numbers:
    put(
        root / "detected",
        "bounding_box_train/0003_c1_21.png",
        "bounding_box_train/0003_c2_22.png",
        "query/0001_c1_1.png",
        "bounding_box_test/0001_c2_6.png",
    )
    return {"train": ([3, 3], [1, 2]), "query": ([1], [1]), "gallery": ([1], [2])}


def personx(root: Path) -> Numbers:
    put(
        root / "PersonX_v1",
        "bounding_box_train/0001_c3_10.jpg",
        "bounding_box_train/0001_c12_10.jpg",
        "query/0002_c4_1.jpg",
        "bounding_box_test/0002_c11_7.jpg",
    )
    return {"train": ([1, 1], [12, 3]), "query": ([2], [4]), "gallery": ([2], [11])}


def personx_by_camera(root: Path) -> Numbers:
    put(
        root,
        "1/bounding_box_train/0001_c3_10.jpg",
        "2/bounding_box_train/0001_c4_10.jpg",
        "1/query/0002_c3_1.jpg",
        "2/query/0002_c4_1.jpg",
    )
    return {"train": ([1, 1], [3, 4]), "query": ([2, 2], [3, 4])}


def veri(root: Path) -> Numbers:
    put(
        root,
        "image_train/0001_c001_00016450_0.jpg",
        "image_query/0002_c002_00030600_0.jpg",
        "image_test/0002_c020_00030605_1.jpg",
    )
    return {"train": ([1], [1]), "query": ([2], [2]), "gallery": ([2], [20])}


def msmt17(root: Path, train: str = "train", test: str = "test") -> Numbers:
    root = root / "MSMT17"
    lists = {
        "list_train.txt": (train, ["0000/0000_000_01_0303morning_0015_0.jpg 0"]),
        "list_val.txt": (train, ["0001/0001_002_15_0303morning_0030_0.jpg 1"]),
        "list_query.txt": (test, ["0000/0000_003_07_0303noon_0001_0.jpg 0"]),
        "list_gallery.txt": (test, ["0000/0000_004_09_0303noon_0002_0.jpg 0", "0000/._0000_004_09_x.jpg 0"]),
    }
    for name, (folder, lines) in lists.items():
        put(root, *(f"{folder}/{line.split()[0]}" for line in lines))
        (root / name).write_text("\n".join(lines) + "\n")
    return {"train": ([0, 1], [1, 15]), "query": ([0], [7]), "gallery": ([0], [9])}


def msmt17_v2(root: Path) -> Numbers:
    return msmt17(root, "mask_train_v2", "mask_test_v2")


RANDPERSON_NAMES = ("000000_s00_c00_f000264.jpg", "000000_s03_c12_f001032.jpg", "000007_s03_c01_f000001.jpg")


def randperson_subset(root: Path) -> Numbers:
    put(root / "randperson_subset", *RANDPERSON_NAMES)
    return {"train": ([0, 0, 7], [0, 312, 301])}


def randperson_full(root: Path) -> Numbers:
    put_tar(root / "images/scene00/camera0_1.tar.gz", {f"a/{RANDPERSON_NAMES[0]}": noise()}, "w:gz")
    put_tar(root / "images/scene00/delete_camera0_1.tar.gz", {f"a/{RANDPERSON_NAMES[2]}": noise()}, "w:gz")
    put_tar(
        root / "images/scene03/camera1_1.tar.gz",
        {RANDPERSON_NAMES[1]: noise(), "readme.txt": b"x", RANDPERSON_NAMES[2]: noise()},
        "w:gz",
    )
    (root / "images/scene00/camera0_1_point.txt").write_text("x")
    return {"train": ([0, 0, 7], [0, 312, 301])}


def randperson_split_folders(root: Path) -> Numbers:
    put(
        root,
        "bounding_box_train/000004_s00_c00_f000000.jpg",
        "query/000001_s00_c00_f000000.jpg",
        "bounding_box_test/000001_s00_c01_f000000.jpg",
    )
    return {"train": ([4], [0]), "query": ([1], [0]), "gallery": ([1], [1])}


def clonedperson(root: Path) -> Numbers:
    put(
        root,
        "train/000004_s02_c00_f000000.jpg",
        "test/query/000001_s00_c00_f000000.jpg",
        "test/gallery/000001_s00_c01_f000000.jpg",
    )
    return {"train": ([4], [200]), "query": ([1], [0]), "gallery": ([1], [1])}


def unrealperson(root: Path) -> Numbers:
    put(root, "unreal_v1.2/images/0003_c001_4.jpg", "unreal_v3.2/images/0003_c001_4.jpg")
    put(root, "unreal_v3.1/images/0003_c017_4.jpg")
    return {"train": ([2_000_003, 1_000_003, 2_000_003], [1001, 3017, 3001])}


def luperson(root: Path) -> Numbers:
    lmdb = pytest.importorskip("lmdb", reason="reads an LMDB")
    keys = ["US_03_0001_00000001", "US_03_0001_00000002"]
    (root / "lmdb").mkdir(parents=True)
    with lmdb.open(str(root / "lmdb"), map_size=1 << 20) as environment, environment.begin(write=True) as out:
        for seed, key in enumerate(keys):
            out.put(key.encode(), noise(seed=seed))
    (root / "keys.pkl").write_bytes(pickle.dumps(keys))
    return {"train": ([-1, -1], [-1, -1])}


def folder(root: Path) -> Numbers:
    put(root, "0010/a.jpg", "0010/b.png", "0003/sub/c.jpg")
    put(root, "0003/d.jpg")
    return {"train": ([3, 3, 10, 10], [-1] * 4)}


def folder_with_splits(root: Path) -> Numbers:
    put(
        root,
        "train/ann/a.jpg",
        "train/bob/b.jpg",
        "query/cem/c.jpg",
        "gallery/cem/d.jpg",
        "gallery/ann/e.jpg",
    )
    return {"train": ([0, 1], [-1, -1]), "query": ([2], [-1]), "gallery": ([0, 2], [-1, -1])}


def crops(root: Path) -> Numbers:
    put(root / "crops", "f0000_01.jpg", "f0000_02.JPG", "x.png")
    (root / "crops/notes.txt").write_text("x")
    return {"train": ([-1] * 3, [-1] * 3)}


def webdataset(root: Path) -> Numbers:
    put_tar(
        root / "train-000000.tar",
        {
            "000.jpg": noise(),
            "000.json": json.dumps({"pid": 5, "camid": 2}).encode(),
            "001.jpg": noise(),
            "001.cls": b"6\n",
        },
    )
    put_tar(root / "train-000001.tar", {"002.png": noise("PNG")})
    put_tar(root / "query-000000.tar", {"q.jpg": noise(), "q.json": b'{"identity": "9", "camera": 1}'})
    return {"train": ([5, 6, -1], [2, -1, -1]), "query": ([9], [1])}


CASES: list[tuple[Callable[[Path], Numbers], str]] = [
    (market, "market1501"),
    (duke, "dukemtmc-reid"),
    (cuhk03, "cuhk03-np"),
    (personx, "personx"),
    (personx_by_camera, "personx"),
    (veri, "veri776"),
    (msmt17, "msmt17"),
    (msmt17_v2, "msmt17"),
    (randperson_subset, "randperson"),
    (randperson_full, "randperson"),
    (randperson_split_folders, "randperson"),
    (clonedperson, "clonedperson"),
    (unrealperson, "unrealperson"),
    (luperson, "luperson"),
    (folder, "folder"),
    (folder_with_splits, "folder"),
    (crops, "crops"),
    (webdataset, "webdataset"),
]
UNPUBLISHED = {"folder", "crops", "webdataset", "clonedperson", "unrealperson"}


def test_every_layout_has_a_case() -> None:
    assert {name for _, name in CASES} == set(LAYOUTS)


@pytest.mark.parametrize(("build", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_layout_is_recognised_and_read(build: Callable[[Path], Numbers], name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    expected = build(source)
    for told in ("auto", name):
        messages: list[str] = []
        out = tmp_path / f"out-{told}"
        manifest = ingest(source, out, told, warn=messages.append, workers=1)
        assert manifest.layout == name
        assert manifest.skipped == 0
        assert set(manifest.splits) == set(expected)
        data = open_dataset(out)
        for split, (identities, cameras) in expected.items():
            assert data.split(split).identities.tolist() == identities
            assert data.split(split).cameras.tolist() == cameras
            counts = manifest.splits[split]
            assert counts.images == len(identities)
            assert counts.labelled == sum(identity >= 0 for identity in identities)
            assert counts.identities == len({identity for identity in identities if identity >= 0})
            assert counts.cameras == len({camera for camera in cameras if camera >= 0})
        # A miniature of a published set differs from it, and what has no published counts has nothing to say.
        has_counts = name not in UNPUBLISHED and build is not randperson_split_folders
        assert bool(messages) == has_counts
        assert tuple(messages) == manifest.warnings


@pytest.mark.parametrize(("build", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_raw_layout_opens_in_place_like_its_shards(
    build: Callable[[Path], Numbers], name: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    expected = build(source)
    if build is randperson_full:
        with pytest.raises(DmxError, match="compressed archives"):
            open_dataset(source)
        return
    raw = open_dataset(source, warn=lambda message: None)
    ingest(source, tmp_path / "out", warn=lambda message: None)
    shards = open_dataset(tmp_path / "out")
    assert raw.layout == shards.layout == name
    assert set(raw.splits) == set(expected)
    for split in expected:
        left, right = raw.split(split), shards.split(split)
        assert left.keys == right.keys
        np.testing.assert_array_equal(left.identities, right.identities)
        np.testing.assert_array_equal(left.cameras, right.cameras)
        assert [left.image_bytes(i) for i in range(len(left))] == [
            right.image_bytes(i) for i in range(len(right))
        ]


def test_junk_is_left_out_of_training_by_name(tmp_path: Path) -> None:
    market(tmp_path / "source")
    put(tmp_path / "source", "bounding_box_train/-1_c1s1_000999_00.jpg", "bounding_box_train/hello.jpg")
    manifest = ingest(tmp_path / "source", tmp_path / "out", "market1501", warn=lambda message: None)
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert manifest.skipped == 2
    assert {line["key"] for line in lines} == {
        "bounding_box_train/-1_c1s1_000999_00.jpg",
        "bounding_box_train/hello.jpg",
    }
    assert "junk" in lines[0]["reason"]
    assert manifest.splits["train"].images == 3
    assert manifest.ignored == 2


def test_counts_say_expected_and_found() -> None:
    exact = {
        "train": SplitCounts(12936, 12936, 751, 6),
        "query": SplitCounts(3368, 3368, 750, 6),
        "gallery": SplitCounts(19732, 15913, 751, 6),
    }
    assert count_warnings("market1501", MARKET_COUNTS, exact, 0) == []
    exact["train"] = SplitCounts(12935, 12935, 751, 6)
    (message,) = count_warnings("market1501", MARKET_COUNTS, exact, 1)
    assert "12,936" in message
    assert "12,935" in message
    assert "1 broken" in message
    about = (Expected("train", "images", 1000, tolerance=0.01),)
    assert count_warnings("x", about, {"train": SplitCounts(1009, 0, 0, 0)}, 0) == []
    assert len(count_warnings("x", about, {"train": SplitCounts(1011, 0, 0, 0)}, 0)) == 1


def test_every_published_difference_is_a_warning(tmp_path: Path) -> None:
    market(tmp_path)
    with pytest.warns(DatasetWarning) as caught:
        open_dataset(tmp_path)
    assert len(caught) == len(MARKET_COUNTS)


def test_withdrawn_set_says_so(tmp_path: Path) -> None:
    duke(tmp_path)
    messages: list[str] = []
    open_dataset(tmp_path, warn=messages.append)
    assert any("withdrawn" in message for message in messages)


@pytest.mark.parametrize(
    ("name", "camera", "expected"),
    [
        ("000012_s03_c07_f000264.jpg", "scene", (12, 307)),
        ("000012_c07_s03_f000264.jpg", "scene", (12, 307)),
        ("000012_s03_c07_f000264.jpg", "camera", (12, 7)),
        ("0001_c1s1_000151_01.jpg", "scene", None),
    ],
)
def test_randperson_names(name: str, camera: str, expected: tuple[int, int] | None) -> None:
    assert parse_name(name, camera) == expected


def test_randperson_camera_alone_as_published_code(tmp_path: Path) -> None:
    randperson_subset(tmp_path)
    data = open_dataset(tmp_path, camera="camera", warn=lambda message: None)
    assert data.split("train").cameras.tolist() == [0, 12, 1]


def test_both_forms_of_cuhk03_have_to_be_told_apart(tmp_path: Path) -> None:
    cuhk03(tmp_path)
    put(tmp_path, "labeled/query/0001_c1_1.png", "labeled/bounding_box_test/0001_c1_1.png")
    with pytest.raises(DmxError, match="detected"):
        recognise(tmp_path)
    assert recognise(tmp_path / "labeled")[0].name == "cuhk03-np"


def test_more_than_one_layout_is_an_error_that_names_them(tmp_path: Path) -> None:
    market(tmp_path)
    veri(tmp_path)
    with pytest.raises(DmxError, match=r"market1501 and veri776.*--layout"):
        recognise(tmp_path)
    assert recognise(tmp_path, "veri776")[0].name == "veri776"


def test_nothing_recognised_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DmxError, match=r"(?s)market1501:.*luperson:.*Found: notes\.txt"):
        recognise(tmp_path)
    with pytest.raises(DmxError, match="found nothing"):
        recognise(tmp_path / "absent")
    with pytest.raises(DmxError, match="wanted one of auto, market1501"):
        recognise(tmp_path, "imagenet")
    with pytest.raises(DmxError, match="unpack it first"):
        recognise(tmp_path / "notes.txt", "market1501")


def skipped_in(out: Path) -> dict[str, str]:
    lines = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    return {line["key"]: line["reason"] for line in lines}


def test_splits_of_other_names_are_not_lost_silently(tmp_path: Path) -> None:
    source = put(
        tmp_path / "set", *(f"{split}/{name}/a.jpg" for split in ("train", "val", "test") for name in "ab")
    )
    with pytest.raises(
        DmxError, match=r"(?s)train, query and gallery with no others.*Found: test/, train/, val/"
    ):
        recognise(source)
    messages: list[str] = []
    manifest = ingest(source, tmp_path / "out", "folder", warn=messages.append)
    assert manifest.splits["train"].images == 2
    assert skipped_in(tmp_path / "out").keys() == {"test", "val"}
    (message,) = messages
    assert "2 images or folders are left out, the first is test (not train, query or gallery" in message
    open_dataset(source, "folder", warn=messages.append)
    assert messages[1].startswith(message.partition(";")[0])
    (source / "docs").mkdir()
    shutil.rmtree(source / "val")
    shutil.rmtree(source / "test")
    assert recognise(source)[0].name == "folder", "a folder without images is no reason to ask"


@pytest.mark.parametrize("splits", [("",), ("train/", "query/", "gallery/")])
def test_images_beside_identity_folders_are_listed(splits: tuple[str, ...], tmp_path: Path) -> None:
    folders = put(tmp_path / "set", *(f"{split}{name}/x.jpg" for split in splits for name in "ab"))
    put(folders, *(f"{split}loose.jpg" for split in splits))
    (folders / f"{splits[0]}notes.txt").write_text("x")
    with pytest.raises(DmxError, match="no known layout"):
        recognise(folders)
    messages: list[str] = []
    manifest = ingest(folders, tmp_path / "out", "folder", warn=messages.append)
    assert {name: counts.identities for name, counts in manifest.splits.items()} == {
        split.rstrip("/") or "train": 2 for split in splits
    }
    found = skipped_in(tmp_path / "out")
    assert found.keys() == {f"{split}loose.jpg" for split in splits}
    assert set(found.values()) == {"an image beside the folders that name identities"}
    assert (manifest.skipped, manifest.ignored) == (len(splits), 1)
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (market, "bounding_box_train"),
        (personx_by_camera, "1/query"),
        (randperson_subset, "randperson_subset"),
        (unrealperson, "unreal_v1.2/images"),
    ],
)
def test_subfolders_that_a_layout_does_not_have_are_listed(
    build: Callable[[Path], Numbers], where: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    expected = build(source)
    put(source / where, "more/deep/0002_c1s1_000451_03.jpg", ".cache/0002_c1s1_000451_03.jpg")
    (source / where / "empty").mkdir()
    messages: list[str] = []
    manifest = ingest(source, tmp_path / "out", warn=messages.append)
    assert {name: counts.images for name, counts in manifest.splits.items()} == {
        name: len(identities) for name, (identities, _) in expected.items()
    }
    ((key, reason),) = skipped_in(tmp_path / "out").items()
    assert (source / key == source / where / "more") or key == "more"
    assert "its images are not read" in reason
    assert manifest.skipped == 1
    assert any("1 image or folder is left out, the first is" in message for message in messages)


def test_labels_in_file_names_are_not_lost_silently(tmp_path: Path) -> None:
    market(tmp_path)
    for source in (tmp_path / "bounding_box_train", tmp_path / "gt_bbox"):
        with pytest.raises(DmxError, match="--layout"):
            recognise(source)
        assert recognise(source, "crops")[0].name == "crops"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_of_crops_is_read_in_place(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "crops.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for seed in range(3):
            archive.writestr(f"crops/f{seed}.jpg", noise(seed=seed))
        archive.writestr("crops/readme.txt", "x")
    split = open_dataset(path).split("train")
    assert split.keys == [f"crops/f{seed}.jpg" for seed in range(3)]
    assert [split.image_bytes(seed) for seed in range(3)] == [noise(seed=seed) for seed in range(3)]
    broken = bytearray(path.read_bytes())
    broken[60] ^= 255  # within the first member
    path.write_bytes(broken)
    manifest = ingest(path, tmp_path / "out")
    assert (manifest.splits["train"].images, manifest.skipped, manifest.ignored) == (2, 1, 1)


def test_zip_with_labels_is_not_read_as_crops(tmp_path: Path) -> None:
    path = tmp_path / "subset.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"subset/{RANDPERSON_NAMES[0]}", noise())
    with pytest.raises(DmxError, match="no known layout"):
        recognise(path)


def test_camera_pattern_for_folders(tmp_path: Path) -> None:
    put(tmp_path, "1/a_c3.jpg", "2/b.jpg")
    split = open_dataset(tmp_path, camera_pattern=r"_c(\d+)").split("train")
    assert split.cameras.tolist() == [3, -1]
    for pattern in (r"_(c\d+)", r"a_(x)?"):
        with pytest.raises(DmxError, match=r"wanted its group to be digits, found .* file name a_c3\.jpg"):
            open_dataset(tmp_path, camera_pattern=pattern)
    with pytest.raises(DmxError, match="one group"):
        open_dataset(tmp_path, camera_pattern=r"_c\d+")
    with pytest.raises(DmxError, match="regular expression"):
        open_dataset(tmp_path, camera_pattern="(")


def test_msmt17_lists_what_is_missing_or_malformed(tmp_path: Path) -> None:
    msmt17(tmp_path)
    with open(tmp_path / "MSMT17/list_train.txt", "a") as lines:
        lines.write("0002/0002_000_03_0303morning_0015_0.jpg 2\nnonsense\n\n")
    manifest = ingest(tmp_path, tmp_path / "out", "msmt17", warn=lambda message: None)
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert manifest.splits["train"].images == 2
    assert [line["key"] for line in lines] == [
        "train/0002/0002_000_03_0303morning_0015_0.jpg",
        "list_train.txt:3",
    ]
    assert "No such file" in lines[0]["reason"]


def test_webdataset_broken_labels_and_tars_are_listed(tmp_path: Path) -> None:
    put_tar(tmp_path / "a.tar", {"0.jpg": noise(), "0.json": b"{", "1.jpg": noise(), "1.cls": b"x"})
    put_tar(tmp_path / "b.tar", {"2.jpg": noise(), "2.cls": b"4"})
    (tmp_path / "c.tar").write_bytes(b"not a tar" * 100)
    manifest = ingest(tmp_path, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert manifest.splits["train"].images == 1
    assert [line["key"] for line in lines] == ["a.tar/0.jpg", "a.tar/1.jpg", "c.tar"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_luperson_keys_of_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "keys.pkl"
    for value in (["b", "a"], [b"b", b"a"], {"keys": ["b", "a"]}):
        path.write_bytes(pickle.dumps(value, protocol))
        assert load_keys(path) == ["b", "a"]
    path.write_bytes(pickle.dumps({"b", "a"}, protocol))
    assert load_keys(path) == ["a", "b"]


def test_luperson_keys_never_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    path = tmp_path / "keys.pkl"
    path.write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(DmxError, match=r"names posix.system"):
        load_keys(path)
    assert not marker.exists()
    for content in (b"", b"garbage", pickle.dumps(3), pickle.dumps([1.5])):
        path.write_bytes(content)
        with pytest.raises(DmxError, match=r"keys\.pkl: wanted"):
            load_keys(path)


def test_luperson_database_that_breaks_is_an_unreadable_image(tmp_path: Path) -> None:
    luperson(tmp_path / "set")
    with pytest.raises(OSError, match="the database cannot be read"):
        LmdbRef(str(tmp_path / "set/lmdb"), "").read()  # shorter than any key may be
    (tmp_path / "set/keys.pkl").write_bytes(pickle.dumps(["US_03_0001_00000001", "absent", "\ud800"]))
    manifest = ingest(tmp_path / "set", tmp_path / "out", warn=lambda message: None)
    assert manifest.splits["train"].images == 1
    assert skipped_in(tmp_path / "out").keys() == {"absent", "\\ud800"}


def test_luperson_keys_lead_nowhere_else(tmp_path: Path) -> None:
    """They are looked up in the database, and are names alone: no file is read or written by them."""
    lmdb = pytest.importorskip("lmdb", reason="reads an LMDB")
    keys = ["../../above", str(tmp_path / "absolute"), str(tmp_path / "secret.jpg")]
    (tmp_path / "secret.jpg").write_bytes(noise(seed=9))
    root = tmp_path / "a/set"
    (root / "lmdb").mkdir(parents=True)
    with lmdb.open(str(root / "lmdb"), map_size=1 << 20) as environment, environment.begin(write=True) as out:
        for key in keys[:2]:
            out.put(key.encode(), noise())
    (root / "keys.pkl").write_bytes(pickle.dumps(keys))
    ingest(root, tmp_path / "a/out", warn=lambda message: None)
    assert open_dataset(tmp_path / "a/out").split("train").keys == keys[:2]
    assert skipped_in(tmp_path / "a/out").keys() == {keys[2]}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "secret.jpg"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"set", "out"}


def test_luperson_database_cut_short_is_refused(tmp_path: Path) -> None:
    luperson(tmp_path)
    with open(tmp_path / "lmdb/data.mdb", "r+b") as file:
        file.truncate(2 * 4096)
    with pytest.raises(DmxError, match=r"lmdb: wanted an LMDB of \d+ bytes, found 8192"):
        next(recognise(tmp_path)[0].read(tmp_path, Options()))


def test_synthetic_folder_has_no_published_counts(tmp_path: Path) -> None:
    randperson_subset(tmp_path)
    (tmp_path / "randperson_subset/synth.json").write_text("{}")
    messages: list[str] = []
    open_dataset(tmp_path, warn=messages.append)
    assert messages == []
