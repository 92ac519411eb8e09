"""Every published layout from end to end: rendered people in it, ingested, trained on, evaluated.

Layouts of synthetic sets are the labelled source of a run, all others its unlabelled target. A target with
query and gallery is evaluated on itself, the others on people rendered for it.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from dmx.cli import main
from dmx.data.dataset import open_dataset
from dmx.data.layouts import LAYOUTS
from dmx.synth.dataset import Request, write_dataset
from dmx.train.runlog import EPOCHS, read_lines

PEOPLE, CAMERAS, IMAGES, HEIGHT = 16, 3, 6, 64
TRAIN, QUERY, GALLERY = "train", "query", "gallery"
NAME = re.compile(r"(\d+)_s\d+_c(\d+)_f(\d+)\.jpg")


@dataclass(frozen=True)
class Picture:
    """One rendered image, and who is on it."""

    split: str
    person: int
    camera: int
    index: int
    jpeg: bytes


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered sets as `dmx synth` leaves them: train/ and test/."""
    root = tmp_path_factory.mktemp("rendered")
    for split in (TRAIN, "test"):
        size = {"identities": PEOPLE, "cameras": CAMERAS, "images": IMAGES, "height": HEIGHT}
        write_dataset(root / split, Request(style="street", split=split, seed=0, **size))
    return root


@pytest.fixture(scope="module")
def pictures(rendered: Path) -> list[Picture]:
    found = []
    folders = {"train": TRAIN, "test/query": QUERY, "test/bounding_box_test": GALLERY}
    for folder, split in folders.items():
        for path in sorted((rendered / folder).glob("*.jpg")):
            match = NAME.fullmatch(path.name)
            assert match is not None
            found.append(Picture(split, *map(int, match.groups()), path.read_bytes()))
    return found


def write(root: Path, pictures: Iterable[Picture], name: Callable[[Picture], str]) -> None:
    """A file for every picture; as PNG where its name says so."""
    for picture in pictures:
        path = root / name(picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists()
        if path.suffix == ".png":
            Image.open(io.BytesIO(picture.jpeg)).save(path)
        else:
            path.write_bytes(picture.jpeg)


def by_folder(pattern: str, folders: dict[str, str], cameras: tuple[int, ...]) -> Callable[..., None]:
    """A layout that is no more than folders and names; camera numbers from `cameras`."""

    def build(root: Path, pictures: list[Picture]) -> None:
        def name(p: Picture) -> str:
            return pattern.format(folder=folders[p.split], p=p.person + 1, c=cameras[p.camera], i=p.index)

        write(root, [p for p in pictures if p.split in folders], name)

    return build


MARKET_FOLDERS = {TRAIN: "bounding_box_train", QUERY: "query", GALLERY: "bounding_box_test"}


def msmt17(root: Path, pictures: list[Picture]) -> None:
    lists: dict[str, list[str]] = {"train": [], "val": [], "query": [], "gallery": []}

    def name(p: Picture) -> str:
        file = (
            f"{p.person:04d}/{p.person:04d}_{p.index:03d}_{p.camera + 1:02d}_0303morning_{p.index:04d}_0.jpg"
        )
        held_out = "val" if p.person % 4 == 0 else "train"
        lists[held_out if p.split == TRAIN else p.split].append(f"{file} {p.person}")
        # Query and gallery lie in one folder.
        return f"{'train' if p.split == TRAIN else 'test'}/{file}"

    write(root / "MSMT17_V1", pictures, name)
    for part, lines in lists.items():
        (root / "MSMT17_V1" / f"list_{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def luperson(root: Path, pictures: list[Picture]) -> None:
    lmdb = pytest.importorskip("lmdb", reason="LUPerson is an LMDB")
    train = [p for p in pictures if p.split == TRAIN]
    keys = [f"US_03_0001_{number:08d}" for number in range(len(train))]
    (root / "lmdb").mkdir(parents=True)
    with lmdb.open(str(root / "lmdb"), map_size=1 << 24) as environment, environment.begin(write=True) as out:
        for key, picture in zip(keys, train, strict=True):
            out.put(key.encode(), picture.jpeg)
    (root / "keys.pkl").write_bytes(pickle.dumps(keys))


def webdataset(root: Path, pictures: list[Picture]) -> None:
    root.mkdir()
    for split in (TRAIN, QUERY, GALLERY):
        with tarfile.open(root / f"{split}-000000.tar", "w") as archive:
            for number, p in enumerate(picture for picture in pictures if picture.split == split):
                label = json.dumps({"pid": p.person, "camid": p.camera}).encode()
                for suffix, content in (("jpg", p.jpeg), ("json", label)):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


SOURCES: dict[str, Callable[[Path, list[Picture]], None]] = {
    "randperson": by_folder("randperson_subset/{p:06d}_s00_c{c:02d}_f{i:06d}.jpg", {TRAIN: ""}, (0, 1, 2)),
    "unrealperson": by_folder("unreal_v1.1/images/{p:04d}_c{c:03d}_{i}.jpg", {TRAIN: ""}, (1, 5, 17)),
    "clonedperson": by_folder(
        "{folder}/{p:06d}_s01_c{c:02d}_f{i:06d}.jpg",
        {TRAIN: "train", QUERY: "test/query", GALLERY: "test/gallery"},
        (0, 1, 2),
    ),
    "personx": by_folder("{folder}/{p:04d}_c{c}_{i}.jpg", MARKET_FOLDERS, (3, 4, 12)),
}
TARGETS: dict[str, Callable[[Path, list[Picture]], None]] = {
    "market1501": by_folder("{folder}/{p:04d}_c{c}s1_{i:06d}_00.jpg", MARKET_FOLDERS, (1, 3, 6)),
    "dukemtmc-reid": by_folder("{folder}/{p:04d}_c{c}_f{i:07d}.jpg", MARKET_FOLDERS, (1, 2, 8)),
    "cuhk03-np": by_folder("detected/{folder}/{p:04d}_c{c}_{i}.png", MARKET_FOLDERS, (1, 2, 2)),
    "veri776": by_folder(
        "{folder}/{p:04d}_c{c:03d}_{i:08d}_0.jpg",
        {TRAIN: "image_train", QUERY: "image_query", GALLERY: "image_test"},
        (1, 2, 20),
    ),
    "msmt17": msmt17,
    "luperson": luperson,
    "folder": by_folder(
        "{folder}/{p:04d}/{c}_{i}.jpg", {TRAIN: "train", QUERY: "query", GALLERY: "gallery"}, (1, 2, 3)
    ),
    "crops": by_folder("f{i:04d}_{p:02d}{c}.jpg", {TRAIN: ""}, (1, 2, 3)),
    "webdataset": webdataset,
}  # fmt: skip


# Layouts that do not tell who is on a picture, or before which camera; CUHK03-NP names two of them.
NOBODY, NO_CAMERA = {"luperson", "crops"}, {"luperson", "crops", "folder"}
CAMERAS_OF = {"cuhk03-np": 2}


def test_every_layout_is_here() -> None:
    assert set(SOURCES) | set(TARGETS) == set(LAYOUTS)


@pytest.mark.parametrize("layout", [*SOURCES, *TARGETS])
def test_who_is_before_which_camera_is_read(layout: str, pictures: list[Picture], tmp_path: Path) -> None:
    """All pictures of training, their people told apart as they were, and their cameras."""
    (SOURCES | TARGETS)[layout](tmp_path / "raw", pictures)
    assert main(["ingest", str(tmp_path / "raw"), str(tmp_path / "data")]) == 0
    split = open_dataset(tmp_path / "data").split(TRAIN)
    wanted = [p for p in pictures if p.split == TRAIN]
    assert len(split) == len(wanted)
    people = {} if layout in NOBODY else Counter(p.person for p in wanted)
    found = Counter(number for number in split.identities.tolist() if number >= 0)
    assert sorted(found.values()) == sorted(people.values())
    cameras = {number for number in split.cameras.tolist() if number >= 0}
    assert len(cameras) == (0 if layout in NO_CAMERA else CAMERAS_OF.get(layout, CAMERAS))


@pytest.mark.parametrize(("number", "target"), list(enumerate(TARGETS)))
def test_from_published_files_to_a_result(
    number: int, target: str, rendered: Path, pictures: list[Picture], tmp_path: Path
) -> None:
    """Two layouts, one labelled and one not; the labels of the second never train."""
    source = list(SOURCES)[number % len(SOURCES)]
    SOURCES[source](tmp_path / "raw" / source, pictures)
    TARGETS[target](tmp_path / "raw" / target, pictures)
    data = tmp_path / "data"
    for layout in (source, target):
        assert main(["ingest", str(tmp_path / "raw" / layout), str(data / layout)]) == 0
        assert json.loads((data / layout / "manifest.json").read_text())["layout"] == layout
    test = data / target if QUERY in open_dataset(data / target).splits else rendered / "test"
    settings = {
        "data.height": 32, "data.width": 16, "model.backbone": "resnet10t",
        "model.backbone_args": "{channels: [8, 16, 32, 64], stem_width: 8}",
        "model.discriminator_widths": "[32]", "augment.pad": 2, "batch.identities": 4,
        # An epoch on the source alone, so that there is something to cluster by, and one of everything.
        "schedule.epochs": 2, "schedule.source_epochs": 1, "schedule.stage_two_epoch": 1,
        "schedule.steps_per_epoch": 12, "schedule.warmup_epochs": 0, "optim.lr": 0.002,
        "cluster.k1": 6, "cluster.k2": 2, "cluster.eps": 0.5, "cluster.min_cluster_size": 2,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    run = tmp_path / "run"
    train = ["train", "--launcher", "inline", "--run", str(run), "--source", str(data / source)]
    assert main([*train, "--target", str(data / target), "--test", str(test), *words]) == 0
    epoch = read_lines(run / EPOCHS)[-1]
    assert epoch["stage"] == "two"
    assert epoch["clusters"]["kept"] > 0
    assert main(["evaluate", str(run), str(test), "--json", str(tmp_path / "told.json")]) == 0
    (told,) = json.loads((tmp_path / "told.json").read_text())["results"].values()
    trained = next(iter(json.loads((run / "result.json").read_text())["tests"].values()))
    assert told["map"] == pytest.approx(trained["map"], abs=1e-6)
    assert told["valid_queries"] > 0
