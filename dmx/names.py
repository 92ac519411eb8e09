"""Names of files, which may be any bytes: as text that every format holds, and that a terminal may show."""

from __future__ import annotations


def as_text(name: str) -> str:
    r"""A name as UTF-8 can hold it: bytes that are none become `\xe9`. Line breaks and the like stay.

    Args:
        name: as Python gives it, with surrogates in the place of such bytes.
    """
    if name.isascii():
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return name.encode("utf-8", "backslashreplace").decode()


def printable(shown: str) -> str:
    """A name without what would steer a terminal, or is no text at all."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
