"""What comes from outside and lies: readers say so with a DmxError, or list it, and run nothing of it.

Files are damaged at random (hypothesis), as disks, networks and people with bad intentions damage them.
"""

from __future__ import annotations

import gzip
import importlib.resources
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dmx.config import from_tree, recipe
from dmx.data.dataset import open_dataset
from dmx.data.images import broken_reason
from dmx.data.ingest import ingest
from dmx.data.layouts import LAYOUTS, base
from dmx.data.layouts.luperson import load_keys
from dmx.errors import DmxError
from dmx.extraction.plan import Output, Part, Settings
from dmx.features import Features

often = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# A few cuts, changes and insertions, at places that are shares of the whole.
damages = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "end"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"]),
    ),
    min_size=1,
    max_size=6,
)


def _damaged(content: bytes, damage: list[tuple[str, float, bytes]]) -> bytes:
    changed = bytearray(content)
    for kind, share, new in damage:
        at = int(share * len(changed))
        if kind == "set":
            changed[at : at + len(new)] = new
        elif kind == "cut":
            del changed[at : at + len(new)]
        elif kind == "insert":
            changed[at:at] = new
        else:
            del changed[at:]
    return bytes(changed)


def _encoded(form: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


IMAGES = {
    **{form: _encoded(form) for form in ("JPEG", "PNG", "BMP", "WEBP", "TIFF")},
    "progressive": _encoded("JPEG", progressive=True),
}


@often
@given(form=st.sampled_from(sorted(IMAGES)), damage=damages)
def test_images(form: str, damage: list[tuple[str, float, bytes]]) -> None:
    """There is a reason, or none; never anything else."""
    reason = broken_reason(_damaged(IMAGES[form], damage))
    assert reason is None or reason


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tiny.write_set(folder, 1, {"train": 2})
    return folder


def _read_all(folder: Path) -> None:
    split = open_dataset(folder).split("train")
    assert len(split.identities) == len(split.cameras) == len(split.keys) == len(split)
    assert all(isinstance(split.image_bytes(row), bytes) for row in range(len(split)))


@often
@given(damage=damages)
def test_shards(shards: Path, tmp_path: Path, damage: list[tuple[str, float, bytes]]) -> None:
    """Of the right size, or its damage would be noticed at once."""
    whole = next(shards.glob("*.arrow"))
    content = whole.read_bytes()
    changed = _damaged(content, damage)[: len(content)].ljust(len(content), b"\0")
    shutil.copytree(shards, tmp_path / "set", dirs_exist_ok=True)
    (tmp_path / "set" / whole.name).write_bytes(changed)
    _read_or_refuse(lambda: _read_all(tmp_path / "set"))


def test_a_shard_with_offsets_outside_of_it_is_refused(shards: Path, tmp_path: Path) -> None:
    """Arrow would read wherever they point, and the process would end without a word."""
    whole = next(shards.glob("*.arrow"))
    content = bytearray(whole.read_bytes())
    split = open_dataset(shards).split("train")
    lengths = np.cumsum([0, *(len(split.keys[row].encode()) for row in range(len(split)))], dtype=np.int32)
    at = bytes(content).index(lengths.tobytes())
    content[at + 4 : at + 8] = np.int32(2**30).tobytes()
    shutil.copytree(shards, tmp_path / "set")
    (tmp_path / "set" / whole.name).write_bytes(content)
    code = (
        "import sys; from dmx.data.dataset import open_dataset; open_dataset(sys.argv[1]).split('train').keys"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.returncode
    assert f"{whole.name}: split train: wanted an Arrow IPC file, found" in done.stderr


JUNK = st.sampled_from(
    [None, -1, 1e300, float("nan"), 2**70, True, "x", "", ".", "../manifest.json", "/etc/passwd", [], {}, [1]]
)


@often
@given(data=st.data())
def test_manifests(shards: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any value in any place, also a shard's file that lies elsewhere."""
    manifest = json.loads((shards / "manifest.json").read_text())
    place = manifest
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JUNK)
    shutil.copytree(shards, tmp_path / "set", dirs_exist_ok=True)
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    _read_or_refuse(lambda: _read_all(tmp_path / "set"))


def test_a_manifest_does_not_lead_elsewhere(shards: Path, tmp_path: Path) -> None:
    """Shards lie beside it."""
    shutil.copytree(shards, tmp_path / "set")
    manifest = json.loads((shards / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    shard["file"] = f"../../{shards.name}/{shard['file']}"
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DmxError, match=r"manifest\.json: field file '\.\./\.\./.* not beside the manifest"):
        open_dataset(tmp_path / "set")


@pytest.fixture(scope="module")
def parquet() -> bytes:
    values = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 8)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"row": range(40), "embedding": lists}), buffer, row_group_size=16)
    return buffer.getvalue()


@often
@given(damage=damages)
def test_features(parquet: bytes, tmp_path: Path, damage: list[tuple[str, float, bytes]]) -> None:
    file = tmp_path / "features.parquet"
    file.write_bytes(_damaged(parquet, damage))
    _read_or_refuse(lambda: list(Features(file).blocks(16)))


@often
@given(damage=damages)
def test_recipes(tmp_path: Path, damage: list[tuple[str, float, bytes]]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(_damaged((importlib.resources.files("dmx.recipes") / "demo.yaml").read_bytes(), damage))
    _read_or_refuse(lambda: from_tree(recipe(str(file))))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2000,
        "{a: " * 2000,
        "data: &x\n  source: *x\n",
        "1: 2\n",
        "? [1, 2]\n: 3\n",
        "schedule: {epochs: 2001-01-01}\n",
        "seed: !!binary aGVsbG8=\n",
        "timeout_s: .nan\n",
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
    ],
    ids=["lists", "mappings", "of itself", "number", "list", "date", "bytes", "nan", "billion laughs"],
)
def test_recipes_that_are_traps(tmp_path: Path, text: str) -> None:
    """Nested without end, of themselves, of types that no setting has, and a billion of one word."""
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(DmxError) as caught:
        from_tree(recipe(str(tmp_path / "recipe.yaml")))
    assert len(str(caught.value)) < 2000


def test_recipes_run_nothing(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f'!!python/object/apply:os.mkdir ["{tmp_path / "made"}"]\n')
    with pytest.raises(DmxError, match="could not determine a constructor"):
        from_tree(recipe(str(file)))
    assert not (tmp_path / "made").exists()


def _read_or_refuse(read: Callable[[], object]) -> None:
    refused = ""
    try:
        read()
    except DmxError as error:
        refused = str(error)
    assert len(refused) < 4000


BOMB_BYTES = 1 << 29


def _zip_bomb(path: Path, says: int | None = None) -> None:
    """Half a gigabyte of zeros in half a megabyte, of which the archive says how many they are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("0001_c1.jpg", "w", force_zip64=True) as member:
            for _ in range(BOMB_BYTES >> 24):
                member.write(bytes(1 << 24))
        archive.writestr("0002_c1.jpg", IMAGES["JPEG"])
        if says is not None:
            archive.infolist()[0].file_size = says


def _tar_bomb(path: Path) -> None:
    header = tarfile.TarInfo("0001_c1.jpg")
    header.size = BOMB_BYTES
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf())
        for _ in range(BOMB_BYTES >> 24):
            file.write(bytes(1 << 24))
        small = tarfile.TarInfo("0002_c1.jpg")
        small.size = len(IMAGES["JPEG"])
        file.write(small.tobuf() + IMAGES["JPEG"].ljust(-(-small.size // 512) * 512, b"\0") + bytes(1024))


@pytest.mark.parametrize("kind", ["zip", "zip that lies", "tar"])
def test_archives_that_grow_without_end(tmp_path: Path, kind: str) -> None:
    """The member is listed as unreadable, the others are read, and memory does not grow."""
    archive = tmp_path / ("crops.tar.gz" if kind == "tar" else "crops.zip")
    if kind == "tar":
        _tar_bomb(archive)
    else:
        _zip_bomb(archive, says=1000 if kind == "zip that lies" else None)
    code = (
        "import sys, resource, zipfile\n"
        "from pathlib import Path\n"
        "from dmx.data.layouts import archives, base\n"
        "path = Path(sys.argv[1])\n"
        "if path.suffix == '.zip':\n"
        "    found = [archives.zip_image_ref(path, info) for info in zipfile.ZipFile(path).infolist()]\n"
        "else:\n"
        "    found = [getattr(m, 'image', m) for m in archives.tar_images(path, 'k', base.Options())]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for each in found:\n"
        "    try:\n"
        "        print(each.reason if isinstance(each, base.Unreadable) else len(each.read()))\n"
        "    except OSError as error:\n"
        "        print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(archive)], capture_output=True, text=True, check=True
    )
    first, second, grown_kib = done.stdout.splitlines()
    lies = "broken member of the archive: wrong checksum"
    assert first == (
        lies
        if kind == "zip that lies"
        else f"member of {BOMB_BYTES} bytes of the archive, at most {base.MAX_ENCODED_BYTES} are read"
    )
    assert second == str(len(IMAGES["JPEG"]))
    assert int(grown_kib) < 100_000


def _bomb(kind: str) -> bytes:
    """Pickles of a few bytes that ask for all memory, or for ever, before anything is named."""
    if kind == "memo":  # a place in a list of two billion
        return b"\x80\x02X\x01\x00\x00\x00ar\xff\xff\xff\x7f]."
    if kind == "length":  # a text of 2^62 bytes
        return b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a."
    if kind == "hash":  # a set of a tuple of the same two tuples, a hundred deep
        return b"\x80\x04\x8f(" + b"K\x01" + b"2\x86" * 100 + b"\x90."
    if kind == "repr":  # a list of the same two lists, a hundred deep
        return b"\x80\x04]" + b"]2\x86" + b"2\x86" * 100 + b"a."
    return b"\x80\x04" + b"(" * 100_000 + b"."


@pytest.mark.parametrize("kind", ["memo", "length", "hash", "repr", "marks"])
def test_pickles_that_take_everything(tmp_path: Path, kind: str) -> None:
    """Refused at once, in little memory."""
    (tmp_path / "keys.pkl").write_bytes(_bomb(kind))
    code = (
        "import sys, resource; from pathlib import Path\n"
        "from dmx.data.layouts.luperson import load_keys; from dmx.errors import DmxError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    print(len(load_keys(Path(sys.argv[1]))))\n"
        "except DmxError as error:\n    print('refused' if len(str(error)) < 2000 else 'told at length')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    limited = ["prlimit", "--as=8000000000", sys.executable, "-c", code, str(tmp_path / "keys.pkl")]
    done = subprocess.run(limited, capture_output=True, text=True, check=True, timeout=60)
    told, grown_kib = done.stdout.splitlines()
    assert told == ("0" if kind == "memo" else "refused")
    assert int(grown_kib) < 100_000


def test_keys_that_are_no_text_stay_what_they_are(tmp_path: Path) -> None:
    """One such key was the end of all of them."""
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps([b"plain", b"caf\xe9"]))
    assert load_keys(tmp_path / "keys.pkl") == ["plain", "caf\udce9"]


def test_a_broken_zip_is_named(tmp_path: Path) -> None:
    """What is said to be in it is not there."""
    _zip_bomb(tmp_path / "crops.zip", says=1000)
    content = bytearray((tmp_path / "crops.zip").read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at : at + 4] = b"XXXX"
    (tmp_path / "crops.zip").write_bytes(content)
    with pytest.raises(DmxError, match=r"crops\.zip: wanted a zip archive, found one that is broken"):
        list(LAYOUTS["crops"].read(tmp_path / "crops.zip", base.Options()))


@pytest.mark.parametrize("value", [1e300, -1e39])
def test_features_that_float32_cannot_hold_are_named(tmp_path: Path, value: float) -> None:
    """Finite as they are given, infinite as they are read."""
    pq.write_table(pa.table({"embedding": [[1.0, 2.0], [value, 0.0]]}), tmp_path / "f.parquet")
    with pytest.raises(DmxError, match=r"row 1: wanted 2 finite float32 numbers, found .*e\+\d+ at place 0"):
        Features(tmp_path / "f.parquet").read_rows(0, 2)


def test_all_images_broken_is_an_error(tmp_path: Path) -> None:
    """Of a data set that is ingested; one broken image is a line in skipped.jsonl."""
    for number in range(5):
        (tmp_path / "crops").mkdir(exist_ok=True)
        (tmp_path / "crops" / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(DmxError, match="found none that can be read"):
        ingest(tmp_path / "crops", tmp_path / "set", layout="crops")
    assert not (tmp_path / "set").exists()
    (tmp_path / "crops" / "good.jpg").write_bytes(IMAGES["JPEG"])
    assert ingest(tmp_path / "crops", tmp_path / "set", layout="crops").skipped == 5


def test_features_of_no_image_are_an_error(tmp_path: Path) -> None:
    """`dmx embed` of images that are all broken has nothing to give, and is not finished."""
    output, parts = Output(str(tmp_path)), [Part(0, 0, 2)]
    settings = Settings(
        model="m", weights_sha256="w", dataset="d", data_sha256="s", split="train", rows=2, parts=1, width=2,
        image_height=4, image_width=2, precision="fp32", flip=False,
    )  # fmt: skip
    assert not output.begin(settings, {}, 8)
    lines = [{"row": row, "key": f"{row}.jpg", "reason": "empty"} for row in range(2)]
    (tmp_path / parts[0].skipped_name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DmxError, match=r"found none among 2, the first is 0\.jpg \(empty\)"):
        output.finish(parts)
    assert not output.begin(settings, {}, 8)
