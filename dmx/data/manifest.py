"""The manifest of a data set on disk: what is in it, how often, and how to tell that it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dmx.data.storage import Location, locate, read_json
from dmx.errors import DmxError

# 2 has columns behind those of 1; a reader of 2 reads both.
SCHEMA_VERSION, WITH_MORE_COLUMNS = 1, 2
MANIFEST_NAME = "manifest.json"
SKIPPED_NAME = "skipped.jsonl"
SPLITS = ("train", "query", "gallery")


@dataclass(frozen=True)
class Shard:
    """One Arrow IPC file."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitCounts:
    """What one split holds.

    `identities` and `cameras` count the distinct known ones (not -1); `labelled` counts the images whose
    identity is known.
    """

    images: int
    labelled: int
    identities: int
    cameras: int
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`."""

    layout: str
    dmx_version: str
    splits: Mapping[str, SplitCounts]
    skipped: int = 0
    skipped_file: str = SKIPPED_NAME
    ignored: int = 0
    warnings: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def manifest_from_json(value: Mapping[str, Any], where: str) -> Manifest:
    """Check and convert the JSON object of a manifest.

    Raises:
        DmxError: another schema version, or a field is missing or malformed; names it.
    """
    version = value.get("schema_version")
    if version not in (SCHEMA_VERSION, WITH_MORE_COLUMNS):
        raise DmxError(
            f"{where}: field schema_version: wanted {SCHEMA_VERSION} or {WITH_MORE_COLUMNS}, found "
            f"{version!r}; ingest the data set again with this version of dmx"
        )
    try:
        splits = {
            name: SplitCounts(
                _count(counts["images"]),
                _count(counts["labelled"]),
                _count(counts["identities"]),
                _count(counts["cameras"]),
                tuple(_shard(shard) for shard in counts["shards"]),
            )
            for name, counts in value["splits"].items()
        }
        return Manifest(
            layout=str(value["layout"]),
            dmx_version=str(value["dmx_version"]),
            splits=splits,
            skipped=_count(value["skipped"]),
            skipped_file=str(value["skipped_file"]),
            ignored=_count(value["ignored"]),
            warnings=tuple(str(text) for text in value["warnings"]),
            schema_version=version,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DmxError(
            f"{where}: field {error} is missing or malformed; ingest the data set again"
        ) from error


def _shard(value: Mapping[str, Any]) -> Shard:
    file = str(value["file"])
    if file != Path(file).name or file in ("", "."):
        raise ValueError(f"file {file!r}, which is not beside the manifest,")
    return Shard(file, _count(value["rows"]), _count(value["bytes"]), str(value["sha256"]))


def _count(value: Any) -> int:
    """A number of things, as a manifest holds it."""
    count = int(value)
    if not 0 <= count < 2**63:
        raise ValueError(f"with the number {value}")
    return count


def read_manifest(folder: str | Path, *, verify: bool = False) -> tuple[Manifest, Location]:
    """Read a data set's manifest and check that its shards are there and whole.

    Args:
        folder: local path or URI of an ingested data set.
        verify: also read every shard and compare its SHA-256.

    Returns:
        The manifest and the folder's location.

    Raises:
        DmxError: no manifest, another schema version, or a shard that is missing, cut short or changed.
    """
    location = locate(folder)
    if location.size(MANIFEST_NAME) is None:
        raise DmxError(
            f"{folder}: wanted an ingested data set, found no {MANIFEST_NAME}; run "
            f"`dmx ingest SOURCE {folder}` (an interrupted ingest leaves no manifest and has to be run again)"
        )
    manifest = manifest_from_json(read_json(location, MANIFEST_NAME, folder), f"{folder}/{MANIFEST_NAME}")
    for counts in manifest.splits.values():
        for shard in counts.shards:
            _check_shard(location, folder, shard, verify)
    return manifest, location


def _check_shard(location: Location, folder: str | Path, shard: Shard, verify: bool) -> None:
    size = location.size(shard.file)
    if size != shard.bytes:
        found = "no such file" if size is None else f"{size} bytes"
        raise DmxError(
            f"{folder}/{shard.file}: wanted {shard.bytes} bytes (manifest), found {found}; "
            "copy the data set again or ingest it again"
        )
    if verify and (digest := location.sha256(shard.file)) != shard.sha256:
        raise DmxError(
            f"{folder}/{shard.file}: wanted SHA-256 {shard.sha256} (manifest), found {digest}; "
            "the file was changed: copy the data set again or ingest it again"
        )
