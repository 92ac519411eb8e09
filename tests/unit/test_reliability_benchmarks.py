"""What the benchmarks of load and soak read of processes, fit and tell, of numbers that are known."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = ("load", "processes", "reliability_tables", "soak")
MIB = 2**20
# A child of a child holds what is to be found.
HOLDS = """
import mmap, os, sys, tempfile, threading, time
own = bytearray(b"x") * (64 << 20)
shared = tempfile.TemporaryFile(dir="/dev/shm")
shared.write(b"x" * (32 << 20))
shared.flush()
pieces = [mmap.mmap(shared.fileno(), 4096) for _ in range(300)]
for number in range(1000):  # of no file, apart by what is allowed with them
    pieces.append(mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ << number % 2))
files = [open(os.devnull) for _ in range(50)]
for _ in range(5):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""
STARTS = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS!r}])"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script of the benchmarks by its name, as they import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_the_size_of_a_folder_that_is_written_to(scripts: Any, tmp_path: Path) -> None:
    """A checkpoint loses its temporary name between being seen and being counted."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(bytes(10_000))
    (tmp_path / "lost").symlink_to("nowhere")  # as one that is gone when it is asked
    processes = scripts("processes")
    assert processes.disk_bytes(tmp_path) == (tmp_path / "kept" / "file").stat().st_blocks * 512 > 0
    assert processes.disk_bytes(tmp_path / "gone") == 0


def test_what_children_of_children_hold_is_found(scripts: Any) -> None:
    processes = scripts("processes")
    code = [sys.executable, "-c", STARTS]
    with subprocess.Popen(code, stdout=subprocess.PIPE, preexec_fn=processes.die_with_parent) as root:
        assert root.stdout is not None
        root.stdout.readline()
        found = processes.usage(root.pid)
        cpu = processes.cpu_seconds(root.pid)
        members = processes.family(root.pid)
        for member in reversed(members):
            subprocess.run(["kill", str(member)], check=True)
    assert found.processes == len(members) == len(cpu) == 2
    assert 64 * MIB < found.own_bytes < 100 * MIB
    assert 32 * MIB <= found.shared_bytes < 34 * MIB
    assert found.held_bytes == found.own_bytes + found.shared_bytes
    assert 64 * MIB < found.largest_bytes < 120 * MIB
    assert 51 <= found.handles - 300 < 80  # each of the pieces has one, too
    assert 300 < found.mapped_files < 1000
    assert found.maps > found.mapped_files + 1000
    assert found.threads == 7
    assert all(seconds >= 0 for seconds in cpu.values())
    assert processes.usage(root.pid) == processes.Usage()  # it has ended


def test_peaks_are_those_of_every_field(scripts: Any) -> None:
    usage = scripts("processes").Usage
    peak = usage(own_bytes=5, handles=1).raised_to(usage(own_bytes=3, handles=4, shared_bytes=2))
    assert (peak.own_bytes, peak.handles, peak.shared_bytes) == (5, 4, 2)


def readings(**growth: float) -> list[dict[str, Any]]:
    """Fifty epochs, wild at first and then growing by so much in each, with noise."""
    rng = np.random.default_rng(0)
    names = ("held_bytes", "handles", "threads", "maps", "mapped_files", "processes")
    rows = []
    for epoch in range(1, 51):
        row: dict[str, Any] = {"epoch": epoch, "seconds": 2.0 * epoch}
        for name in names:
            noise = rng.normal(0, MIB) if name == "held_bytes" else 0
            start = 500 * MIB * min(1, epoch / 8) if name == "held_bytes" else 20
            row[name] = int(start + growth.get(name, 0) * epoch + noise)
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("growth", "told"),
    [
        ({}, []),
        ({"held_bytes": MIB / 20}, []),
        ({"held_bytes": MIB / 2}, ["held_bytes grows by"]),
        ({"handles": 1, "threads": 0.5}, ["handles grows by 1 an epoch", "threads grows by 0.5"]),
        ({"maps": 0.05, "mapped_files": 0.05}, []),
        ({"maps": 0.5}, ["maps grows by 0.5"]),
    ],
)
def test_growth_is_told_from_noise_and_from_the_warm_up(
    scripts: Any, growth: dict[str, float], told: list[str]
) -> None:
    soak = scripts("soak")
    found = soak.growing(soak.slopes(readings(**growth), 10))
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True)), found


def test_a_process_that_ends_hides_no_growth(scripts: Any) -> None:
    soak, rows = scripts("soak"), readings(held_bytes=2 * MIB)
    for row in rows[40:]:
        row |= {"processes": 18, "held_bytes": row["held_bytes"] - 85 * MIB}
    assert soak.growing(soak.slopes(rows, 10))[0].startswith("held_bytes grows by")
    assert not soak.growing(soak.slopes(readings(held_bytes=MIB / 8), 10))


def test_growth_in_the_first_epochs_is_not_hidden_by_many_flat_ones(scripts: Any) -> None:
    soak = scripts("soak")
    rows = readings(held_bytes=MIB)
    rows += [rows[-1] | {"epoch": epoch} for epoch in range(51, 301)]
    few, all_of_them = soak.spans(rows, 10)
    assert (few["first"], few["last"], all_of_them["last"]) == (11, 50, 300)
    assert soak.growing(few["slopes"])[0].startswith("held_bytes grows by")
    assert not soak.growing(all_of_them["slopes"])


def test_pictures_of_one_identity_are_alike(scripts: Any) -> None:
    """Whatever block they are drawn with, and in every camera."""
    from dmx.data.images import decode

    load = scripts("load")
    drawn = dict(load.pictures(200, 0))
    assert len(drawn) == 200
    who, names = load.identities(200), sorted(drawn, key=lambda name: name.partition("-")[2])
    pixels = np.stack([decode(drawn[name]) for name in names]).astype(np.float32)
    assert pixels.shape[1:] == (32, 16, 3)
    assert {int(name[3:5]) for name in names} == set(range(8))
    apart = np.abs(pixels[:, None, ::4, ::4] - pixels[None, :, ::4, ::4]).mean((2, 3, 4))
    same = (who[:, None] == who) & ~np.eye(200, dtype=bool)
    assert apart[same].max() < apart[who[:, None] != who].min()


def a_row(step: str, images: int = 1000, seconds: float = 60.0, held: float = 2e9) -> dict[str, Any]:
    peak = {"held_bytes": held, "mapped_bytes": 3e8, "handles": 1234}
    row = {
        "images": images, "step": step, "attempts": 1, "seconds": seconds, "cpu_s": 90.4,
        "images_per_s": images / seconds, "load_before": 2.4, "load_after": 7.9, "peak": peak,
        "disk_bytes": 5e8,
    }  # fmt: skip
    return row | ({"found": {"clusters": 4321, "purity": 0.954}} if step == "cluster" else {})


def of_load(**changed: float) -> dict[str, Any]:
    steps = ("pictures", "ingest", "embed", "cluster")
    return {
        "environment": {"cores": 2, "cpu": "Z80", "memory_bytes": 24 * 2**30},
        "promised": {"images": 1000, "seconds": 200.0, "held_bytes": 8e9},
        "prediction": {"seconds": dict.fromkeys(steps, 50), "held_gb": dict.fromkeys(steps, 1.5)},
        "image": [32, 16], "images_an_identity": 20, "model": {"backbone_args": {"channels": [16, 128]}},
        "rows": [a_row(step, images, **changed) for images in (100, 1000) for step in steps],
    }  # fmt: skip


def test_the_table_of_the_load(scripts: Any) -> None:
    table = scripts("reliability_tables").reliability_load
    text = table(of_load())
    assert "| 1,000 | dmx embed | 60 | 50 | 90 | 17 | 2.00 | 1.5 | 0.30 | 1,234 | 0.50 |" in text
    assert "| 100 | dmx embed | 60 |  | 90 | 2 | 2.00 |  | 0.30 | 1,234 | 0.50 |" in text
    assert "pictures" not in text
    assert "Promised for 1,000 images: 3 minutes and 8 GB; kept with 3 minutes and 2.0 GB" in text
    assert "4,321 pseudo-identities with a purity of 95%" in text
    assert "load average 2 to 8." in text
    assert "NOT kept with 4 minutes" in table(of_load(seconds=70.0))
    assert "NOT kept with 3 minutes and 8.1 GB" in table(of_load(held=8.1e9))


def test_the_table_of_the_soak(scripts: Any) -> None:
    reliability_tables, soak = scripts("reliability_tables"), scripts("soak")
    rows = [
        row | {"held_bytes": (400 + row["epoch"]) * MIB, "shared_bytes": MIB} for row in readings(handles=1)
    ]
    result = {
        "runs": [{"launcher": "inline", "load": 2.6, "rows": rows, "spans": soak.spans(rows, 10)}],
        "warm_up": 10, "limits": {"bytes": MIB / 4, "things": 0.1},
        "environment": {"cores": 2, "cpu": "Z80", "gpu": None},
    }  # fmt: skip
    text = reliability_tables.reliability_soak(result)
    assert (
        "| inline | 11 to 50 | 411.0 | 450.0 | +1.000 (+1.000 to +1.000) | 31 to 70 | 20 to 20 "
        "| +0.00 | +0.00 | 1.0 to 1.0 |" in text
    )
    assert "no more than 0.25 MiB an epoch, and handles" in text
    assert "less than 0.1; NOT kept by inline over epochs 11 to 50." in text
    result["runs"][0]["spans"] = soak.spans(readings(held_bytes=MIB / 8), 10)
    assert "less than 0.1; kept." in reliability_tables.reliability_soak(result)
    assert "Load average 3 at the start; 2 cores of an Z80; no GPU." in text


def test_the_run_of_another_launcher_stays_if_it_was_made_alike(scripts: Any, tmp_path: Path) -> None:
    soak, path = scripts("soak"), tmp_path / "soak.json"
    made = {"settings": ("a=1",), "epochs": 50, "warm_up": 10}
    assert soak.kept(path, made, ["ray"]) == []
    path.write_text(json.dumps(made | {"runs": [{"launcher": "inline"}, {"launcher": "ray"}]}))
    assert soak.kept(path, made, ["ray"]) == [{"launcher": "inline"}]
    assert soak.kept(path, made | {"epochs": 60}, ["ray"]) == []
