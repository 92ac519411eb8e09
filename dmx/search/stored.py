"""An index in a folder, which is there whole or not at all.

    FOLDER/index.json       what was embedded with what; sizes of the other files
    FOLDER/index.faiss      the embeddings, as faiss writes them
    FOLDER/rows.parquet     row, key, identity and camera of each
    FOLDER/skipped.jsonl    images of the gallery that cannot be decoded; only if there are any

It is written under a temporary name beside its place, then renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dmx.data.layouts import Unreadable
from dmx.data.storage import locate
from dmx.errors import DmxError
from dmx.scratch import scratch_folder
from dmx.search.encoder import ModelRecord
from dmx.search.gallery import Gallery
from dmx.search.images import Origin
from dmx.search.index import SCHEMA, Index, Lists, require_faiss
from dmx.train.runlog import versions
from dmx.writing import writing

FORMAT = 1
MANIFEST, VECTORS, ROWS, SKIPPED = "index.json", "index.faiss", "rows.parquet", "skipped.jsonl"


def is_index(path: str | Path) -> bool:
    """Whether a folder holds an index."""
    return "://" not in str(path) and (Path(path).expanduser() / MANIFEST).is_file()


def require_place(folder: Path) -> None:
    """Check that an index can be written to a folder, before anything is embedded for it.

    Raises:
        DmxError: something else is there, or it cannot be written to.
    """
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise DmxError(f"--index: wanted a folder that can be written to, found {above}, which cannot")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DmxError(
            f"--index: wanted an index, or a new or empty folder for one, found something else in {folder}; "
            "choose another"
        )


def write_index(index: Index, folder: Path) -> None:
    """Write an index to a folder that is not there yet, or empty.

    Raises:
        DmxError: something came there meanwhile, or there is no room for it.
    """
    with writing(folder, "the index", stays="nothing of it is left"), _new_folder(folder) as place:
        _write_vectors(index.vectors, place / VECTORS)
        pq.write_table(index.rows, place / ROWS)
        if index.left_out:
            lines = [json.dumps({"key": item.key, "reason": item.reason}) + "\n" for item in index.left_out]
            (place / SKIPPED).write_text("".join(lines), encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "rows": len(index),
            "model": asdict(index.model),
            "gallery": index.gallery,
            "fingerprint": index.fingerprint,
            "origin": None if index.origin is None else asdict(index.origin),
            "lists": None if index.lists is None else asdict(index.lists),
            "bytes": {path.name: path.stat().st_size for path in sorted(place.iterdir())},
            "versions": versions(),
        }
        (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write_vectors(vectors: Any, path: Path) -> None:
    """By a writer that raises: faiss's own only prints that the end of a file had no room."""
    faiss = require_faiss()
    with open(path, "wb") as file:
        faiss.write_index(vectors, faiss.PyCallbackIOWriter(file.write))


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that takes its name when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(f".{folder.name}-tmp-", folder.parent) as temporary:
        yield temporary
        require_place(folder)
        temporary.rename(folder)


class StoredIndex:
    """An index that was written before: known by its manifest until it is read."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest.

        Raises:
            DmxError: it is not an index's, or a file is missing or cut short; names it.
        """
        self.folder = folder
        location = locate(folder)
        try:
            found = json.loads(location.read(MANIFEST))
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}, not {FORMAT}")
            self.rows = int(found["rows"])
            self.model = ModelRecord(**found["model"])
            self.gallery, self.fingerprint = str(found["gallery"]), str(found["fingerprint"])
            self.origin = None if found["origin"] is None else Origin.from_tree(found["origin"])
            self.lists = None if found["lists"] is None else Lists(**found["lists"])
            sizes = {str(name): int(size) for name, size in found["bytes"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._broken(MANIFEST, "the manifest of an index", repr(error)) from error
        for name, size in sizes.items():
            if (there := location.size(name)) != size:
                raise self._broken(
                    name, f"{size} bytes", "no such file" if there is None else f"{there} bytes"
                )

    def require_model(self, record: ModelRecord) -> None:
        """Check that it was made by a model.

        Raises:
            DmxError: it was not; tells what differs.
        """
        record.require(asdict(self.model), str(self.folder), "make another index of the gallery")

    def require_gallery(self, gallery: Gallery) -> None:
        """Check that it holds a gallery, as that is now.

        Raises:
            DmxError: it holds another, or that has changed.
        """
        if self.fingerprint == gallery.fingerprint:
            return
        what = (
            "that gallery as it was before it changed"
            if self.gallery == gallery.path
            else f"the gallery {self.gallery}"
        )
        raise DmxError(
            f"{self.folder}: wanted an index of the gallery {gallery.path}, found one of {what}; choose "
            "another --index, or delete this one, to embed the gallery anew"
        )

    def require_kind(self, kind: str | None, probes: int | None) -> None:
        """Check that it is of the kind that is asked for, if any is.

        Raises:
            DmxError: it is of the other.
        """
        found = "flat" if self.lists is None else "ivf"
        wanted = kind or ("ivf" if probes is not None else found)
        if wanted != found:
            raise DmxError(
                f"{self.folder}: wanted an index of type {wanted}, found one of type {found}; leave "
                "--index-type and --probes out, or choose another --index to embed the gallery anew"
            )

    def read(self) -> Index:
        """All of it.

        Raises:
            DmxError: a file is broken; names it.
        """
        try:
            vectors = require_faiss().read_index(str(self.folder / VECTORS))
        except RuntimeError as error:
            raise self._broken(VECTORS, "an index of faiss", str(error)) from error
        wanted, found = (self.rows, self.model.width), (vectors.ntotal, vectors.d)
        if wanted != found:
            raise self._broken(VECTORS, f"{wanted} rows and width", f"{found}")
        return Index(
            vectors,
            self._read_rows(),
            self.model,
            self.gallery,
            self.fingerprint,
            self.origin,
            self.lists,
            self._read_left_out(),
        )

    def _read_rows(self) -> Any:
        try:
            rows = pq.read_table(self.folder / ROWS)
        except (OSError, pa.ArrowInvalid) as error:
            raise self._broken(ROWS, "a Parquet file", str(error)) from error
        if rows.schema != SCHEMA or len(rows) != self.rows:
            raise self._broken(
                ROWS, f"{self.rows} rows of {SCHEMA.names}", f"{len(rows)} of {rows.schema.names}"
            )
        return rows.combine_chunks()

    def _read_left_out(self) -> tuple[Unreadable, ...]:
        file = self.folder / SKIPPED
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return tuple(Unreadable(**json.loads(line)) for line in lines)

    def _broken(self, name: str, wanted: str, found: str) -> DmxError:
        return DmxError(
            f"{self.folder / name}: wanted {wanted}, found {found}; delete the index to embed the gallery "
            "anew"
        )
