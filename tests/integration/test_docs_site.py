"""The site is built without a warning, hangs together, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dmx.cli import COMMANDS
from dmx.config import leaves, recipe_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; a warning fails."""
    out = tmp_path_factory.mktemp("site") / "html"
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-b", "html"]
    doctrees = ["-d", str(out.parent / "doctrees")]
    done = subprocess.run(
        [*build, *doctrees, str(ROOT / "docs"), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def links() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_links", ROOT / "docs" / "links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_link_leads_somewhere(site: Path, links: ModuleType) -> None:
    found = links.read(site)
    assert len(found) >= 20
    assert list(links.broken(found)) == []
    assert all(re.match(r"https://|mailto:", link) for link in links.elsewhere(found))


def test_every_page_can_be_reached(site: Path, links: ModuleType) -> None:
    found = links.read(site)
    seen, todo = set(), [(site / "index.html").resolve()]
    while todo:
        path = todo.pop()
        if path in seen or path not in found:
            continue
        seen.add(path)
        todo += [(path.parent / link.split("#")[0]).resolve() for link in found[path].leads if link[0] != "#"]
    written = {
        (site / page.relative_to(ROOT / "docs")).with_suffix(".html").resolve()
        for page in (ROOT / "docs").rglob("*.md")
    }
    assert written <= seen


def test_broken_links_and_foreign_scripts_are_found(tmp_path: Path, links: ModuleType) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here"></a><a href="#gone"></a><a href="b.html"></a>'
        '<a href="https://example.org"></a><script src="https://example.org/x.js"></script>',
        encoding="utf-8",
    )
    wrong = list(links.broken(links.read(tmp_path)))
    assert len(wrong) == 3
    assert [word for text in wrong for word in ("x.js", "#gone", "b.html") if word in text] == [
        "x.js",
        "#gone",
        "b.html",
    ]


def test_nothing_is_loaded_by_a_style_sheet(site: Path) -> None:
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", text), sheet


def test_the_reference_has_all_settings_recipes_and_commands(site: Path) -> None:
    text = {name: (site / "reference" / f"{name}.html").read_text(encoding="utf-8") for name in (
        "settings", "recipes", "commands", "kernels",
    )}  # fmt: skip
    for name in leaves():
        assert f">{name.rpartition('.')[2]}<" in text["settings"], name
    for name in recipe_names():
        assert f'id="{name}"' in text["recipes"], name
    for name in COMMANDS:
        assert f'id="dmx-{name}"' in text["commands"], name
    assert "self_knn" in text["kernels"]
