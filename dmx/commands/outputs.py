"""What a command writes: whether it can, known before anything is computed for it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dmx.errors import DmxError


def require_writable(out: Path, suffixes: Iterable[str], option: str = "--out") -> None:
    """Check that a command can write its output, before anything is computed for it.

    Args:
        out: the file.
        suffixes: what its name may end with, in lower case, at least two.
        option: that named it, for the error.

    Raises:
        DmxError: it ends otherwise, or cannot be written.
    """
    require_suffix(out, suffixes, option)
    if out.is_dir():
        raise DmxError(f"{option}: wanted a file to write, found the folder {out}; name a file in it")
    if not out.parent.is_dir():
        raise DmxError(f"{option}: wanted a file in a folder that is there, found no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise DmxError(f"{option}: wanted a folder that can be written to, found {out.parent}, which cannot")


def require_suffix(out: Path, suffixes: Iterable[str], option: str = "--out") -> None:
    """Check how the name of a command's output ends.

    Args:
        out: the file.
        suffixes: what its name may end with, in lower case, at least two.
        option: that named it, for the error.

    Raises:
        DmxError: it ends otherwise.
    """
    *first, last = suffixes
    if out.suffix.lower() not in (*first, last):
        raise DmxError(
            f"{option}: wanted a file that ends with {', '.join(first)} or {last}, found {out}; rename it"
        )
