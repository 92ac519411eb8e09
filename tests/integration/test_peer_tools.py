"""BoxMOT and Roboflow's reid, as they are on the package index, with what `dmx export` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import peers
import pytest
import walking
from numpy.typing import NDArray
from PIL import Image

import dmx
from dmx.cli import main
from dmx.embedder import ImageEmbedder

DOCUMENT = Path(__file__).parents[2] / "docs" / "how-to" / "trackers.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With export/first and frames/, as the document has them."""
    folder = tmp_path_factory.mktemp("trackers")
    run = walking.write_untrained(folder / "runs" / "first")
    assert main(["export", str(run), str(folder / "export" / "first")]) == 0
    return folder


@pytest.fixture(scope="module")
def film(folder: Path) -> walking.Film:
    film = walking.film()
    (folder / "frames").mkdir()
    for number, frame in enumerate(film.frames):
        Image.fromarray(frame).save(folder / "frames" / f"{number}.png")
    np.savez(folder / "film.npz", frames=film.frames, detections=film.detections, large=large(film))
    return film


def large(film: walking.Film) -> NDArray[np.uint8]:
    """Some of its people at 1.5 times the model's size."""
    size = (walking.PERSON_WIDTH * 3 // 2, walking.PERSON_HEIGHT * 3 // 2)
    crops = [Image.fromarray(crop).resize(size, Image.Resampling.BICUBIC) for crop in film.crops()[:8]]
    return np.stack([np.asarray(crop) for crop in crops])


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageEmbedder:
    return dmx.load(folder / "export" / "first", device="cpu")


@pytest.fixture(scope="module")
def tracked(peer_tools: Path, folder: Path, film: walking.Film) -> dict[str, NDArray[np.float64]]:
    peers.run(peer_tools, "boxmot_tracks.py", "export/first/model.onnx", "film.npz", "out.json", cwd=folder)
    return {name: np.array(each) for name, each in json.loads((folder / "out.json").read_text()).items()}


def test_boxmot_computes_the_same_embeddings(
    tracked: dict[str, NDArray[np.float64]], film: walking.Film, model: ImageEmbedder
) -> None:
    """From the ONNX file as it is. Crops have the model's size, so that nobody resizes: 1e-6 was measured."""
    np.testing.assert_allclose(tracked["embeddings"], model.embed(film.crops()), atol=1e-4)


def test_boxmot_resizes_without_smoothing(
    tracked: dict[str, NDArray[np.float64]], film: walking.Film, model: ImageEmbedder
) -> None:
    """So embeddings of crops of another size are near DMX's, and not the same."""
    similarity = (tracked["large"] * model.embed(list(large(film)))).sum(axis=1)
    assert 0.9 < similarity.min() < 0.99999


def identities(tracks: NDArray[np.float64], people: NDArray[np.int64]) -> list[set[int]]:
    """The tracks of each person."""
    return [set(tracks[(people == person) & (tracks >= 0)].astype(int)) for person in (0, 1)]


def test_strongsort_knows_by_our_model_who_overtook_whom(
    tracked: dict[str, NDArray[np.float64]], film: walking.Film
) -> None:
    first, second = identities(tracked["StrongSort"], film.people)
    assert len(first) == len(second) == 1
    assert first != second
    # The film is hard enough: where all look alike, it takes each for the other.
    assert identities(tracked["blind"], film.people) == [first | second, first | second]


@pytest.mark.parametrize("tracker", ["DeepOcSort", "BotSort"])
def test_other_trackers_follow_everybody(
    tracker: str, tracked: dict[str, NDArray[np.float64]], film: walking.Film
) -> None:
    """Until the pillar: behind it they settle by geometry, whatever the model says."""
    before = film.detections[:, 0] < walking.PACES
    first, second = identities(tracked[tracker][before], film.people[before])
    assert len(first) == len(second) == 1
    assert first != second


def examples() -> dict[str, str]:
    """The document's code, by the heading above it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return dict(
        re.findall(
            r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE
        )
    )


def test_the_documents_boxmot(peer_tools: Path, folder: Path, film: walking.Film) -> None:
    (folder / "boxmot_example.py").write_text(examples()["BoxMOT"], encoding="utf-8")
    assert peers.run(peer_tools, folder / "boxmot_example.py", cwd=folder).endswith("[0 1]\n")


def test_the_documents_reid(peer_tools: Path, folder: Path, film: walking.Film, model: ImageEmbedder) -> None:
    """All weights find their places, which it would warn of otherwise, and embeddings are DMX's."""
    code = "import warnings\nwarnings.simplefilter('error', UserWarning)\n" + examples()["Roboflow's reid"]
    more = "np.save('of_boxes.npy', embeddings)\n"
    more += "np.save('of_files.npy', encoder.extract_embeddings_from_paths(['large.png']))\n"
    (folder / "reid_example.py").write_text(code + more, encoding="utf-8")
    large = Image.fromarray(film.crops()[0]).resize((70, 150), Image.Resampling.BICUBIC)
    large.save(folder / "large.png")
    assert peers.run(peer_tools, folder / "reid_example.py", cwd=folder).endswith("(2, 64)\n")
    np.testing.assert_allclose(np.load(folder / "of_boxes.npy"), model.embed(film.crops()[:2]), atol=1e-4)
    # Two ways of resizing, at most a level of 255 apart.
    similarity = np.load(folder / "of_files.npy") @ model.embed(large).T
    assert similarity.item() > 0.999
