"""What a command writes: whether it can, known before anything is computed for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dmx.errors import DmxError


def require_writable(out: Path, suffixes: Sequence[str]) -> None:
    """Check that a command can write its `--out`, before anything is computed for it.

    Args:
        out: the file.
        suffixes: what its name may end with, in lower case, at least two.

    Raises:
        DmxError: it ends otherwise, or cannot be written.
    """
    if out.suffix.lower() not in suffixes:
        wanted = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise DmxError(f"--out: wanted a file that ends with {wanted}, found {out}")
    if out.is_dir():
        raise DmxError(f"--out: wanted a file to write, found the folder {out}; name a file in it")
    if not out.parent.is_dir():
        raise DmxError(f"--out: wanted a file in a folder that is there, found no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise DmxError(f"--out: wanted a folder that can be written to, found {out.parent}, which cannot")
