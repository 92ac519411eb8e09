"""What cannot be written, or not be had of an object store: what it was, what was found, and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dmx.errors import DmxError

# A full disk, a quota, a read-only file system, a file larger than they may be. Reading meets none of them.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
ADVICE = "make room, or choose a place that can be written to, and give the same command again"
STORE_ADVICE = "look at the store and the way to it, and give the same command again"
# Safetensors, Parquet and faiss raise errors of their own, with the system's number in the text.
_NUMBER = re.compile(r"(?:os error |errno )(\d+)")


@contextmanager
def writing(out: str | Path, what: str, *, stays: str = "", advice: str = ADVICE) -> Iterator[None]:
    """Name the output in the error of a disk that takes no more.

    Args:
        out: the file or folder that is written.
        what: it is, for instance "the index".
        stays: what the failure leaves as it was, or keeps.
        advice: what to do.

    Raises:
        DmxError: there is no room, the file system is read-only, or an object store fails. Others pass.
    """
    try:
        yield
    except DmxError:
        raise
    except Exception as error:
        fault = store_fault(error)
        reason = fault or no_room(error)
        if reason is None:
            raise
        kept = f"; {stays}" if stays else ""
        remedy = STORE_ADVICE if fault else advice
        raise DmxError(f"{out}: wanted to write {what}, found: {reason}{kept}. To go on, {remedy}") from error


def no_room(error: BaseException) -> str | None:
    """The system's reason why nothing more can be written; None where the error is another."""
    number = getattr(error, "errno", None)
    if number is None and (match := _NUMBER.search(str(error))):
        number = int(match[1])
    return os.strerror(number) if number in NO_ROOM else None


def store_fault(error: BaseException) -> str | None:
    """What an object store answered, or that it did not; None where the error is another."""
    text = str(error)
    return text if isinstance(error, OSError) and "AWS Error" in text else None


@contextmanager
def whole_file(out: Path, what: str = "it whole") -> Iterator[Path]:
    """The temporary name of a file, which takes its own when it is whole.

    Args:
        out: the file.
        what: it is, for the error.

    Raises:
        DmxError: as `writing`; what was there before stays.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with writing(out, what, stays="what was there before, if anything, stays"):
            yield temporary
            temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced(out: Path) -> Iterator[TextIO]:
    """A text file that takes its name when it is whole."""
    with whole_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def write_whole(file: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new one, whole."""
    with replaced(file) as whole:
        whole.write(text)
