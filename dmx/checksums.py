"""Checksums of a folder's files in the format of sha256sum: `sha256sum -c SHA256SUMS` checks them, too."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmx.cores import cores

SUMS = "SHA256SUMS"
SEPARATOR = "  "


def write_sums(folder: Path) -> None:
    """Write the checksums of all files in a folder, which nobody else reads yet."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    lines = [f"{digest}{SEPARATOR}{path.name}\n" for path, digest in zip(files, _digests(files), strict=True)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def damage(folder: Path, names: Container[str] | None = None) -> str | None:
    """What is wrong with a folder of files, by its checksums.

    Args:
        folder: the folder.
        names: the files to look at; None looks at all that have a checksum.

    Returns:
        The first fault, with the name of its file; None where all is as it was written.
    """
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{folder / SUMS}: wanted the checksums of the other files, found: {error}"
    written = {}
    for number, line in enumerate(text.splitlines(), 1):
        digest, separator, name = line.partition(SEPARATOR)
        if not separator or len(digest) != 64:
            return f"{folder / SUMS}: line {number}: wanted a checksum and a file's name, found {line!r}"
        if names is None or name in names:
            written[name] = digest
    looked_at = {path.name for path in folder.iterdir() if names is None or path.name in names} - {SUMS}
    unknown = sorted(looked_at - written.keys())
    if unknown or not text.endswith("\n"):
        return (
            f"{folder / SUMS}: wanted checksums of all files, found none of {', '.join(unknown) or 'its end'}"
        )
    files = [folder / name for name in written]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        return f"{missing}: wanted this file, found none"
    for file, wanted, found in zip(files, written.values(), _digests(files), strict=True):
        if found != wanted:
            return f"{file}: wanted a file with the SHA-256 {wanted}, found {found}"
    return None


def _digests(files: list[Path]) -> list[str]:
    """SHA-256 of each file, in hexadecimal; several at a time, which hashlib allows."""
    with ThreadPoolExecutor(min(4, cores())) as pool:
        return list(pool.map(_digest, files))


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
