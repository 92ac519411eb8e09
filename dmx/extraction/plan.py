"""What there is to embed, in parts that are done or not: one part of the output for every shard.

    OUT/embeddings.json              what was embedded with what, written first; `finished` is set last
    OUT/part-00000.parquet           row, key, identity, camera, embedding of a shard's images
    OUT/part-00000.skipped.jsonl     images of that shard that cannot be decoded; only if there are any
    OUT/skipped.jsonl                all of those, once it is finished

A part gets its name when it is whole, after the list of what it lacks. So what an interrupted run leaves is
worth keeping as it is, and the same command goes on with the other parts.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dmx.data.dataset import Dataset
from dmx.data.shards import ShardSplit, Split
from dmx.data.storage import Location, locate, read_json
from dmx.data.writer import ROWS_PER_SHARD
from dmx.errors import DmxError
from dmx.features import MANIFEST_NAME, OPENERS
from dmx.names import printable

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
SKIPPED_NAME = "skipped.jsonl"
TEMPORARY_SUFFIX = ".tmp"
PARTS_STAY = "parts that are there are whole"


@dataclass(frozen=True)
class Part:
    """Rows `begin` to `end - 1` of the split, which become one Parquet file."""

    index: int
    begin: int
    end: int

    @property
    def name(self) -> str:
        """The Parquet file."""
        return f"part-{self.index:05d}.parquet"

    @property
    def skipped_name(self) -> str:
        """The list of its images that cannot be decoded."""
        return f"part-{self.index:05d}.{SKIPPED_NAME}"

    @property
    def rows(self) -> int:
        """Images, those that cannot be decoded included."""
        return self.end - self.begin


@dataclass(frozen=True)
class Settings:
    """What features depend on. Parts made with different ones do not belong together."""

    model: str
    weights_sha256: str
    dataset: str
    data_sha256: str
    split: str
    rows: int
    parts: int
    width: int
    image_height: int
    image_width: int
    precision: str
    flip: bool


def parts_of(split: Split) -> list[Part]:
    """A part for every shard; of a data set that was not ingested, as many rows as a shard would have."""
    if isinstance(split, ShardSplit):
        starts = list(split.starts)
    else:
        starts = [*range(0, len(split), ROWS_PER_SHARD), len(split)]
    return [Part(i, begin, end) for i, (begin, end) in enumerate(itertools.pairwise(starts))]


def key_of(split: Split, row: int) -> str:
    """The key of one image, without reading those of the other shards."""
    if isinstance(split, ShardSplit):
        shard = bisect.bisect_right(split.starts, row) - 1
        return split.shard(shard).keys[row - split.starts[shard]]
    return split.keys[row]


def fingerprint(dataset: Dataset, name: str) -> str:
    """What tells a split from another: its shards' checksums, or else its keys and labels."""
    split, digest = dataset.split(name), hashlib.sha256()
    if isinstance(split, ShardSplit):
        for shard in split.shards:
            digest.update(f"{shard.sha256} {shard.rows}\n".encode())
    else:
        for values in (split.keys, split.identities.tolist(), split.cameras.tolist()):
            digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """What tells a model's weights from others, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Output:
    """The folder that features are written to."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.location: Location = locate(folder)

    def begin(self, settings: Settings, versions: dict[str, str], batch_size: int) -> bool:
        """Make the folder, or find out that it is this very job's; returns whether that is finished.

        Raises:
            DmxError: it holds features made otherwise, or something else.
        """
        names = []
        for name in self.location.names():
            if name.endswith(TEMPORARY_SUFFIX):  # left by a run that was killed
                self.location.delete(name)
            else:
                names.append(name)
        if MANIFEST_NAME not in names:
            if names:
                raise DmxError(
                    f"{self.folder}: wanted an empty or new folder, found {', '.join(names[:3])}"
                    f"{' ...' if len(names) > 3 else ''}; choose another --out"
                )
            self.location.filesystem.create_dir(self.location.path, recursive=True)
            self._write(
                {
                    "format": FORMAT,
                    "finished": False,
                    "settings": asdict(settings),
                    "batch_size": batch_size,
                    "versions": versions,
                }
            )
            return False
        found = self._read()
        self._require_same(settings, found["settings"])
        return bool(found["finished"])

    def recorded_precision(self) -> str | None:
        """The precision that this folder's features have, if there are any."""
        if self.location.size(MANIFEST_NAME) is None:
            return None
        return str(self._read()["settings"].get("precision"))

    def missing(self, parts: list[Part]) -> list[Part]:
        """The parts that are not there, or not whole."""
        names = set(self.location.names())
        with ThreadPoolExecutor(OPENERS, thread_name_prefix="parts") as pool:
            whole = pool.map(lambda part: part.name in names and self._is_whole(part), parts)
            return [part for part, is_whole in zip(parts, whole, strict=True) if not is_whole]

    def finish(self, parts: list[Part]) -> dict[str, int]:
        """Merge the lists of what was skipped, count, and mark the job as done.

        Returns:
            `rows` embedded and `skipped`.

        Raises:
            DmxError: nothing was embedded, as no image can be decoded; names the first.
        """
        names = set(self.location.names())
        lists = [self.location.read(p.skipped_name) for p in parts if p.skipped_name in names]
        skipped = sum(content.count(b"\n") for content in lists)
        if lists:
            self.location.write_atomically(SKIPPED_NAME, b"".join(lists))
        counts = {"rows": sum(part.rows for part in parts) - skipped, "skipped": skipped}
        if skipped and not counts["rows"]:
            first = json.loads(lists[0].splitlines()[0])
            raise DmxError(
                f"{self.folder}: wanted images that can be decoded, found none among {skipped:,}, the first "
                f"is {printable(first['key'])} ({first['reason']}); {SKIPPED_NAME} lists all of them"
            )
        self._write(self._read() | {"finished": True, **counts})
        return counts

    def counts(self) -> dict[str, int]:
        """What `finish` returned."""
        found = self._read()
        return {name: int(found[name]) for name in ("rows", "skipped")}

    def _is_whole(self, part: Part) -> bool:
        try:
            with self.location.filesystem.open_input_file(self.location.file(part.name)) as file:
                rows = int(pq.read_metadata(file).num_rows)
        except (OSError, pa.ArrowInvalid):
            return False
        if rows < part.rows and self.location.size(part.skipped_name) is not None:
            rows += self.location.read(part.skipped_name).count(b"\n")
        return rows == part.rows

    def _require_same(self, wanted: Settings, found: dict[str, Any]) -> None:
        # Where they lie does not matter: what they hold is compared.
        same_place = {"model": wanted.model, "dataset": wanted.dataset}
        changed = [
            f"{name} {found.get(name)!r}, not {value!r}"
            for name, value in asdict(wanted).items()
            if value != {**found, **same_place}.get(name)
        ]
        if changed:
            raise DmxError(
                f"{self.folder} holds features made with other settings ({'; '.join(changed)}): choose "
                "another --out, or give the command that they were made with"
            )

    def _read(self) -> dict[str, Any]:
        found = read_json(self.location, MANIFEST_NAME, self.folder)
        if found.get("format") != FORMAT or not isinstance(found.get("settings"), dict):
            raise DmxError(
                f"{self.folder}/{MANIFEST_NAME}: field format: wanted {FORMAT}, found "
                f"{found.get('format')!r}; choose another --out"
            )
        return found

    def _write(self, content: dict[str, Any]) -> None:
        self.location.write_atomically(MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())
