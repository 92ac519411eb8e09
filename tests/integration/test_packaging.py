"""What is released: a wheel and an sdist of the tracked files, installed where the repository is not."""

from __future__ import annotations

import email.parser
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.metadata import Metadata

import dmx
from dmx.cli import COMMANDS
from dmx.config import recipe_names

ROOT = Path(__file__).parents[2]


def tracked() -> list[str]:
    """Files of the repository, new ones too, but none that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without anything that a build left behind."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def built(clone: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it. The environment has what building needs."""
    run = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(run, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (clone / "dist").glob("*.tar.gz")
    (wheel,) = (clone / "dist").glob("*.whl")
    return sdist, wheel


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that has the wheel, and borrows from this one what DMX depends on."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # .pth files in the folders that this one names, such as an editable install's of DMX, are not read.
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    python = folder / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, "--ignore-installed", str(built[1])], check=True)
    return python


def outside(python: Path, folder: Path, *arguments: str) -> str:
    """What a command of the environment prints, away from the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python.parent / arguments[0]), *arguments[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    found = names_in(built[1])
    info = f"dmx-{dmx.__version__}.dist-info"
    assert {name.split("/")[0] for name in found} == {"dmx", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= found
    # `kernels` and `cluster` lie elsewhere in the repository.
    wanted = {re.sub(r"^(kernels|cluster)/", r"dmx/\1/", name) for name in tracked() if in_package(name)}
    assert {name for name in found if name.startswith("dmx/")} == wanted
    assert "dmx/py.typed" in found
    assert {f"dmx/recipes/{name}.yaml" for name in recipe_names()} <= found


def in_package(name: str) -> bool:
    return name.split("/")[0] in ("dmx", "kernels", "cluster")


def test_the_sdist_holds_what_the_wheel_is_made_of(built: tuple[Path, Path], clone: Path) -> None:
    """The wheel from it, and one from the repository, are of the same files."""
    with tarfile.open(built[0]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= inside
    assert {name for name in tracked() if in_package(name)} <= inside
    direct = clone / "direct"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(direct), "."]
    subprocess.run(build, cwd=clone, capture_output=True, check=True)
    (wheel,) = direct.glob("*.whl")
    assert names_in(wheel) == names_in(built[1])


def test_metadata_is_what_an_index_takes(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        raw = archive.read(f"dmx-{dmx.__version__}.dist-info/METADATA")
    metadata = Metadata.from_email(raw, validate=True)
    assert metadata.name == "dmx"
    assert str(metadata.version) == dmx.__version__
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description is not None
    assert metadata.description.startswith("# DMX")
    assert {"cpu", "gpu", "synth", "export", "search", "lmdb", "docs", "dev"} <= set(
        metadata.provides_extra or []
    )
    assert email.parser.BytesHeaderParser().parsebytes(raw).get_all("License-File") == ["LICENSE"]


def test_an_installed_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    assert outside(installed, tmp_path, "dmx", "--version") == f"dmx {dmx.__version__}\n"
    shown = outside(installed, tmp_path, "dmx", "--help")
    assert all(f" {name} " in shown for name in COMMANDS)
    rendered = outside(
        installed, tmp_path, "dmx", "synth", "people", "--identities", "1", "--images", "2", "--height", "64"
    )
    assert rendered.startswith("people: 2 images of 1 people")
    code = (
        "import importlib, pkgutil, dmx, dmx.config, dmx.search.page\n"
        "print(dmx.__file__)\n"
        "for module in pkgutil.walk_packages(dmx.__path__, 'dmx.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "assert dmx.config.recipe('demo')[1]['schedule']['epochs']\n"
    )
    where = Path(outside(installed, tmp_path, "python", "-c", code).strip())
    assert where.is_relative_to(installed.parents[1])


def test_an_installed_wheel_tells_its_types(installed: Path, tmp_path: Path) -> None:
    """A user's code is checked strictly against it, and a wrong call is found."""
    (tmp_path / "user.py").write_text(
        "import numpy as np\n"
        "from numpy.typing import NDArray\n\n"
        "import dmx\n\n\n"
        "def similarity(run: str, image: bytes, other: bytes) -> float:\n"
        "    rows: NDArray[np.float32] = dmx.load(run).embed([image, other])\n"
        "    return float(rows[0] @ rows[1])\n\n\n"
        "dmx.load(3)\n",
        encoding="utf-8",
    )
    # What DMX's own types do not need is not read: torch alone would take a minute.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n"
        "[mypy-torch.*,timm.*,pyarrow.*,numba.*,scipy.*,triton.*,ray.*,yaml.*,simplejpeg.*]\n"
        "follow_imports = skip\nignore_missing_imports = true\n",
        encoding="utf-8",
    )
    check = [sys.executable, "-m", "mypy", "--python-executable", str(installed), "user.py"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert errors[0].startswith("user.py:12: error: Argument 1 to")


def test_the_citation_is_as_the_format_wants_it(tmp_path: Path) -> None:
    """The Citation File Format's own schema, which the package cffconvert carries."""
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--dest",
        str(tmp_path),
        "cffconvert==2.0.0",
    ]
    done = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no package index, from which the schema would be taken: {done.stderr.strip()[-200:]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("schemas/1.2.0/schema.json")]
        schema = json.loads(archive.read(name))
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    validator = jsonschema.Draft7Validator(schema)
    assert [error.message for error in validator.iter_errors(cited)] == []
    assert list(validator.iter_errors({**cited, "cff-version": "9"}))
