"""Names that are any bytes, from a folder into shards; folders of very many files; links that lead astray."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import tiny

from dmx.cli import main
from dmx.data.dataset import open_dataset
from dmx.data.ingest import DatasetWarning, ingest
from dmx.data.layouts import LAYOUTS, Found, Options, Unreadable, archives, listing
from dmx.errors import DmxError
from dmx.names import as_text, printable

NAMES = [
    b"caf\xe9.jpg", b"new\nline.jpg", b"\x1b[31mred.jpg", b"tab\t.jpg", b"\xff\xfe.jpg", b" .jpg", b"-rf.jpg",
    "日本.jpg".encode(), b"a\"b'<c>.jpg", b"\xed\xa0\x80.jpg",
]  # fmt: skip
FOLDERS = [b"p\xe9", b"p\n2", b"plain"]


def _image(number: int = 0) -> bytes:
    return tiny.picture_of(1, number, 0, 0)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Identity folders and images of such names; of each name one that is no image in every folder."""
    root = os.fsencode(tmp_path / "odd")
    for folder in FOLDERS:
        os.makedirs(os.path.join(root, folder))
        for number, name in enumerate(NAMES):
            with open(os.path.join(root, folder, name), "wb") as file:
                file.write(_image(number))
        with open(os.path.join(root, folder, b"broken\xe9\n.jpg"), "wb") as file:
            file.write(b"nope")
    return tmp_path / "odd"


def test_any_name_goes_from_a_folder_into_shards(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every image is there, its key tells the name; what is no UTF-8 is told as bytes."""
    assert main(["ingest", str(odd), str(tmp_path / "set")]) == 0
    split = open_dataset(tmp_path / "set").split("train")
    expected = {
        (folder + b"/" + name).decode("utf-8", "backslashreplace") for folder in FOLDERS for name in NAMES
    }
    assert set(split.keys) == expected
    assert len(split) == len(expected)
    assert sorted(set(split.identities.tolist())) == [0, 1, 2]
    row = split.keys.index("p\n2/new\nline.jpg")
    assert split.image_bytes(row) == _image(NAMES.index(b"new\nline.jpg"))
    lines = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {
        (folder + b"/broken\xe9\n.jpg").decode("utf-8", "backslashreplace") for folder in FOLDERS
    }
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err


def test_any_name_is_read_in_place(odd: Path) -> None:
    """And told in an error as a terminal may show it."""
    split = open_dataset(odd, warn=lambda message: None).split("train")
    assert len(split) == len(FOLDERS) * (len(NAMES) + 1)
    assert "plain/caf\\xe9.jpg" in split.keys
    assert split.image_bytes(split.keys.index("p\n2/ .jpg")) == _image(NAMES.index(b" .jpg"))
    row = split.keys.index("plain/\x1b[31mred.jpg")
    os.unlink(os.path.join(os.fsencode(odd), b"plain", b"\x1b[31mred.jpg"))
    with pytest.raises(DmxError, match=r"image plain/\\x1b\[31mred\.jpg cannot be read"):
        split.image_bytes(row)


def test_any_name_in_archives(tmp_path: Path) -> None:
    tar = tmp_path / "train.tar.gz"
    with tarfile.open(tar, "w:gz") as archive:
        for name in NAMES:
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(_image())
            archive.addfile(info, io.BytesIO(_image()))
    ingest(tar, tmp_path / "set", layout="webdataset")
    keys = open_dataset(tmp_path / "set").split("train").keys
    assert keys == [f"train.tar.gz/{name.decode('utf-8', 'backslashreplace')}" for name in NAMES]


@pytest.mark.parametrize("name", ["plain", "日本", "a\\xe9", "line\nbreak"])
def test_text_stays_text(name: str) -> None:
    assert as_text(name) == name


def test_what_is_no_text_becomes_some() -> None:
    assert as_text("\udce9\ud800") == "\\udce9\\ud800"
    assert as_text("caf\udce9") == "caf\\xe9"
    assert printable(as_text("a\nb\udcff")) == "a\\nb\\xff"


def test_a_large_folder_is_listed_in_order_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several runs, the last one full or not; line breaks and bytes that are no text among the names."""
    names = [f"{number * 7919 % 10007:05d}.jpg".encode() for number in range(300)] + NAMES
    for name in names:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).touch()
    (tmp_path / "folder").mkdir()
    expected = sorted([(os.fsdecode(name), False) for name in names] + [("folder", True)])
    for run_names in (1, 7, len(expected), 1000):
        monkeypatch.setattr(listing, "RUN_NAMES", run_names)
        assert list(listing.sorted_entries(tmp_path)) == expected


def test_listing_takes_no_more_memory_for_more_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `benchmarks/listing.py` measures to a million; here four runs against sixteen."""
    monkeypatch.setattr(listing, "RUN_NAMES", 500)
    peaks = []
    (tmp_path / "one").touch()
    for count in (2_000, 8_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            os.link(tmp_path / "one", folder / f"{number * 7919 % 100_003:06d}.jpg")
        tracemalloc.start()
        assert sum(1 for _ in listing.sorted_entries(folder)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 6,000 more names, sorted in memory, would take 1 MB; 12 more open files take 8 KiB each.
    assert peaks[1] - peaks[0] < 300_000


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    """They would be read forty times over, until the system gives up."""
    inner = tmp_path / "crops" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "crops" / "0.jpg").write_bytes(_image(0))
    (inner / "1.jpg").write_bytes(_image(1))
    (inner / "back").symlink_to(tmp_path / "crops")
    (inner / "itself").symlink_to(inner)
    with pytest.warns(DatasetWarning, match=r"inner/back \(a link to a folder that it lies in\)"):
        manifest = ingest(tmp_path / "crops", tmp_path / "set", layout="crops")
    assert manifest.splits["train"].images == 2
    assert manifest.skipped == 2


def test_links_to_images_elsewhere_are_read(tmp_path: Path) -> None:
    """A folder of links is a common way of choosing images; one to what is no image is listed."""
    (tmp_path / "crops").mkdir()
    (tmp_path / "0.jpg").write_bytes(_image())
    (tmp_path / "crops" / "a.jpg").symlink_to(tmp_path / "0.jpg")
    (tmp_path / "crops" / "passwd.jpg").symlink_to("/etc/passwd")
    (tmp_path / "crops" / "nowhere.jpg").symlink_to(tmp_path / "nothing")
    manifest = ingest(tmp_path / "crops", tmp_path / "set", layout="crops")
    assert manifest.splits["train"].images == 1
    lines = [json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"].split(":")[0] for line in lines} == {
        "passwd.jpg": "not an image",
        "nowhere.jpg": "cannot be read",
    }


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_and_devices_in_tars_are_passed_over(tmp_path: Path, mode: str) -> None:
    """A link ended the reading of a compressed archive, with all that comes behind it; nothing is written."""
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, mode) as archive:  # type: ignore[call-overload]  # a mode by name
        for name, kind, target in (
            ("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("up.jpg", tarfile.SYMTYPE, "../../x"),
            ("hard.jpg", tarfile.LNKTYPE, "/etc/passwd"), ("pipe.jpg", tarfile.FIFOTYPE, ""),
            ("device.jpg", tarfile.CHRTYPE, ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        for name in ("../../out.jpg", "/absolute.jpg", "last.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(_image())
            archive.addfile(info, io.BytesIO(_image()))
    path = tar if mode == "w" else tar.rename(tmp_path / "x.tar.gz")
    found = list(archives.tar_images(path, "k", Options()))
    assert [item.key for item in found] == ["k/../../out.jpg", "k//absolute.jpg", "k/last.jpg"]
    assert all(not isinstance(item, Unreadable) and item.image.read() == _image() for item in found)
    assert not (tmp_path.parent.parent / "out.jpg").exists()


def test_names_of_a_zip_that_lead_out_are_names_alone(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "crops.zip", "w") as archive:
        archive.writestr("../../out.jpg", _image(0))
        archive.writestr("/absolute.jpg", _image(1))
    manifest = ingest(tmp_path / "crops.zip", tmp_path / "set", layout="crops")
    assert manifest.splits["train"].images == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crops.zip", "set"]


def test_lists_that_lead_out_of_their_folder_are_refused(tmp_path: Path) -> None:
    """MSMT17's name every image: whoever wrote them must not choose what of this machine is read."""
    (tmp_path / "private_0_0_0.jpg").write_bytes(_image(0))
    root = tmp_path / "MSMT17_V1"
    (root / "train" / "0000").mkdir(parents=True)
    (root / "train" / "0000" / "0000_000_01_x.jpg").write_bytes(_image(1))
    lines = ["0000/0000_000_01_x.jpg 0", "../../private_0_0_0.jpg 1", f"{tmp_path}/private_0_0_0.jpg 2"]
    (root / "list_train.txt").write_text("\n".join(lines))
    found = list(LAYOUTS["msmt17"].read(root, Options()))
    assert isinstance(found[0], Found)
    assert [item.reason.partition(":")[0] for item in found[1:] if isinstance(item, Unreadable)] == [
        "path leads out of train"
    ] * 2
