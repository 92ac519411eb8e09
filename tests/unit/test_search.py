"""The parts of a search: indexes in memory and in folders, rankings, thumbnails, the page."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from dmx.data.dataset import RawSplit
from dmx.data.layouts import Found, Unreadable
from dmx.data.layouts.base import BytesRef
from dmx.errors import DmxError
from dmx.names import printable
from dmx.search.encoder import ModelRecord
from dmx.search.gallery import Part
from dmx.search.images import JoinedSplits, Origin, Reading
from dmx.search.index import SCHEMA, Index, build, into_lists, measured, search_lists, with_probes
from dmx.search.page import write_page
from dmx.search.pictures import Pictures, thumbnail
from dmx.search.queries import Queries
from dmx.search.ranking import rank, table, told
from dmx.search.stored import StoredIndex, write_index

WIDTH = 16


class Encoder:
    """What an index needs to know of a model, when features are there already."""

    record = ModelRecord("runs/first", "0" * 64, WIDTH, 32, 16, False)


class Rows:
    """A gallery whose embeddings are given, in uneven parts."""

    path, fingerprint, origin = "features", "f" * 64, None

    def __init__(self, features: NDArray[np.float32], identities: NDArray[np.int64] | None = None) -> None:
        self.left_out = [Unreadable("broken.jpg", "not an image")]
        self._features = features
        self._identities = np.arange(len(features)) if identities is None else identities

    def require(self, encoder: object) -> None:
        return None

    def parts(self, encoder: object) -> Iterator[Part]:
        for some in np.split(
            np.arange(len(self._features)), [len(self._features) // 3, len(self._features) // 2]
        ):
            cameras = np.full(len(some), -1, np.int32)
            keys = [f"g/{row}.jpg" for row in some]
            yield Part(10 + some, keys, self._identities[some], cameras, self._features[some])


def people(n: int, seed: int = 0) -> NDArray[np.float32]:
    """Unit rows in groups, as people are."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(-(-n // 10), 1, WIDTH)) + 0.6 * rng.normal(size=(-(-n // 10), 10, WIDTH))
    x = x.reshape(-1, WIDTH)[:n]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def index_of(features: NDArray[np.float32], kind: Any = "flat", probes: int | None = None) -> Index:
    encoder: Any = Encoder()
    return build(Rows(features), encoder, kind, probes, 10)


def queries_of(count: int, keys: list[str] | None = None, of_gallery: bool = False) -> Queries:
    keys = [f"q/{row}.jpg" for row in range(count)] if keys is None else keys
    split = RawSplit(
        "q", "query", [Found("query", key, row, -1, BytesRef(b"")) for row, key in enumerate(keys)]
    )
    return Queries(split, np.full(count, of_gallery), np.full(count, True))


def test_an_exact_index_finds_what_all_products_tell() -> None:
    gallery, query = people(500), people(37, 1)
    rows, similarities = index_of(gallery).search(query, 7)
    products = query.astype(np.float64) @ gallery.T.astype(np.float64)
    np.testing.assert_array_equal(rows, np.argsort(-products, axis=1, kind="stable")[:, :7])
    # Sums of 16 products in float32.
    np.testing.assert_allclose(similarities, np.take_along_axis(products, rows, 1), atol=WIDTH * 2.0**-23)


def test_equal_images_stand_in_the_gallerys_order() -> None:
    gallery = np.tile(people(4), (5, 1))
    rows, _ = index_of(gallery).search(gallery[:4], 5)
    np.testing.assert_array_equal(rows, np.arange(4)[:, None] + 4 * np.arange(5))


def test_a_small_gallery_gives_as_many_hits_as_it_has() -> None:
    rows, similarities = index_of(people(3)).search(people(2, 1), 10)
    assert rows.shape == similarities.shape == (2, 3)
    for kind in ("flat", "ivf"):
        assert len(index_of(people(1), kind).search(people(1), 4)[0][0]) == 1


def test_the_recall_is_the_share_of_exact_neighbours() -> None:
    flat = index_of(people(3000)).vectors
    lists = into_lists(flat, 60)
    low, all_ = measured(lists, 2, 10), measured(lists, 60, 10)
    assert all_.recall == 1.0
    assert low.sampled == 1000
    chosen = np.sort(np.random.default_rng(0).choice(3000, 1000, replace=False))
    queries = flat.reconstruct_batch(chosen)
    (_, exact), (_, some) = flat.search(queries, 11), search_lists(lists, queries, 11, 2)
    shared = sum(len((set(a) & set(b)) - {c}) for a, b, c in zip(exact, some, chosen, strict=True))
    assert low.recall == pytest.approx(shared / 10_000)
    assert 0.1 < low.recall < 0.98
    text, is_low = low.told()
    assert is_low
    assert text.startswith(f"2 of 60 lists are searched; recall {low.recall:.4f} of the 10 nearest others")
    assert "below 0.98" in text
    assert not all_.told()[1]


def test_short_lists_are_topped_up() -> None:
    gallery = people(1000)
    lists = into_lists(index_of(gallery).vectors, 100)
    sizes = [lists.invlists.list_size(number) for number in range(100)]
    assert min(sizes) < 30
    similarities, rows = search_lists(lists, people(50, 1), 60, 1)
    assert (rows >= 0).all()
    assert (np.diff(similarities, axis=1) <= 0).all()


def test_more_probes_are_measured_anew() -> None:
    index = index_of(people(3000), "ivf", 1)
    assert index.lists is not None
    assert index.lists.probes == 1
    more = with_probes(index, 1000, 5).lists
    assert more is not None
    assert (more.probes, more.recall, more.neighbours) == (more.lists, 1.0, 5)
    assert with_probes(index, 1, 5) is index


def test_what_cannot_be_decoded_at_all_is_an_error() -> None:
    with pytest.raises(DmxError, match="features: wanted images to search, found 1, none of which"):
        index_of(people(0))


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_stored_index_is_the_same(kind: str, tmp_path: Path) -> None:
    index = index_of(people(2000), kind, 3)
    write_index(index, tmp_path / "deep/down/index")
    again = StoredIndex(tmp_path / "deep/down/index").read()
    assert again.rows.equals(index.rows)
    assert again.rows.schema == SCHEMA
    assert again.rows["row"].to_pylist() == list(range(10, 2010))
    assert (again.model, again.lists, again.kind, again.origin) == (index.model, index.lists, kind, None)
    assert again.left_out == (Unreadable("broken.jpg", "not an image"),)
    query = people(20, 1)
    for before, after in zip(index.search(query, 9), again.search(query, 9), strict=True):
        np.testing.assert_array_equal(before, after)
    assert [path.name for path in (tmp_path / "deep/down").iterdir()] == ["index"]


def test_what_a_killed_command_left_of_an_index_makes_way(tmp_path: Path) -> None:
    left = tmp_path / ".index-tmp-8c1f"
    left.mkdir()
    (left / "index.faiss").write_bytes(b"half of it")
    write_index(index_of(people(30)), tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    index = index_of(people(30))
    (tmp_path / "index").mkdir()
    write_index(index, tmp_path / "index")  # an empty folder is as good as none
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    with pytest.raises(DmxError, match=r"found something else in .*other"):
        write_index(index, tmp_path / "other")
    with pytest.raises(DmxError, match=r"found something else in .*index"):
        write_index(index, tmp_path / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "other"], "nothing half done is left"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.faiss", None, "index.faiss: wanted .* bytes, found no such file"),
        ("index.faiss", b"cut", "index.faiss: wanted .* bytes, found 3 bytes"),
        ("rows.parquet", b"", "rows.parquet: wanted .* bytes, found 0 bytes"),
        ("index.json", b"{", "index.json: wanted the manifest of an index, found JSONDecodeError"),
        ("index.json", b"[]", "index.json: wanted the manifest of an index, found TypeError"),
        ("index.json", b'{"format": 99}', "index.json: .*format 99, not 1"),
        ("index.json", b'{"format": 1}', "index.json: wanted the manifest of an index, found KeyError"),
    ],
)
def test_a_broken_index_is_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    write_index(index_of(people(30)), folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(DmxError, match=message):
        StoredIndex(folder)


@pytest.mark.parametrize("name", ["index.faiss", "rows.parquet"])
def test_a_spoiled_file_of_the_right_size_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    write_index(index_of(people(30)), folder)
    (folder / name).write_bytes(b"x" * (folder / name).stat().st_size)
    with pytest.raises(DmxError, match=f"{name}: wanted"):
        StoredIndex(folder).read()


def test_rows_of_another_index_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    write_index(index_of(people(30)), folder)
    pq.write_table(index_of(people(20)).rows, folder / "rows.parquet")
    manifest = json.loads((folder / "index.json").read_text())
    manifest["bytes"]["rows.parquet"] = (folder / "rows.parquet").stat().st_size
    (folder / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(DmxError, match=r"rows\.parquet: wanted 30 rows of .*, found 20"):
        StoredIndex(folder).read()


def test_a_query_of_the_gallery_is_left_out_and_all_hits_are_there() -> None:
    gallery = people(40)
    index = index_of(gallery)
    queries = queries_of(6, [f"g/{row}.jpg" for row in range(6)], of_gallery=True)
    for answer in rank(index, queries, gallery[:6], 5):
        assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4, 5]
        assert answer.key not in [hit.key for hit in answer.hits]
        assert all(hit.right is False for hit in answer.hits)
    strangers = queries_of(6, [f"g/{row}.jpg" for row in range(6)])
    for row, answer in enumerate(rank(index, strangers, gallery[:6], 5)):
        first = answer.hits[0]
        assert (first.key, first.row, first.right) == (answer.key, 10 + row, True)


def test_more_queries_than_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    index, query = index_of(people(50)), people(23, 1)
    whole = list(rank(index, queries_of(23), query, 4))
    monkeypatch.setattr("dmx.search.ranking.QUERIES", 10)
    assert [a.hits for a in rank(index, queries_of(23), query, 4)] == [a.hits for a in whole]
    assert [a.row for a in whole] == list(range(23))


def test_file_names_do_not_steer_a_terminal() -> None:
    assert printable("a\x1b[2Jb\n\udcffé") == "a\\x1b[2Jb\\n\\udcffé"
    (answer,) = rank(index_of(people(3)), queries_of(1, ["\x1b[31m.jpg"]), people(1), 2)
    assert "\x1b" not in table(answer)
    assert told([answer]) == "1 query; the first hit is right for 1 of 1 whose identity is known"


def jpeg(height: int, width: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [
        (128, 64, (128, 64)),
        (64, 32, (64, 32)),
        (512, 256, (128, 64)),
        (100, 1000, (16, 160)),
        (900, 1, (128, 1)),
    ],
)
def test_thumbnails_keep_proportions(height: int, width: int, shown: tuple[int, int]) -> None:
    small = Image.open(io.BytesIO(thumbnail(jpeg(height, width))))
    assert (small.height, small.width) == shown


def test_thumbnails_hold_pixels_alone() -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at the back door"
    encoded = jpeg(64, 32, exif=exif)
    assert b"back door" in encoded
    assert b"back door" not in thumbnail(encoded)


def test_a_picture_that_is_gone_is_told_once_and_left_out() -> None:
    index, query = index_of(people(5)), people(2, 1)
    split = RawSplit("q", "query", [Found("query", f"{row}", -1, -1, BytesRef(b"gone")) for row in range(2)])
    said: list[str] = []
    pictures = Pictures(split, said.append)
    file = io.StringIO()
    write_page(file, "t", [], rank(index, queries_of(2), query, 3), pictures, Pictures(None, said.append))
    assert file.getvalue().count("no picture") == 2 * 4
    assert "<img" not in file.getvalue()
    assert len(said) == 1


def test_names_are_text_on_the_page() -> None:
    name = "</span><script>alert(1)</script>\"'&.jpg"
    file = io.StringIO()
    answers = rank(index_of(people(5)), queries_of(1, [name]), people(1, 1), 3)
    write_page(file, name, [name], answers, None, None)
    page = file.getvalue()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
    assert "default-src 'none'" in page


def test_splits_are_joined_in_order() -> None:
    def split(name: str, count: int) -> RawSplit:
        found = [
            Found(name, f"{name}/{row}", row, 7, BytesRef(f"{name}{row}".encode())) for row in range(count)
        ]
        return RawSplit("s", name, found)

    joined = JoinedSplits("both", [split("a", 3), split("b", 2)])
    assert len(joined) == 5
    assert joined.keys == ["a/0", "a/1", "a/2", "b/0", "b/1"]
    assert joined.identities.tolist() == [0, 1, 2, 0, 1]
    assert [joined.image_bytes(row) for row in range(5)] == [b"a0", b"a1", b"a2", b"b0", b"b1"]
    for row in (-1, 5):
        with pytest.raises(DmxError, match=f"both: wanted row {row}, found 5 rows"):
            joined.image_bytes(row)


def test_an_origin_survives_json() -> None:
    origin = Origin("data", ("query", "gallery"), ("1", "2"), "s", Reading("folder", "scene", r"_c(\d+)"))
    assert Origin.from_tree(json.loads(json.dumps(asdict(origin)))) == origin
