"""The names of a folder in order, in memory that does not grow with their number.

The order of a folder's own listing differs between machines; sorting ten million names in memory would take
gigabytes. So they are sorted in runs, each in a temporary file, and merged (an external merge sort).
"""

from __future__ import annotations

import heapq
import itertools
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from dmx.writing import writing

# Names that are held and sorted at a time, some 10 MB. A folder with fewer needs no file.
RUN_NAMES = 1 << 16
_HEAD = struct.Struct("<H?")  # bytes of the name, whether it is a folder's
Entry = tuple[str, bool]


def sorted_entries(folder: Path) -> Iterator[Entry]:
    """The entries of a folder by name, and whether each is a folder.

    Raises:
        DmxError: there is no room for temporary files.
    """
    with ExitStack() as files:
        with os.scandir(folder) as listing:
            found = ((entry.name, entry.is_dir()) for entry in listing)
            runs: list[Iterator[Entry]] = []
            while len(run := sorted(itertools.islice(found, RUN_NAMES))) == RUN_NAMES:
                runs.append(_kept(run, files))
                run.clear()  # before the next is made
        yield from heapq.merge(*runs, run)


def _kept(entries: list[Entry], files: ExitStack) -> Iterator[Entry]:
    """Put entries into a temporary file; yields them from there."""
    with writing(tempfile.gettempdir(), "the names of a large folder"):
        file = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # closed by the stack
        for name, is_folder in entries:
            encoded = os.fsencode(name)
            file.write(_HEAD.pack(len(encoded), is_folder) + encoded)
        file.seek(0)
    return _read(file)


def _read(file: BinaryIO) -> Iterator[Entry]:
    while head := file.read(_HEAD.size):
        length, is_folder = _HEAD.unpack(head)
        yield os.fsdecode(file.read(length)), is_folder


def leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it lies in, so that following it would never end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())
