"""Images inside tar archives, compressed or not, and zip archives."""

from __future__ import annotations

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dmx.data.layouts.base import (
    MAX_ENCODED_BYTES,
    BytesRef,
    ImageRef,
    Options,
    SliceRef,
    Unreadable,
    is_image_name,
)

# A zip's local file header: its length, and where it gives the lengths of the name and the extra field.
ZIP_HEADER_BYTES = 30
ZIP_LENGTHS = struct.Struct("<26xHH")


@dataclass(frozen=True, slots=True)
class ZipRef:
    """An image inside a zip archive, addressed so that reading it does not parse the archive's directory."""

    path: str
    offset: int
    length: int
    deflated: bool
    size: int
    crc: int

    def read(self) -> bytes:
        """The image's encoded bytes.

        Raises:
            OSError: the archive is damaged or cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            header = file.read(ZIP_HEADER_BYTES)
            if len(header) < ZIP_HEADER_BYTES:
                raise OSError("the archive ends early")
            file.seek(sum(ZIP_LENGTHS.unpack(header)), 1)
            content = file.read(self.length)
        if self.deflated:
            try:
                # A member that is larger than it says ends here, and its checksum is wrong.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(1, self.size))
            except zlib.error as error:
                raise OSError(f"broken member of the archive: {error}") from error
        if zlib.crc32(content) != self.crc:
            raise OSError("broken member of the archive: wrong checksum")
        return content


def zip_image_ref(archive: Path, info: zipfile.ZipInfo) -> ZipRef | Unreadable:
    """The address of one member, or why it cannot be read."""
    if info.flag_bits & 1:
        return Unreadable(info.filename, "encrypted member of the archive")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return Unreadable(info.filename, f"compression method {info.compress_type} of the archive")
    if max(info.file_size, info.compress_size) > MAX_ENCODED_BYTES:
        return Unreadable(info.filename, _too_large(info.file_size))
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return ZipRef(str(archive), info.header_offset, info.compress_size, deflated, info.file_size, info.CRC)


def _too_large(size: int) -> str:
    return f"member of {size} bytes of the archive, at most {MAX_ENCODED_BYTES} are read"


class Member(NamedTuple):
    """One file of an archive; `key` is `ARCHIVE/MEMBER`."""

    key: str
    image: ImageRef


def tar_members(archive: Path, key: str) -> Iterator[Member | Unreadable]:
    """Every regular file of a tar, in its order.

    Members of an uncompressed tar can be read later and in place; those of a compressed one only in
    passing, so they carry their bytes. An archive that ends early gives what comes before, then an
    `Unreadable`.
    """
    try:
        with tarfile.open(archive, "r:") as plain:
            for member in plain:
                if member.isfile() and member.size > MAX_ENCODED_BYTES:
                    yield Unreadable(f"{key}/{member.name}", _too_large(member.size))
                elif member.isfile():
                    slice_ref = SliceRef(str(archive), member.offset_data, member.size)
                    yield Member(f"{key}/{member.name}", slice_ref)
        return
    except tarfile.ReadError as error:
        if archive.suffix == ".tar":
            yield Unreadable(key, f"broken archive: {error}")
            return
    try:
        with tarfile.open(archive, "r|*") as stream:
            for member in stream:
                if not member.isfile():
                    continue  # links lead to what is read under its own name, or out of the archive
                if member.size > MAX_ENCODED_BYTES:
                    yield Unreadable(f"{key}/{member.name}", _too_large(member.size))
                    continue
                content = stream.extractfile(member)
                if content is not None:
                    yield Member(f"{key}/{member.name}", BytesRef(content.read()))
    except (tarfile.TarError, EOFError, OSError) as error:
        yield Unreadable(key, f"broken archive: {error}")


def tar_images(archive: Path, key: str, options: Options) -> Iterator[Member | Unreadable]:
    """The images of a tar; other members are counted as ignored."""
    for item in tar_members(archive, key):
        if isinstance(item, Unreadable) or is_image_name(item.key.rsplit("/", 1)[-1]):
            yield item
        else:
            options.ignored += 1
