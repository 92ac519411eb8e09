"""Any known data set in, shards out: every image is decoded once, and broken ones are left out by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmx.cores import cores
from dmx.data.images import broken_reason
from dmx.data.layouts import Found, Layout, Options, Unreadable, recognise
from dmx.data.layouts.base import BytesRef
from dmx.data.manifest import SKIPPED_NAME, SPLITS, Manifest
from dmx.data.prefetch import map_ahead
from dmx.data.published import count_warnings
from dmx.data.shards import DatasetWriter
from dmx.data.writer import ROWS_PER_SHARD
from dmx.errors import DmxError
from dmx.names import as_text, printable
from dmx.progress import progress
from dmx.writing import writing

# Images read and decoded before they are written, a core; bounds memory.
AHEAD_PER_WORKER = 32
CAMERA_CHOICES = ("scene", "camera")
Checked = tuple[Found, bytes] | Unreadable


class DatasetWarning(UserWarning):
    """A data set can be used, but is not what its authors published, or should not be used."""


def warn_dataset(message: str) -> None:
    """The default for what a reader has to say: a Python warning."""
    warnings.warn(message, DatasetWarning, stacklevel=3)


def make_options(camera: str = "scene", camera_pattern: str | None = None) -> Options:
    """Check what a user told the readers.

    Raises:
        DmxError: an unknown choice, or a pattern without exactly one group.
    """
    if camera not in CAMERA_CHOICES:
        raise DmxError(f"camera: wanted {' or '.join(CAMERA_CHOICES)}, found {camera!r}")
    if camera_pattern is not None:
        try:
            groups = re.compile(camera_pattern).groups
        except re.error as error:
            raise DmxError(f"camera pattern {camera_pattern!r}: not a regular expression: {error}") from error
        if groups != 1:
            raise DmxError(
                f"camera pattern {camera_pattern!r}: wanted one group of digits, found {groups} groups"
            )
    return Options(camera=camera, camera_pattern=camera_pattern)


def read_source(layout: Layout, root: Path, options: Options) -> Iterator[Found | Unreadable]:
    """What a layout's reader yields, then an `Unreadable` for everything in `options.unread`.

    Numbers that a shard cannot hold are turned into `Unreadable`, and keys are text that it can hold.
    """
    for item in layout.read(root, options):
        key = as_text(item.key)
        if isinstance(item, Found) and not (item.identity < 2**63 and item.camera < 2**31):
            yield Unreadable(key, f"identity {item.identity} or camera {item.camera} is too large")
        else:
            yield item if key == item.key else item._replace(key=key)
    for path, reason in options.unread:
        yield Unreadable(as_text(path.relative_to(root).as_posix()), reason)


def left_out_warning(root: Path, count: int, first: Unreadable, where: str) -> str:
    """The sentence about a source of which not everything is read; `where` tells what lists it all."""
    entries = "1 image or folder is" if count == 1 else f"{count:,} images or folders are"
    return f"{root}: {entries} left out, the first is {printable(first.key)} ({first.reason}); {where}"


def _count(layout: Layout, root: Path, options: Options) -> int | None:
    """How many images there are to try; None where they lie in archives that are only read in passing."""
    count = 0
    for item in read_source(layout, root, options):
        if isinstance(item, Found) and isinstance(item.image, BytesRef):
            return None
        count += 1
    return count


def _check(item: Found | Unreadable) -> Checked:
    if isinstance(item, Unreadable):
        return item
    try:
        encoded = item.image.read()
    except OSError as error:
        return Unreadable(item.key, f"cannot be read: {error.strerror or error}")
    reason = broken_reason(encoded)
    return (item, encoded) if reason is None else Unreadable(item.key, reason)


def _copy(checked: Iterator[Checked], writer: DatasetWriter) -> tuple[int, list[Unreadable]]:
    """Write what can be read; returns how many images, and the first few that were left out."""
    images = 0
    skipped: list[Unreadable] = []
    for item in checked:
        if isinstance(item, Unreadable):
            writer.skip(item.key, item.reason)
            if len(skipped) < 3:
                skipped.append(item)
        else:
            found, encoded = item
            writer.add(found.split, encoded, found.identity, found.camera, found.key)
            images += 1
    return images, skipped


def ingest(
    source: str | Path,
    out: str | Path,
    layout: str = "auto",
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    overwrite: bool = False,
    camera: str = "scene",
    camera_pattern: str | None = None,
    workers: int | None = None,
    warn: Callable[[str], None] = warn_dataset,
) -> Manifest:
    """Turn a data set into shards.

    Images are kept byte for byte. Those that cannot be decoded or have no place in the layout are left out,
    counted in the manifest and listed with their reason in `skipped.jsonl`. Memory is bounded by a record
    batch. `out` changes only at the end.

    Args:
        source: folder (or archive, for some layouts) of the data set.
        out: local path or URI of the folder to write.
        layout: a name of `dmx.data.layouts.LAYOUTS`, or `auto`.
        rows_per_shard: images in a shard.
        overwrite: replace a data set that is already in `out`.
        camera: RandPerson's camera number, `scene` (with the scene) or `camera` (without, as published code).
        camera_pattern: regular expression whose one group is the camera in a file name; for
            `folder` and `crops`.
        workers: threads that decode, at least 1; None takes one a core.
        warn: called with each sentence about what differs from the published data set.

    Returns:
        The manifest that was written.

    Raises:
        DmxError: the layout is not recognised, no image can be read, `out` holds something already or cannot
            be written, or a parameter out of its range.
    """
    if workers is not None and workers < 1:
        raise DmxError(f"workers: wanted at least 1, found {workers}")
    options = make_options(camera, camera_pattern)
    if "://" in str(source):
        raise DmxError(
            f"{source}: wanted a local folder to read from; only OUT may be a URI. Copy it here first"
        )
    chosen, root = recognise(source, layout)
    writer = DatasetWriter(out, layout=chosen.name, rows_per_shard=rows_per_shard, overwrite=overwrite)
    count = cores() if workers is None else workers
    # Pillow lets go of the interpreter while it decodes, so threads use all cores.
    with (
        writing(out, "the data set", stays="nothing of it is left, and what was there before stays"),
        writer,
        ThreadPoolExecutor(count, thread_name_prefix="ingest") as pool,
    ):
        items = read_source(chosen, root, options)
        checked = map_ahead(pool, _check, items, AHEAD_PER_WORKER * count)
        total = _count(chosen, root, make_options(camera, camera_pattern))
        images, skipped = _copy(progress(checked, label="ingest", total=total, unit="images"), writer)
        if images == 0:
            listed = "".join(f"\n  {printable(item.key)}: {item.reason}" for item in skipped)
            raise DmxError(
                f"{root}: wanted images in layout {chosen.name} ({chosen.wanted}), found none that can be "
                f"read; point at the folder that holds them{listed}"
            )
        writer.ignored = options.ignored
        notes = [chosen.note] if chosen.note else []
        if options.unread:
            path, reason = options.unread[0]
            first = Unreadable(path.relative_to(root).as_posix(), reason)
            notes.append(left_out_warning(root, len(options.unread), first, f"all are in {SKIPPED_NAME}"))
        counts = writer.counts()
        writer.warnings = notes + count_warnings(
            chosen.name, chosen.published(root), counts, writer.skipped_count
        )
    for message in writer.warnings:
        warn(message)
    if writer.manifest is None:
        raise RuntimeError("the writer left no manifest")
    return writer.manifest


def summary(manifest: Manifest) -> str:
    """A table of what a data set holds: one line a split."""
    rows: list[tuple[str, ...]] = [("split", "images", "labelled", "identities", "cameras", "shards")]
    for name in SPLITS:
        if counts := manifest.splits.get(name):
            numbers = (counts.images, counts.labelled, counts.identities, counts.cameras, len(counts.shards))
            rows.append((name, *(f"{number:,}" for number in numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    tail = f"layout {manifest.layout}; {manifest.skipped:,} broken or misplaced left out"
    if manifest.skipped:
        tail += f" (listed in {manifest.skipped_file})"
    if manifest.ignored:
        tail += f"; {manifest.ignored:,} other files passed over"
    return "\n".join([*lines, tail])
