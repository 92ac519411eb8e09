"""Local folders and object stores behind one interface: `pyarrow.fs`."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from dmx.errors import DmxError

HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Location:
    """A folder somewhere: a path within a file system."""

    filesystem: Any
    path: str
    is_local: bool

    def file(self, name: str) -> str:
        """The path of the file `name` in this folder, as the file system wants it."""
        return f"{self.path}/{name}" if self.path else name

    def size(self, name: str) -> int | None:
        """Bytes of a file of this folder; None when it is not there."""
        info = self.filesystem.get_file_info(self.file(name))
        return int(info.size) if info.type == pafs.FileType.File else None

    def names(self) -> list[str]:
        """The files and folders directly in this folder; empty when the folder does not exist."""
        found = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        with self.filesystem.open_input_file(self.file(name)) as file:
            return bytes(file.read())

    def write_atomically(self, name: str, content: bytes) -> None:
        """Write a small file so that a reader sees all of it or nothing."""
        temporary = f".{name}.tmp"
        with self.filesystem.open_output_stream(self.file(temporary)) as file:
            file.write(content)
        self.filesystem.move(self.file(temporary), self.file(name))

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        if self.size(name) is not None:
            self.filesystem.delete_file(self.file(name))

    def sha256(self, name: str) -> str:
        """The checksum of a file, read in blocks."""
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.file(name)) as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()


def locate(folder: str | Path) -> Location:
    """Resolve a local path or a URI (`s3://bucket/set`, `gs://...`, `hdfs://...`, `file://...`).

    Raises:
        DmxError: the URI's scheme is not one that `pyarrow.fs` knows.
    """
    text = str(folder)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        return Location(pafs.LocalFileSystem(), str(Path(text).expanduser().absolute()), True)
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except (ValueError, OSError) as error:
        raise DmxError(
            f"{text}: wanted a local path or a URI that pyarrow.fs opens (s3://, gs://, hdfs://, file://), "
            f"found {error}"
        ) from error
    return Location(filesystem, path.rstrip("/"), isinstance(filesystem, pafs.LocalFileSystem))


def read_json(location: Location, name: str, folder: str | Path) -> dict[str, Any]:
    """Read a JSON object, or say which file is not one."""
    try:
        value = json.loads(location.read(name))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DmxError(f"{folder}/{name}: wanted JSON, found {error}; ingest the data set again") from error
    if not isinstance(value, dict):
        raise DmxError(f"{folder}/{name}: wanted a JSON object, found {type(value).__name__}; ingest again")
    return value
