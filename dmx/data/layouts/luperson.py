"""LUPerson: an LMDB of JPEG bytes and a pickled list of its keys, `CC_TT_VVVV_IIIIIIII`. No labels."""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx.data.layouts.base import Expected, Found, Layout, Options, Reading, Unreadable, first_root
from dmx.errors import DmxError

KEYS_NAME = "keys.pkl"
# "About": editions of the set differ by the videos that could still be fetched.
COUNTS = (Expected("train", "images", 4_180_000, tolerance=0.01),)


def _latin1(text: str, encoding: str) -> bytes:
    """What old pickles call to make bytes of text; any other codec is refused."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r} is not admitted")
    return text.encode("latin-1")


def _flat(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """An operation that makes a tuple, if no tuple is in it."""

    def load_flat(unpickler: Any) -> None:
        load(unpickler)
        if any(isinstance(item, tuple) for item in unpickler.stack[-1]):
            raise pickle.UnpicklingError("tuples in a tuple are not admitted")

    return load_flat


class _PlainUnpickler(pickle._Unpickler):
    """Loads containers, str, bytes and numbers; a pickle that names anything else is refused unexecuted.

    It is Python's, not C's, which makes room for as many objects as a pickle claims: a few bytes would take
    all memory. Tuples in tuples are refused, as a hundred of them may take for ever to be hashed.
    """

    ADMITTED: dict[tuple[str, str], Any] = {  # noqa: RUF012  # constant
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
        ("__builtin__", "set"): set,
        ("__builtin__", "frozenset"): frozenset,
        ("_codecs", "encode"): _latin1,
    }

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012  # constant
    for _opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[_opcode[0]] = _flat(dispatch[_opcode[0]])

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def load_keys(path: Path) -> list[str]:
    """Read the keys of `keys.pkl` without running anything that the file names.

    Raises:
        DmxError: not a pickle of a list of keys, or one that names code.
    """
    try:
        # In memory a length that is longer than the file reads what there is.
        value = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        if isinstance(value, dict):
            value = value.get("keys", value)
        if not isinstance(value, (list, tuple, set, frozenset, dict)):
            raise TypeError(f"a {type(value).__name__}")
        keys = [key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else key for key in value]
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        MemoryError,
        RecursionError,
        struct.error,
    ) as error:
        raise DmxError(
            f"{path}: wanted a pickled list of keys made of plain str or bytes, found "
            f"something else ({error}); get the file again from its authors, or write it as a plain list"
        ) from error
    bad = next((key for key in keys if not isinstance(key, str)), "")
    if not isinstance(bad, str):
        raise DmxError(f"{path}: wanted keys that are str or bytes, found {type(bad).__name__}")
    return sorted(keys) if isinstance(value, (set, frozenset)) else keys


@functools.lru_cache(maxsize=2)
def _environment(path: str, process: int) -> Any:
    """The opened database; one a process, as LMDB demands: a forked one must not use its parent's."""
    try:
        import lmdb  # only this layout needs it
    except ImportError as error:
        raise DmxError(f"{path}: reading LMDB needs the package lmdb: pip install 'dmx[lmdb]'") from error
    folder = Path(path)
    try:
        environment = lmdb.open(path, readonly=True, lock=False, readahead=False, subdir=folder.is_dir())
    except lmdb.Error as error:
        raise DmxError(f"{path}: wanted an LMDB of images, found {error}; fetch it again") from error
    # Reading what lies beyond the end of a file in memory would end the process without a word.
    wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found = (folder / "data.mdb" if folder.is_dir() else folder).stat().st_size
    if found < wanted:
        raise DmxError(f"{path}: wanted an LMDB of {wanted} bytes, found {found}; fetch it again")
    return environment


@dataclass(frozen=True, slots=True)
class LmdbRef:
    """An image in an LMDB."""

    path: str
    key: str

    def read(self) -> bytes:
        """The image's encoded bytes.

        Raises:
            OSError: the database cannot be read, or lacks the key.
        """
        environment = _environment(self.path, os.getpid())
        import lmdb  # after `_environment`, which says when it is missing

        try:
            with environment.begin() as transaction:
                value = transaction.get(self.key.encode("utf-8", "surrogateescape"))
        except (lmdb.Error, UnicodeEncodeError) as error:
            raise OSError(f"the database cannot be read: {error}") from error
        if value is None:
            raise OSError("key is not in the database")
        return bytes(value)


def _database(root: Path) -> Path | None:
    if (root / "data.mdb").is_file():
        return root
    inside = [root / "lmdb", *sorted(root.glob("*.lmdb")), *sorted(root.glob("*.mdb"))]
    return next((path for path in inside if path.is_file() or (path / "data.mdb").is_file()), None)


def _find(source: Path) -> Path | None:
    return first_root(source, lambda root: (root / KEYS_NAME).is_file() and _database(root) is not None)


def _read(root: Path, options: Options) -> Reading:
    database = _database(root)
    if database is None:
        raise DmxError(f"{root}: wanted an LMDB beside {KEYS_NAME} (lmdb/data.mdb), found none")
    _environment(str(database), os.getpid())
    for key in load_keys(root / KEYS_NAME):
        if not key:
            yield Unreadable(KEYS_NAME, "empty key")
        else:
            yield Found("train", key, -1, -1, LmdbRef(str(database), key))


LAYOUTS = (Layout("luperson", "an LMDB (lmdb/data.mdb) with keys.pkl", _find, _read, lambda root: COUNTS),)
