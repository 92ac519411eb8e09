"""Pages of the documentation as programs: what stands in their blocks, run in order in one folder.

The word behind a block's language says what it is:

    sh, python              is run
    ... not-run: REASON     is only checked: shell for its syntax and its `dmx` options, Python for its syntax
    ... file=NAME           is written to that file
    text output             what the block before printed; a line `...` stands for any lines
    text output figures     the same, but figures may differ
    text                    is nothing to a program

`python tests/pages.py docs/tutorial.md ...` runs pages one after another in one folder and writes what they
printed into those output blocks that say something else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\S+)(?: ([^\n]*))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FIGURE = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")
SHELL_SIGNS = re.compile(r"[|&;<>$`*()]")
# What every command imports: a process that is forked off one that has them starts at once.
PRELOADED = [
    "torch",
    "timm",
    "numba",
    "pyarrow.parquet",
    "scipy.sparse",
    "dmx.train.checkpoint",
    "dmx.evaluation",
]
LIMIT_S = 900  # of one block, on a machine that is busy with other work


@dataclass(frozen=True)
class Block:
    """A fenced block: the line that it begins in, what stands behind its fence, and its text."""

    line: int
    language: str
    mark: str
    text: str
    span: tuple[int, int]

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "python") and not self.mark

    @property
    def is_output(self) -> bool:
        return self.language == "text" and self.mark.startswith("output")

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.mark.removeprefix("not-run: ") if self.mark.startswith("not-run: ") else None

    @property
    def file(self) -> str | None:
        return self.mark.removeprefix("file=") if self.mark.startswith("file=") else None


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page but the directives of its own kind, `{...}`.

    Raises:
        ValueError: a block is of no kind that this module knows; names it.
    """
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, mark = match[1], match[2] or ""
        if language.startswith("{"):
            continue
        line = text.count("\n", 0, match.start()) + 1
        block = Block(line, language, mark, match[3], match.span(3))
        known = block.is_run or block.is_output or block.file or block.reason or block == _plain(block)
        if not known:
            raise ValueError(
                f"{page}:{line}: wanted a block as tests/pages.py says, found ```{language} {mark}"
            )
        found.append(block)
    return found


def _plain(block: Block) -> Block | None:
    return block if block.language == "text" and not block.mark else None


def commands_of(block: Block) -> list[str]:
    """A shell block's commands, of which each may take several lines."""
    joined = block.text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def run_page(page: Path, folder: Path) -> dict[int, str]:
    """Run a page's blocks in order in a folder.

    Returns:
        For every block that is run, by its place among the blocks, what it printed on standard output.

    Raises:
        AssertionError: a block failed; shows it and what it printed.
    """
    printed = {}
    for place, block in enumerate(blocks_of(page)):
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.is_run:
            try:
                printed[place] = run_block(block, folder)
            except AssertionError as error:
                raise AssertionError(f"{page.name}:{block.line}: {error}") from None
    return printed


def run_block(block: Block, folder: Path) -> str:
    """What one block prints."""
    if block.language == "python":
        return in_process(folder, "python", [block.text])
    return "".join(_run_command(line, folder) for line in commands_of(block))


def _run_command(line: str, folder: Path) -> str:
    if line.startswith("dmx ") and not SHELL_SIGNS.search(line):
        return in_process(folder, "dmx", shlex.split(line, comments=True)[1:])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def in_process(folder: Path, kind: str, arguments: list[str]) -> str:
    """Run a `dmx` command or Python code in a process of its own, which has nothing left to import.

    README's commands are run by the shell (test_readme.py); there are too many here to import torch for each.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several commands would wait for each other
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / "stdout", Path(place) / "stderr"]
        process = context.Process(target=_child, args=(kind, arguments, str(folder), [str(f) for f in files]))
        process.start()
        process.join(LIMIT_S)
        if process.exitcode is None:
            process.terminate()
            process.join()
        out, err = (file.read_text(encoding="utf-8") if file.exists() else "" for file in files)
    assert process.exitcode == 0, f"{kind} {shlex.join(arguments)}\nexit {process.exitcode}\n{out}\n{err}"
    return out


def _child(kind: str, arguments: list[str], folder: str, files: list[str]) -> None:
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    if kind == "dmx":
        from dmx.cli import main

        sys.argv = ["dmx", *arguments]
        sys.exit(main(arguments))
    exec(compile(arguments[0], "example", "exec"), {"__name__": "__main__"})


def differences(page: Path, printed: dict[int, str]) -> Iterator[tuple[Block, str]]:
    """Output blocks that do not say what was printed, with what was."""
    last = ""
    for place, block in enumerate(blocks_of(page)):
        last = printed.get(place, last)
        if block.is_output and not agrees(block, last):
            yield block, last


def agrees(block: Block, printed: str) -> bool:
    """Whether an output block says what was printed."""
    wanted, found = (_lines(text) for text in (block.text, printed))
    if block.mark == "output figures":
        wanted, found = ([FIGURE.sub("0", line) for line in lines] for lines in (wanted, found))
        # A column is as wide as its longest figure.
        wanted, found = ([" ".join(line.split()) for line in lines] for lines in (wanted, found))
    pattern = "\n".join(".*" if line.strip() == "..." else re.escape(line) for line in wanted)
    return re.fullmatch(pattern, "\n".join(found), re.DOTALL) is not None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def write_outputs(page: Path, printed: dict[int, str]) -> int:
    """Put what was printed into the output blocks that say something else; how many there were.

    Figures that may differ are written, too: those that a page shows have been printed.
    """
    text, count, last = page.read_text(encoding="utf-8"), 0, ""
    parts = []
    for place, block in enumerate(blocks_of(page)):
        last = printed.get(place, last)
        if block.is_output and (said := _shortened(block, last)) != block.text:
            parts.append((block.span, said))
            count += 1
    for (begin, end), said in reversed(parts):
        text = text[:begin] + said + text[end:]
    page.write_text(text, encoding="utf-8")
    return count


def _shortened(block: Block, printed: str) -> str:
    """What was printed, with the first `...` of the block where that leaves lines out."""
    shown, lines = _lines(block.text), _lines(printed)
    if agrees(block, printed) and "..." in shown:
        place = shown.index("...")
        rest = len(shown) - place - 1
        lines = [*lines[:place], "...", *(lines[-rest:] if rest else [])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run pages and write what they print into them.")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, help="where, for instance where the tutorial was run before")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as fresh:
        folder = args.folder or Path(fresh)
        folder.mkdir(parents=True, exist_ok=True)
        for page in args.pages:
            print(f"{page}: {write_outputs(page, run_page(page, folder))} outputs written", flush=True)


if __name__ == "__main__":
    main()
