"""Local folders and object stores behind one interface: `pyarrow.fs`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from dmx.errors import DmxError
from dmx.writing import STORE_ADVICE, store_fault

HASH_BLOCK_BYTES = 1 << 20
# An object store that fails is asked so often, with growing pauses (a quarter of a minute together), and one
# that is silent for so long counts as failing: what it does not do within a minute and a half is an error.
ATTEMPTS = 6
SILENT_S = 10.0
CONNECT_S = 5.0


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
        with self._asking(name):
            info = self.filesystem.get_file_info(self.file(name))
        return int(info.size) if info.type == pafs.FileType.File else None

    def kind(self) -> Any:
        """Whether there is a folder, a file or nothing: a `pyarrow.fs.FileType`."""
        with self._asking():
            return self.filesystem.get_file_info(self.path).type

    def names(self) -> list[str]:
        """The files and folders directly in this folder; empty when the folder does not exist."""
        with self._asking():
            found = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        with self._asking(name), self.filesystem.open_input_file(self.file(name)) as file:
            return bytes(file.read())

    def write_atomically(self, name: str, content: bytes) -> None:
        """Write a small file so that a reader sees all of it or nothing."""
        temporary = f".{name}.tmp"
        try:
            with self.filesystem.open_output_stream(self.file(temporary)) as file:
                file.write(content)
            self.filesystem.move(self.file(temporary), self.file(name))
        except BaseException:
            with suppress(OSError):  # what is wrong is told already
                self.delete(temporary)
            raise

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        if self.size(name) is not None:
            self.filesystem.delete_file(self.file(name))

    def sha256(self, name: str) -> str:
        """The checksum of a file, read in blocks."""
        digest = hashlib.sha256()
        with self._asking(name), self.filesystem.open_input_stream(self.file(name)) as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    @contextmanager
    def _asking(self, name: str = "") -> Iterator[None]:
        """Say what to do when the store fails."""
        try:
            yield
        except OSError as error:
            if store_fault(error) is None:
                raise
            raise DmxError(f"{self.file(name)}: {error}. To go on, {STORE_ADVICE}") from error


def locate(folder: str | Path) -> Location:
    """Resolve a local path or a URI (`s3://bucket/set`, `gs://...`, `hdfs://...`, `file://...`).

    Raises:
        DmxError: the URI's scheme is not one that `pyarrow.fs` knows, or the URI holds a password.
    """
    text = str(folder)
    # AWS's secrets have slashes in them; behind the colon of others stands a port.
    if match := re.match(r"(s3://[^/@:]*:[^@]*|[A-Za-z][A-Za-z0-9+.-]+://[^/@:]*:[^/@]*)@", text, re.I):
        # Other users see it, and it would be kept in manifests, settings and logs.
        raise DmxError(
            f"{match[0].partition('://')[0]}://...@{text[match.end() :]}: wanted a URI without a password, "
            "found one; give it in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for one"
        )
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        return Location(pafs.LocalFileSystem(), str(Path(text).expanduser().absolute()), True)
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except (ValueError, OSError) as error:
        raise DmxError(
            f"{text}: wanted a local path or a URI that pyarrow.fs opens (s3://, gs://, hdfs://, file://), "
            f"found {error}"
        ) from error
    return Location(_patient(filesystem), path.rstrip("/"), isinstance(filesystem, pafs.LocalFileSystem))


def _patient(filesystem: Any) -> Any:
    """An S3 file system whose tries end: by themselves those of a store that is silent take five minutes."""
    if filesystem.type_name != "s3":
        return filesystem
    _, (options,) = filesystem.__reduce__()
    retries = pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    return pafs.S3FileSystem(
        **options | {"request_timeout": SILENT_S, "connect_timeout": CONNECT_S, "retry_strategy": retries}
    )


def read_json(location: Location, name: str, folder: str | Path) -> dict[str, Any]:
    """Read a JSON object, or say which file is not one."""
    try:
        value = json.loads(location.read(name))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DmxError(f"{folder}/{name}: wanted JSON, found {error}; ingest the data set again") from error
    if not isinstance(value, dict):
        raise DmxError(f"{folder}/{name}: wanted a JSON object, found {type(value).__name__}; ingest again")
    return value
