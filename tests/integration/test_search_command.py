"""`dmx search`: the ranking is that of all products of embeddings, an index is opened again or refused."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from browser import chromium, look, measured
from numpy.typing import NDArray
from PIL import Image
from runs import write_run

from dmx.cli import main
from dmx.data.dataset import open_dataset
from dmx.data.shards import DatasetWriter, Split
from dmx.embedding import embed
from dmx.train.checkpoint import load_model

PEOPLE, TOP = 8, 5
BROKEN = {3: b"no image", 20: b"\xff\xd8\xff cut"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any]) -> Path:
    return write_run(tmp_path_factory.mktemp("model") / "run", tiny_settings, 0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    tiny.write_set(folder, 5, {"query": PEOPLE, "gallery": PEOPLE}, rows_per_shard=40)
    return folder


@pytest.fixture
def with_broken(dataset: Path, tmp_path: Path) -> Path:
    """The gallery, with two images that cannot be decoded."""
    source = open_dataset(dataset).split("gallery")
    with DatasetWriter(tmp_path / "broken", layout="folders", rows_per_shard=40) as writer:
        for row in range(len(source)):
            writer.add(
                "gallery",
                BROKEN.get(row, source.image_bytes(row)),
                int(source.identities[row]),
                int(source.cameras[row]),
                source.keys[row],
            )
    return tmp_path / "broken"


def search(*words: object) -> int:
    return main(["search", *map(str, words), "--device", "cpu", "--batch-size", "7"])


def found(tmp_path: Path, *words: object) -> dict[str, Any]:
    """What the command writes as JSON."""
    out = tmp_path / "ranking.json"
    assert search(*words, "--out", out, "--top", TOP) == 0
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def embeddings(run: Path, split: Split) -> NDArray[np.float32]:
    model, config = load_model(run)
    return embed(
        model, split, height=config.data.height, width=config.data.width, batch_size=16, device="cpu"
    )


def check_ranking(content: dict[str, Any], run: Path, query: Split, gallery: Split) -> None:
    """Against the matrix of all products."""
    products = embeddings(run, query) @ embeddings(run, gallery).T
    order = np.argsort(-products, axis=1, kind="stable")[:, :TOP]
    assert [q["key"] for q in content["queries"]] == query.keys
    for row, (answer, best) in enumerate(zip(content["queries"], order, strict=True)):
        assert answer["identity"] == query.identities[row]
        hits = answer["hits"]
        assert [hit["rank"] for hit in hits] == list(range(1, TOP + 1))
        assert [hit["key"] for hit in hits] == [gallery.keys[i] for i in best]
        assert [hit["identity"] for hit in hits] == gallery.identities[best].tolist()
        assert [hit["camera"] for hit in hits] == gallery.cameras[best].tolist()
        assert [hit["right"] for hit in hits] == [
            gallery.identities[i] == query.identities[row] for i in best
        ]
        np.testing.assert_allclose([hit["similarity"] for hit in hits], products[row, best], atol=2e-6)


def test_the_ranking_is_that_of_all_products(run_folder: Path, dataset: Path, tmp_path: Path) -> None:
    content = found(tmp_path, dataset, dataset, "--split", "gallery", "--model", run_folder)
    opened = open_dataset(dataset)
    check_ranking(content, run_folder, opened.split("query"), opened.split("gallery"))


def test_a_kept_index_is_opened_without_embedding_again(
    run_folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "data"
    shutil.copytree(dataset, place)
    index = tmp_path / "kept/index"
    words = (place, place, "--split", "gallery", "--model", run_folder, "--index", index)
    first = found(tmp_path, *words)
    assert f"{index} is written: 72 images" in capsys.readouterr().err
    before = {path.name: path.stat().st_mtime_ns for path in index.iterdir()}
    assert [path.name for path in index.parent.iterdir()] == ["index"]

    assert found(tmp_path, *words)["queries"] == first["queries"]
    told = capsys.readouterr().err
    assert "is written" not in told
    assert f"{index} is opened" in told
    assert {path.name: path.stat().st_mtime_ns for path in index.iterdir()} == before

    # The index alone, its gallery gone: the query is an image file.
    picture = tmp_path / "someone.jpg"
    picture.write_bytes(open_dataset(dataset).split("query").image_bytes(4))
    shutil.rmtree(place)
    (alone,) = found(tmp_path, index, picture, "--model", run_folder)["queries"]
    kept = first["queries"][4]["hits"]
    assert [(hit["rank"], hit["key"]) for hit in alone["hits"]] == [(hit["rank"], hit["key"]) for hit in kept]
    assert (alone["key"], alone["identity"], alone["hits"][0]["right"]) == (str(picture), None, None)
    page = tmp_path / "page.html"
    assert search(index, picture, "--model", run_folder, "--out", page, "--top", 2) == 0
    assert f"warning: no pictures of the gallery: {place}: wanted a data set" in capsys.readouterr().err
    assert len(Page(page).pictures) == 1
    assert page.read_text().count("no picture") == 2


def test_another_model_or_gallery_is_refused(
    run_folder: Path,
    dataset: Path,
    tmp_path: Path,
    tiny_settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = tmp_path / "index"
    words = (dataset, dataset, "--split", "gallery", "--index", index)
    assert search(*words, "--model", run_folder) == 0
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    other = write_run(tmp_path / "other", tiny_settings, 1)
    mine = ("--model", run_folder)
    tiny.write_set(tmp_path / "elsewhere", 6, {"query": 2, "gallery": 2})
    capsys.readouterr()
    for refused, message in (
        (
            (*words, "--model", other),
            rf"index: wanted embeddings by the model {other} .*, found some by {run_folder}",
        ),
        ((index, dataset, "--model", other), rf"index: wanted embeddings by the model {other} "),
        (
            (*words, *mine, "--height", 48),
            "wanted embeddings with image_height 48.*found image_height 32; give --height 32",
        ),
        ((*words, *mine, "--flip"), "wanted embeddings with flip True.*found flip False; leave --flip out"),
        ((*words, *mine, "--index-type", "ivf"), "wanted an index of type ivf, found one of type flat"),
        ((*words, *mine, "--probes", 3), "wanted an index of type ivf, found one of type flat"),
        ((dataset, dataset, *mine, "--index", index), "found one of that gallery as it was before"),
        (
            (tmp_path / "elsewhere", dataset, *mine, "--split", "gallery", "--index", index),
            rf"wanted an index of the gallery {tmp_path}/elsewhere, found one of the gallery {dataset};",
        ),
        ((index, dataset, *mine, "--split", "gallery"), "--split gallery: wanted a data set or features"),
        (
            (index, dataset, *mine, "--index", tmp_path / "new"),
            "--index .*new: wanted a data set or features",
        ),
        ((dataset, dataset, *mine, "--index", dataset), "found something else in"),
    ):
        assert search(*refused) == 2, refused
        told = capsys.readouterr().err
        assert re.search(message, told), told
        assert told.count("\n") == 1, "nothing is embedded first"
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before


def test_a_gallery_that_has_changed_is_noticed(
    run_folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder of crops, even if the names are the same."""
    split = open_dataset(dataset).split("gallery")
    (tmp_path / "crops").mkdir()
    for row in range(12):
        (tmp_path / f"crops/{row}.jpg").write_bytes(split.image_bytes(row))
    words = (tmp_path / "crops", dataset, "--model", run_folder, "--index", tmp_path / "index")
    assert search(*words) == 0
    assert search(*words) == 0
    assert "is opened: 12 images" in capsys.readouterr().err
    (tmp_path / "crops/7.jpg").write_bytes(split.image_bytes(40))
    assert search(*words) == 2
    assert "that gallery as it was before it changed" in capsys.readouterr().err


def test_what_lists_find_is_measured(
    run_folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    words = (dataset, dataset, "--split", "gallery", "--model", run_folder, "--index", index)
    content = found(tmp_path, *words, "--index-type", "ivf")
    assert content["lists"] == {"lists": 1, "probes": 1, "recall": 1.0, "neighbours": TOP, "sampled": 72}
    opened = open_dataset(dataset)
    check_ranking(content, run_folder, opened.split("query"), opened.split("gallery"))
    capsys.readouterr()
    assert found(tmp_path, *words)["queries"] == content["queries"]
    assert "1 of 1 lists are searched; recall 1.0000 of the 5 nearest others" in capsys.readouterr().err


def test_broken_images(
    run_folder: Path, dataset: Path, with_broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    content = found(tmp_path, with_broken, dataset, "--model", run_folder, "--index", index)
    told = capsys.readouterr().err
    split = open_dataset(with_broken).split("gallery")
    keys = [split.keys[row] for row in BROKEN]
    assert "warning: 2 images of the gallery are left out" in told
    assert all(f"  {key}: not " in told for key in keys)
    assert [item["key"] for item in content["left_out"]] == keys
    assert content["images"] == len(split) - 2
    listed = [json.loads(line)["key"] for line in (index / "skipped.jsonl").read_text().splitlines()]
    assert listed == keys
    # Those after a broken one are still who they were.
    whole = np.delete(np.arange(len(split)), list(BROKEN))
    products = (
        embeddings(run_folder, open_dataset(dataset).split("query"))
        @ embeddings(run_folder, open_dataset(dataset).split("gallery"))[whole].T
    )
    order = whole[np.argsort(-products, axis=1, kind="stable")[:, :TOP]]
    for answer, rows in zip(content["queries"], order, strict=True):
        assert [hit["key"] for hit in answer["hits"]] == [split.keys[row] for row in rows]
        assert [hit["identity"] for hit in answer["hits"]] == split.identities[rows].tolist()
        # Another data set: its identities are numbers of other people.
        assert {hit["right"] for hit in answer["hits"]} == {None}

    (tmp_path / "broken.jpg").write_bytes(BROKEN[3])
    assert search(dataset, dataset, tmp_path / "broken.jpg", "--model", run_folder) == 2
    assert f"{tmp_path}/broken.jpg: wanted an image to search for" in capsys.readouterr().err
    assert search(dataset, with_broken, "--model", run_folder) == 2
    assert f"image {keys[0]}: wanted an image that can be decoded" in capsys.readouterr().err
    assert search(dataset, tmp_path / "nobody.jpg", "--model", run_folder) == 2
    assert f"{tmp_path}/nobody.jpg: wanted a data set, found nothing" in capsys.readouterr().err


def test_who_is_right_is_told_for_numbers_of_the_same_people_only(
    run_folder: Path, dataset: Path, with_broken: Path, tmp_path: Path
) -> None:
    words = (with_broken, dataset, "--model", run_folder, "--same-identities")
    hits = [(a["identity"], hit) for a in found(tmp_path, *words)["queries"] for hit in a["hits"]]
    assert {hit["right"] for _, hit in hits} == {True, False}
    assert all(hit["right"] == (hit["identity"] == identity) for identity, hit in hits)


def test_an_image_is_no_hit_of_its_own(run_folder: Path, dataset: Path, tmp_path: Path) -> None:
    content = found(tmp_path, dataset, dataset, "--model", run_folder)
    opened = open_dataset(dataset)
    assert content["images"] == len(opened.split("query")) + len(opened.split("gallery"))
    for answer in content["queries"]:
        assert len(answer["hits"]) == TOP
        assert answer["key"] not in [hit["key"] for hit in answer["hits"]]


@pytest.mark.timeout(300)
def test_features_of_dmx_embed_are_searched_as_they_are(
    run_folder: Path,
    dataset: Path,
    tmp_path: Path,
    tiny_settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    features = tmp_path / "features"
    options = ("--split", "gallery", "--precision", "fp32", "--compile", "off")
    assert main(["embed", str(run_folder), str(dataset), "--out", str(features), *options]) == 0
    capsys.readouterr()
    content = found(tmp_path, features, dataset, "--model", run_folder)
    opened = open_dataset(dataset)
    check_ranking(content, run_folder, opened.split("query"), opened.split("gallery"))
    assert "warning" not in capsys.readouterr().err
    # The pictures are found in the data set that the features are of.
    page = tmp_path / "page.html"
    assert search(features, dataset, "--model", run_folder, "--out", page, "--top", 2) == 0
    assert len(Page(page).pictures) == 3 * len(opened.split("query"))

    other = write_run(tmp_path / "other", tiny_settings, 1)
    assert search(features, dataset, "--model", other) == 2
    assert "features: wanted embeddings by the model" in capsys.readouterr().err


def test_features_of_others_need_the_same_width(
    run_folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 64)
    pq.write_table(pa.table({"mine": lists, "row": ["a"] * 50}), tmp_path / "x.parquet")
    query = open_dataset(dataset).split("query")
    content = found(tmp_path, tmp_path / "x.parquet", dataset, "--model", run_folder)
    assert "nothing tells which model made these features" in capsys.readouterr().err
    products = embeddings(run_folder, query) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    for answer, best in zip(content["queries"], np.argsort(-products, axis=1), strict=True):
        assert [hit["key"] for hit in answer["hits"]] == [f"row {row}" for row in best[:TOP]]
        assert {hit["identity"] for hit in answer["hits"]} == {None}

    narrow = pa.FixedSizeListArray.from_arrays(pa.array(x[:, :9].ravel()), 9)
    pq.write_table(pa.table({"embedding": narrow}), tmp_path / "y.parquet")
    assert search(tmp_path / "y.parquet", dataset, "--model", run_folder) == 2
    told = capsys.readouterr().err
    assert "y.parquet: wanted features of width 64" in told
    assert "found width 9" in told


class Page(HTMLParser):
    """What a page holds: its pictures, the frames of its hits, and what it would fetch or run."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.frames: list[str | None] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert not [name for name in values if name.startswith("on")]
        if tag == "img":
            self.pictures.append(values["src"] or "")
        if tag == "li":
            self.frames.append(values.get("class"))


def test_the_page_holds_what_it_shows(run_folder: Path, dataset: Path, tmp_path: Path) -> None:
    words = (dataset, dataset, "--split", "gallery", "--model", run_folder)
    page = tmp_path / "page.html"
    assert search(*words, "--top", TOP, "--out", page) == 0
    queries = found(tmp_path, *words)["queries"]
    shown = Page(page)
    marks = {True: "right", False: "wrong", None: None}
    assert shown.frames == [marks[hit["right"]] for answer in queries for hit in answer["hits"]]
    assert {"right", "wrong"} == set(shown.frames)
    assert len(shown.pictures) == len(queries) * (1 + TOP)
    assert shown.addresses == shown.pictures
    assert not shown.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert "url(" not in page.read_text()
    split = open_dataset(dataset).split("query")
    for row, uri in enumerate(shown.pictures[:: 1 + TOP]):
        difference = pixels(uri) - np.asarray(Image.open(io.BytesIO(split.image_bytes(row))), np.int16)
        assert np.abs(difference).mean() < 10, "the query's own picture"

    assert search(*words, "--top", TOP, "--out", page, "--no-images") == 0
    bare = Page(page)
    assert bare.frames == shown.frames
    assert not bare.addresses


def pixels(uri: str) -> NDArray[np.int16]:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.int16)


def coloured_set(folder: Path, name: str) -> list[NDArray[np.uint8]]:
    """Large pictures of one colour each, one of which has a hostile name."""
    colours = [
        np.array(rgb, np.uint8) for rgb in ((230, 30, 30), (30, 200, 40), (40, 60, 220), (210, 190, 30))
    ]
    folder.mkdir()
    for number, colour in enumerate(colours):
        file = folder / (name if number == 2 else f"{number}.png")
        Image.fromarray(np.broadcast_to(colour, (400, 200, 3)).copy()).save(file, "PNG")
    return colours


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_every_picture(run_folder: Path, tmp_path: Path, width: int) -> None:
    """In both widths nothing sticks out; the colours of all pictures are on the screen."""
    chromium()
    hostile = "<img src=x onerror=document.title='run'>&amp;\"'.png"
    colours = coloured_set(tmp_path / "crops", hostile)
    page = tmp_path / "page.html"
    words = (tmp_path / "crops", tmp_path / "crops/0.png", "--model", run_folder, "--out", page)
    assert search(*words) == 0

    shot = tmp_path / "shot.png"
    look(page, tmp_path, width, f"--screenshot={shot}")
    screen = np.asarray(Image.open(shot).convert("RGB"), np.int16)
    assert screen.shape[1] == width
    for number, colour in enumerate(colours):
        area = int((np.abs(screen - colour.astype(np.int16)).max(2) < 12).sum())
        # 128 x 64 pixels each, and the query's twice: as the query and as a hit.
        assert area == pytest.approx((2 if number == 0 else 1) * 128 * 64, rel=0.05), number

    script = """const all = [...document.images]; const told = { width: innerWidth,
        sizes: all.map(i => [i.naturalWidth, i.naturalHeight]), names: all.map(i => i.alt),
        title: document.title, over: document.documentElement.scrollWidth - innerWidth };"""
    told = measured(page, tmp_path, width, script)
    assert told["sizes"] == [[64, 128]] * 5
    assert hostile in told["names"]
    assert told["title"] == "Ranking of crops"
    assert told["over"] <= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top", 0], "--top: wanted at least 1, found 0"),
        (["--batch-size", 0], "--batch-size: wanted at least 1"),
        (["--probes", 0], "--probes: wanted at least 1"),
        (["--probes", 4, "--index-type", "flat"], "--probes: wanted an index of lists"),
        (
            ["--out", "ranking.txt"],
            "--out: wanted a file that ends with .json, .html or .htm, found ranking.txt",
        ),
        (["--out", "absent/ranking.json"], "--out: .*found no folder absent"),
        (["--index", "s3://bucket/index"], "--index: wanted a local folder"),
    ],
)
def test_mistakes_are_noticed_before_anything_is_opened(
    options: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["no-gallery", "no-query", "--model", "no-run", *map(str, options)]
    assert main(["search", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_faiss_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # as Python notes that a module is not there
    assert main(["search", "no-gallery", "no-query", "--model", "no-run"]) == 2
    assert "pip install 'dmx[search]'" in capsys.readouterr().err


def test_a_terminal_gets_a_table(
    run_folder: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (dataset, dataset, "--split", "gallery", "--model", run_folder)
    assert search(*words, "--top", TOP) == 0
    *blocks, last = capsys.readouterr().out.strip().split("\n\n")
    queries = found(tmp_path, *words)["queries"]
    for answer, block in zip(queries, blocks, strict=True):
        head, names, *lines = block.splitlines()
        assert head == f"{answer['key']} (identity {answer['identity']}, camera {answer['camera']})"
        assert names.split() == ["rank", "similarity", "identity", "camera", "image"]
        for hit, line in zip(answer["hits"], lines, strict=True):
            rank, similarity, identity, camera, mark, key = line.split()
            assert (int(rank), int(identity), int(camera), key) == tuple(
                hit[name] for name in ("rank", "identity", "camera", "key")
            )
            assert float(similarity) == pytest.approx(hit["similarity"], abs=6e-5)
            assert mark == ("right" if hit["right"] else "wrong")
    right = sum(answer["hits"][0]["right"] for answer in queries)
    assert last == f"{len(queries)} queries; the first hit is right for {right} of 24 whose identity is known"
