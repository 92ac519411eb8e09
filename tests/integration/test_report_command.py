"""`dmx report`: one page of a run, whole or unfinished, with pictures or without, as a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import asked_by_page, chromium, look, measured
from numpy.typing import NDArray
from PIL import Image
from runs import prepare
from tiny import HEIGHT, WIDTH

from dmx.cli import main
from dmx.config import from_tree, read_yaml
from dmx.data.dataset import open_dataset
from dmx.data.images import decode
from dmx.data.shards import DatasetWriter
from dmx.model import build_model
from dmx.report.faces import blurred_rows, without_face
from dmx.report.report import SECTIONS
from dmx.train.checkpoint import FOLDER, Progress, write_checkpoint
from dmx.train.provenance import STARTS, record_start
from dmx.train.runlog import CONFIG, EPOCHS, read_lines
from dmx.train.worker import RESULT, train_worker

HOSTILE = "<img src=x onerror=document.title='run'>&\"'.jpg"
QUERIES, TOP = 6, 5
# As the tiny data sets name their files.
NAMES = re.compile(r"(query|gallery|train)/|\d_\d+_\d\.jpg")


@pytest.fixture(scope="module")
def run_folder(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, finished."""
    torch.set_num_threads(1)
    run = prepare(tmp_path_factory.mktemp("report") / "run", tiny_settings)
    record_start(run, {}, {}, 0)
    train_worker(run)
    return run


def report(*words: object) -> int:
    return main(["report", *map(str, words), "--device", "cpu", "--queries", str(QUERIES), "--top", str(TOP)])


@pytest.fixture(scope="module")
def page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert report(run_folder, "--out", out) == 0
    return out


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sections: list[str] = []
        self.addresses: list[str] = []
        self.frames: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.words = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.addresses += [values[name] for name in ("src", "href", "data", "action") if name in values]
        if tag == "section" and "id" in values:
            self.sections.append(values["id"])
        if tag == "li":
            self.frames.append(values.get("class", ""))
        if "data-chart" in values:
            self.charts.append(json.loads(values["data-chart"]))

    def handle_data(self, data: str) -> None:
        self.words += data

    @property
    def pictures(self) -> list[str]:
        return [address for address in self.addresses if address.startswith("data:")]

    def line(self, name: str) -> dict[str, Any]:
        """A curve of that name."""
        return next(line for chart in self.charts for line in chart["lines"] if line["name"] == name)


def pixels(uri: str) -> NDArray[np.int16]:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.int16)


def test_the_page_has_all_sections_and_the_runs_numbers(run_folder: Path, page: Path) -> None:
    shown = Page(page)
    assert shown.sections == list(SECTIONS)
    assert not shown.tags & {"link", "iframe", "object", "embed", "base", "form"}
    assert all(re.match(r"data:image/jpeg;base64,|#", address) for address in shown.addresses)
    epochs = read_lines(run_folder / EPOCHS)
    scores = [record["tests"]["unseen"]["map"] for record in epochs]
    assert shown.line("unseen")["y"] == [f"{100 * score:.3g} %" for score in scores]
    assert shown.line("clusters")["y"] == [str(record["clusters"]["clusters"]) for record in epochs[1:]]
    assert {"loss", "identity", "triplet", "balance", "domain", "entropy", "purity", "kept"} <= {
        line["name"] for chart in shown.charts for line in chart["lines"]
    }
    assert f"mAP {scores[-1]:.1%}" in shown.words, "measured anew as training measured it"
    for word in (
        "Epoch 2",
        "Epoch 4",
        "The largest that were dropped",
        "Equal error rate",
        "resnet10t",
        "torch",
    ):
        assert word in shown.words
    assert not re.search(r"No (losses|curve|clusters|rankings|distances|timings|versions)", shown.words)
    assert page.stat().st_size < 2e6


def test_rankings_are_those_of_the_model(run_folder: Path, page: Path, tmp_path: Path) -> None:
    """Against `dmx search`, which knows no protocol, where that leaves nothing out: hits of other cameras."""
    text = page.read_text(encoding="utf-8")
    rankings = text[text.index('<section id="rankings">') : text.index('<section id="distances">')]
    answers = rankings.split('<section class="answer">')[1:]
    assert len(answers) == QUERIES
    assert "The hardest queries" in rankings
    assert "Queries chosen at random" in rankings
    unseen = from_tree(("saved", read_yaml(run_folder / CONFIG))).data.tests[0]
    split = open_dataset(unseen).split("query")
    words = (unseen, unseen, "--split", "gallery", "--model", run_folder, "--top", "72", "--device", "cpu")
    assert main(["search", *map(str, words), "--out", str(tmp_path / "all.json")]) == 0
    searched = {q["key"]: q for q in json.loads((tmp_path / "all.json").read_text())["queries"]}
    hardness = []
    for answer in answers:
        key = re.search(r'<span class="key" title="([^"]*)"', answer)[1]  # type: ignore[index]
        query = searched[key]
        wanted = [
            hit
            for hit in query["hits"]
            if hit["identity"] != query["identity"] or hit["camera"] != query["camera"]
        ]
        marks = re.findall(r'<li class="(right|wrong)">', answer)
        assert marks[:TOP] == ["right" if hit["right"] else "wrong" for hit in wanted[:TOP]]
        first = next(place for place, hit in enumerate(wanted, 1) if hit["right"])
        assert f"first right: {first}<" in answer
        assert len(marks) == TOP + (first > TOP)
        ranks = [place for place, hit in enumerate(wanted, 1) if hit["right"]]
        precision = np.mean([place / rank for place, rank in enumerate(ranks, 1)])
        hardness.append(precision)
        assert f"AP {precision:.1%}" in answer
        # The picture, and beside it the same under a map, which is another.
        plain, mapped = (pixels(uri) for uri in re.findall(r'src="([^"]*)"', answer)[:2])
        own = decode(split.image_bytes(split.keys.index(key))).astype(np.int16)
        assert np.abs(plain - own).mean() < 12
        assert np.abs(mapped - own).mean() > 20
    half = QUERIES // 2
    assert hardness[:half] == sorted(hardness[:half])
    assert max(hardness[:half]) <= min(hardness[half:])


def test_no_head_is_in_a_blurred_page(run_folder: Path, page: Path, tmp_path: Path) -> None:
    """Every picture's upper part is that of an image without its head, and no file is named."""
    blurred = tmp_path / "blurred.html"
    assert report(run_folder, "--out", blurred, "--faces", "blur") == 0
    target = open_dataset(_data(run_folder).target).split("train")
    rows = blurred_rows(HEIGHT, WIDTH)

    def differences(file: Path) -> list[float]:
        """Of the upper part of contact sheets' pictures from what it may be, in levels."""
        found = []
        for uri, row in _strips(file):
            wanted = without_face(decode(target.image_bytes(int(row)))).astype(np.int16)
            found.append(float(np.abs(pixels(uri) - wanted)[: rows - 1].mean()))
        return found

    assert max(differences(blurred)) < 6 < np.median(differences(page))
    assert len(differences(blurred)) == len(differences(page)) > 20
    test = open_dataset(_data(run_folder).tests[0])
    known = np.stack(
        [
            without_face(decode(split.image_bytes(row)))
            for split in (test.split("query"), test.split("gallery"))
            for row in range(len(split))
        ]
    ).astype(np.int16)
    ranked = _ranked(blurred)
    assert len(ranked) == len(_ranked(page)) > QUERIES * TOP
    for uri in ranked:
        assert np.abs(known - pixels(uri))[:, : rows - 1].mean((1, 2, 3)).min() < 6
    assert "query/" in page.read_text(encoding="utf-8")
    assert not NAMES.search(blurred.read_text(encoding="utf-8"))


def _strips(file: Path) -> list[tuple[str, str]]:
    """Pictures of contact sheets, and their rows."""
    strips = re.findall(r'<ol class="strip .*?</ol>', file.read_text(encoding="utf-8"), re.DOTALL)
    return [found for strip in strips for found in re.findall(r'src="([^"]*)" alt="image (\d+)', strip)]


def _ranked(file: Path) -> list[str]:
    """Pictures of queries and hits, without those under maps."""
    frames = re.findall(r'alt="crop"><img src="[^"]*" alt="crop">', file.read_text(encoding="utf-8"))
    text = file.read_text(encoding="utf-8")
    found = re.findall(r'<div class="frame"><img src="([^"]*)" alt="crop"><img ', text)
    assert len(found) == len(frames)
    return found


def _data(run: Path) -> Any:
    return from_tree(("saved", read_yaml(run / CONFIG))).data


def test_a_page_without_images_has_none_and_names_none(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert report(run_folder, "--out", out, "--no-images") == 0
    shown, text = Page(out), out.read_text(encoding="utf-8")
    assert shown.sections == list(SECTIONS)
    assert "img" not in shown.tags
    assert not shown.pictures
    assert not re.search(r"data:image/|base64,|\.jpe?g", text)
    assert not NAMES.search(text)
    assert {"right", "wrong"} <= set(shown.frames), "rankings are there, by numbers"
    assert out.stat().st_size < 150e3


def test_a_broken_image_is_named_to_who_made_the_page_alone(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name may be somebody's, which a page without images keeps to itself."""
    unseen = open_dataset(_data(run_folder).tests[0])
    with DatasetWriter(tmp_path / "unseen", layout="folders", rows_per_shard=4096) as writer:
        for name in ("query", "gallery"):
            split = unseen.split(name)
            for row in range(len(split)):
                encoded = b"no image" if (name, row) == ("gallery", 5) else split.image_bytes(row)
                labels = int(split.identities[row]), int(split.cameras[row])
                writer.add(name, encoded, *labels, f"{name}/jane_doe_{row}.jpg")
    out, told = tmp_path / "report.html", []
    for options in (("--no-images",), ("--faces", "blur"), ()):
        assert report(run_folder, "--test", tmp_path / "unseen", "--out", out, *options) == 0
        assert "jane_doe_5.jpg" in capsys.readouterr().err
        assert "No rankings on unseen" in out.read_text(encoding="utf-8")
        told.append("jane_doe" in out.read_text(encoding="utf-8"))
    assert told == [False, False, True]


def test_an_unfinished_run_tells_what_it_has(run_folder: Path, tmp_path: Path) -> None:
    """After its first epoch, and its data moved: no clusters, no model, no data, and no error."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    for name in (RESULT, STARTS):
        (run / name).unlink()
    for name in (FOLDER, "clusters"):
        shutil.rmtree(run / name)
    (run / EPOCHS).write_text((run / EPOCHS).read_text().splitlines()[0] + "\n")
    assert report(run) == 0
    words = Page(run / "report.html").words
    for word in (
        "not finished: 1 of 4 epochs",
        "No clusters yet: the first 1 epochs",
        "No rankings: there is no model to measure",
        "No distances: there is no model",
        "No versions",
    ):
        assert word in words


def test_moved_data_sets_are_said_and_can_be_named(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    data = _data(run_folder)
    tree = read_yaml(run / CONFIG)
    tree["data"] |= {"target": str(tmp_path / "gone"), "tests": [str(tmp_path / "away")]}
    prepare(run, tree)
    assert report(run) == 0
    shown = Page(run / "report.html")
    for word in ("No pictures and no purity of clusters: the target cannot be read", "No rankings on away"):
        assert word in shown.words
    assert not shown.pictures
    assert "The largest that were dropped" in shown.words, "numbers of clusters need no images"
    assert f"{tmp_path}/gone" in capsys.readouterr().err

    named = ("--target", data.target, "--test", data.tests[0])
    assert report(run, *named) == 0
    assert Page(run / "report.html").pictures
    assert report(run, "--target", data.source, "--no-tests") == 0
    words = Page(run / "report.html").words
    assert "the clusters are of 144 images, the target has 180 now" in words
    assert "No rankings: left out by --no-tests" in words


def test_a_model_of_tokens_says_that_it_has_no_maps(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """And a run without a target, which kept nothing but a checkpoint."""
    tree = {
        "model": {
            "backbone": "vit_tiny_patch16_224",
            "backbone_args": {"img_size": [32, 16], "patch_size": 8, "depth": 1},
        },
        "data": {**tiny_settings["data"], "target": None},
    }
    run = prepare(tmp_path / "run", tree)
    config = from_tree(("test", tree))
    write_checkpoint(run, Progress(seed=0), config, {"model": build_model(config.model).state_dict()}, keep=1)
    assert report(run) == 0
    words = Page(run / "report.html").words
    assert "No activation maps: this model's last features are no map" in words
    assert "No clusters: the run has no target" in words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "report.pdf"), "--out: wanted a file that ends with .html or .htm, found report.pdf"),
        (("--out", "nowhere/report.html"), "found no folder nowhere"),
        (("--top", "0"), "--top: wanted at least 1, found 0"),
        (("--epochs", "-1"), "--epochs: wanted at least 0, found -1"),
        (("--device", "abacus"), "--device: cannot use 'abacus'"),
    ],
)
def test_mistakes_are_said_before_anything_is_embedded(
    run_folder: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run_folder), *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "embed" not in err


# What the page tells of itself, which its own policy would not let run.
PROBE = """const box = document.documentElement, all = [...document.images];
const plot = document.querySelector("[data-chart]"), svg = plot.querySelector("svg").getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: svg.left + svg.width / 2}));
const told = { over: box.scrollWidth - innerWidth, width: innerWidth, title: document.title,
  broken: all.filter(i => !i.naturalWidth).length, pictures: all.length,
  wide: [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, pre, details:not([open])")
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
  ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  sections: [...document.querySelectorAll("section[id]")].filter(s => s.offsetHeight > 40).map(s => s.id),
  tip: plot.querySelector(".tip").textContent };"""


@pytest.fixture(scope="module")
def hostile_page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a test set whose images have names that would be code."""
    folder = tmp_path_factory.mktemp("hostile")
    unseen = open_dataset(_data(run_folder).tests[0])
    with DatasetWriter(folder / "unseen", layout="folders", rows_per_shard=4096) as writer:
        for name in ("query", "gallery"):
            split = unseen.split(name)
            for row in range(len(split)):
                encoded, key = split.image_bytes(row), f"{name}/{row}{HOSTILE}"
                writer.add(name, encoded, int(split.identities[row]), int(split.cameras[row]), key)
    assert report(run_folder, "--test", folder / "unseen", "--out", folder / "report.html") == 0
    assert HOSTILE not in (folder / "report.html").read_text()
    return folder / "report.html"


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_it(hostile_page: Path, tmp_path: Path, width: int, is_dark: bool) -> None:
    """Nothing sticks out, nothing is fetched, nothing complains, whatever the images are called."""
    chromium()
    theme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    shot, net = tmp_path / "shot.png", tmp_path / "net.json"
    done = look(
        hostile_page,
        tmp_path,
        width,
        theme,
        "--enable-logging=stderr",
        f"--screenshot={shot}",
        f"--log-net-log={net}",
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert not asked_by_page(net)
    screen = np.asarray(Image.open(shot).convert("L"), np.int16)
    assert screen.shape[1] == width
    assert (np.median(screen) < 60) == is_dark

    told = measured(hostile_page, tmp_path, width, PROBE, theme)
    assert (told["over"], told["wide"], told["broken"]) == (0, [], 0)
    assert told["pictures"] > 50
    assert told["sections"] == list(SECTIONS)
    assert told["title"] == "Run run"
    assert re.fullmatch(r"epoch [\d.]+\nloss: [\d.]+", told["tip"])


def test_what_a_page_asks_for_would_be_noticed(tmp_path: Path) -> None:
    page, net = tmp_path / "asks.html", tmp_path / "net.json"
    page.write_text('<img src="http://example.invalid/a.png">', encoding="utf-8")
    look(page, tmp_path, 390, f"--log-net-log={net}", f"--screenshot={tmp_path / 'shot.png'}")
    assert asked_by_page(net) == {"http://example.invalid/a.png"}


def test_without_its_script_a_chart_is_whole(page: Path) -> None:
    """What the pointer tells is in the table, too."""
    text = re.sub(r"<script>.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert text.count("<svg") == text.count('role="img"') >= 12
    assert "Numbers by epoch" in text
