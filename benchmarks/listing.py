"""How long listing a folder of many images takes, and in how much memory; and what a broken image costs.

    python benchmarks/listing.py

The folder has hard links to one image under other names, in no order. Each listing is one of its own process,
by what `dmx ingest` reads a folder with, and beside it by sorting all entries in memory. The cost of a broken
image is the processor time of `dmx ingest` by how many of the images are broken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from synth import cpu_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
RESULTS = Path(__file__).parent / "results" / "listing.json"
COUNTS = (10_000, 100_000, 1_000_000, 10_000_000)
# A file of ext4 has at most 65,000 names.
LINKS = 50_000
PRIME = 15_485_863  # multiples of a number modulo it are in no order
IMAGES = 6_000
BROKEN = (0, 1, 60, 600)


def fill(folder: Path, count: int, image: bytes) -> None:
    """Make a folder of `count` names."""
    folder.mkdir()
    original = folder
    for number in range(count):
        if number % LINKS == 0:
            original = folder.parent / f"{folder.name}-{number}"
            original.write_bytes(image)
        os.link(original, folder / f"{number * 7919 % PRIME:08d}.jpg")


def list_folder(folder: Path, way: str) -> dict[str, Any]:
    """List a folder in this process; the seconds it takes and the memory that it adds."""
    from dmx.data.ingest import read_source
    from dmx.data.layouts import LAYOUTS, Options

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu, count, last = time.monotonic(), time.process_time(), 0, ""
    if way == "in runs":
        for item in read_source(LAYOUTS["crops"], folder, Options()):
            assert item.key > last
            count, last = count + 1, item.key
    else:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                count += not entry.is_dir()
    return {
        "images": count,
        "way": way,
        "s": round(time.monotonic() - start, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "memory_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10,
    }


def ingest_broken(folder: Path, broken: int, image: bytes) -> dict[str, Any]:
    """CPU seconds of an ingest of IMAGES images of which some are cut off in the middle."""
    from dmx.data.ingest import ingest

    source = folder / f"broken-{broken}"
    source.mkdir()
    every = IMAGES // broken if broken else IMAGES + 1
    for number in range(IMAGES):
        cut = number % every == 0 if broken else False
        (source / f"{number:06d}.jpg").write_bytes(image[: len(image) // 2] if cut else image)
    start = time.process_time()
    manifest = ingest(source, folder / f"set-{broken}", layout="crops", warn=lambda message: None)
    return {
        "images": IMAGES,
        "broken": broken,
        "left_out": manifest.skipped,
        "cpu_s": round(time.process_time() - start, 3),
    }


def main() -> int:
    """Measure, or be the process of one listing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print(json.dumps(list_folder(Path(arguments.list[0]), arguments.list[1])))
        return 0
    import tiny

    image = tiny.picture_of(1, 0, 0, 0)
    rows, costs = [], []
    with tempfile.TemporaryDirectory(prefix="dmx-listing-") as name:
        folder = Path(name)
        for count in arguments.counts:
            fill(folder / str(count), count, image)
            for way in ("in runs", "in memory"):
                command = [sys.executable, __file__, "--list", str(folder / str(count)), way]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows.append(json.loads(done.stdout))
                print(json.dumps(rows[-1]), flush=True)
        ingest_broken(folder / ".", 2, image)  # what is loaded once is not counted
        for broken in BROKEN:
            costs.append(ingest_broken(folder, broken, image))
            print(json.dumps(costs[-1]), flush=True)
    result = {
        "machine": {"processor": cpu_model(), "cores": os.cpu_count()},
        "date": date.today().isoformat(),
        "rows": rows,
        "broken": costs,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
