"""The pages of docs/ do as they say: every block is run or checked, and prints what the page shows."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pages
import pytest

from dmx.cli import build_parser
from dmx.cores import cores

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial.md"
WITH_BLOCKS = [path for path in sorted(DOCS.rglob("*.md")) if pages.blocks_of(path)]
OTHERS = [path for path in WITH_BLOCKS if path != TUTORIAL and any(b.is_run for b in pages.blocks_of(path))]
TEN_MINUTES_S = 600
# Programs in front of a `dmx` command that is to be checked.
STARTERS = {"launch/hosts.sh", "sbatch", "srun"}


def named(path: Path) -> str:
    return str(path.relative_to(DOCS))


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str], float]:
    """The folder in which the tutorial was run, what it printed, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("tutorial")
    begin = time.monotonic()
    printed = pages.run_page(TUTORIAL, folder)
    return folder, printed, time.monotonic() - begin


def require_outputs(page: Path, printed: dict[int, str]) -> None:
    for block, said in pages.differences(page, printed):
        pytest.fail(
            f"{named(page)}:{block.line} shows\n{block.text}\nand this was printed:\n{said}\n"
            "run python tests/pages.py docs/tutorial.md and this page, which writes it there"
        )


@pytest.mark.timeout(1800)
def test_the_tutorial_takes_ten_minutes(tutorial: tuple[Path, dict[int, str], float]) -> None:
    folder, printed, seconds = tutorial
    require_outputs(TUTORIAL, printed)
    busy = max(1.0, os.getloadavg()[1] / cores())  # others on this machine take their share
    assert seconds < TEN_MINUTES_S * busy
    assert (folder / "ranking.html").stat().st_size > 100_000
    assert (folder / "styles.jpg").exists()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", OTHERS, ids=named)
def test_a_page_runs_behind_the_tutorial(
    page: Path, tutorial: tuple[Path, dict[int, str], float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tutorial[0], folder, symlinks=True)
    require_outputs(page, pages.run_page(page, folder))


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=named)
def test_blocks_that_are_not_run_could_be(page: Path) -> None:
    """Shell that bash can read, with options that its commands have; Python that compiles; and a reason."""
    for block in pages.blocks_of(page):
        if block.reason is None:
            continue
        where = f"{named(page)}:{block.line}"
        assert len(block.reason) > 8, f"{where}: say why"
        if block.language == "python":
            ast.parse(block.text)
            continue
        checked = subprocess.run(
            ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, f"{where}: {checked.stderr}"
        for command in pages.commands_of(block):
            require_options(command, where)


def require_options(command: str, where: str) -> None:
    """Scripts of the repository are there, and so are the options of `dmx`, also within a quoted command."""
    words = shlex.split(command)
    for word in words:
        if word.startswith("launch/"):
            assert (ROOT / word).exists(), f"{where}: {word}"
            assert word.endswith((".sbatch", ".yaml")) or os.access(ROOT / word, os.X_OK), f"{where}: {word}"
        if word.startswith("dmx "):
            require_options(word, where)
    if "dmx" in words and (words[0] == "dmx" or words[0] in STARTERS):
        try:
            build_parser().parse_args(words[words.index("dmx") + 1 :])
        except SystemExit:
            pytest.fail(f"{where}: {command}: not as the parser wants it")


def test_a_wrong_option_is_found() -> None:
    with pytest.raises(pytest.fail.Exception):
        require_options("launch/hosts.sh a -- dmx embed runs/first data/x --outt y", "here")
    with pytest.raises(pytest.fail.Exception):
        require_options('sbatch --wrap "dmx train --run x --worker 4x"', "here")


def test_outputs_are_compared() -> None:
    def block(mark: str, text: str) -> pages.Block:
        return pages.Block(1, "text", mark, text, (0, 0))

    assert pages.agrees(block("output", "a 1\n...\nc\n"), "a 1\nb\nb\nc\n")
    assert not pages.agrees(block("output", "a 1\n"), "a 2\n")
    assert pages.agrees(block("output figures", "mAP  9.5%\n"), "mAP 10.5%\n")
    assert not pages.agrees(block("output figures", "mAP 9.5%\n"), "rank 9.5%\n")


def test_a_failing_block_is_told(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```sh\ndmx evaluate nowhere nothing\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=re.escape("page.md:3") + "(.|\n)*nowhere"):
        pages.run_page(page, tmp_path)
