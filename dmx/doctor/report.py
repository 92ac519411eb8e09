"""What an examination found, as lines to read and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

from dmx import __version__

_NAMES = 13  # characters that the names of rows have
_WIDTH = 110  # of a line, but for problems, which stay lines that can be searched for


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB"


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        name: what it is about.
        text: what there is.
        facts: the same as JSON values; None: the text says all.
    """

    name: str
    text: str
    facts: Any = None


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        about: what has the problem.
        wanted, found: what was expected there, and what there is.
        remedy: what to do.
        fails: it does not work; otherwise it works worse than it could.
    """

    about: str
    wanted: str
    found: str
    remedy: str
    fails: bool = True

    @property
    def kind(self) -> str:
        """How it is announced."""
        return "error" if self.fails else "warning"

    def __str__(self) -> str:
        return f"{self.about}: wanted {self.wanted}, found {self.found}; {self.remedy}"


@dataclass(frozen=True)
class Section:
    """Lines that belong together, and the problems seen while they were collected.

    Attributes:
        heading: what stands over the texts.
    """

    title: str
    rows: Sequence[Row]
    problems: Sequence[Problem] = field(default=())
    heading: str = ""


@dataclass(frozen=True)
class Report:
    """All of it."""

    sections: Sequence[Section]

    @property
    def problems(self) -> list[Problem]:
        """Those of all sections, what does not work first."""
        found = [problem for section in self.sections for problem in section.problems]
        return sorted(found, key=lambda problem: not problem.fails)

    @property
    def works(self) -> bool:
        """Whether everything does that was tried."""
        return not any(problem.fails for problem in self.problems)

    def text(self) -> str:
        """For the terminal."""
        lines = []
        for section in self.sections:
            lines.append(f"{section.title:<{_NAMES + 2}}  {section.heading}".rstrip())
            lines += [_line(row) for row in section.rows]
            lines.append("")
        if problems := self.problems:
            lines.append("problems")
            lines += [f"  {problem.kind:<{_NAMES}}  {problem}" for problem in problems]
            lines.append("")
        failed = sum(problem.fails for problem in problems)
        lines.append(f"errors: {failed}" if failed else "everything that was tried works")
        return "\n".join(lines)

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "dmx": __version__,
            "works": self.works,
            **{
                section.title: {
                    row.name: row.text if row.facts is None else row.facts for row in section.rows
                }
                for section in self.sections
            },
            "problems": [
                {
                    "kind": problem.kind,
                    "about": problem.about,
                    "wanted": problem.wanted,
                    "found": problem.found,
                    "remedy": problem.remedy,
                }
                for problem in self.problems
            ],
        }


def _line(row: Row) -> str:
    head = f"  {row.name:<{_NAMES}}  "
    return fill(row.text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head),
                break_long_words=False, break_on_hyphens=False)  # fmt: skip
