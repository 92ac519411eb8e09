"""Does a long run stay as it was? Training on tiny data, with memory and open files at the end of epochs.

    python benchmarks/soak.py                       # 300 epochs as one process, then 300 under Ray
    python benchmarks/soak.py --launchers inline --epochs 50

Rendered people are ingested, and `dmx train` is run on them with the demo's recipe, smaller, in a process of
its own: every epoch embeds, clusters, trains, tests on people of another style, and writes a checkpoint. When
the line of an epoch is in epochs.jsonl, memory, open files, threads and shared memory of the command and all
that it started are read. The first 10 epochs warm up: they have all stages of the method, and what is
allocated or compiled once. Over the others a line is fitted, and over those up to the 50th alone, for the
allocator takes a while to spread: the median of the slopes of all pairs of epochs, with its 95 % interval
(Theil, "A rank-invariant method", 1950; Sen, JASA 1968).

Fails where something grows over either: memory with the low end of the interval above 0.25 MiB an epoch, or
anything else by as much as one in ten epochs. Writes benchmarks/results/soak.json, where the run of
another launcher stays.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from processes import Usage, die_with_parent, disk_bytes, processor, usage
from scipy.stats import theilslopes

from dmx import __version__
from dmx.cores import cores
from dmx.demo import LABELLED_STYLE, UNLABELLED_STYLE, UNSEEN_STYLE
from dmx.train.runlog import EPOCHS
from dmx.writing import write_whole

RESULT = Path(__file__).parent / "results" / "soak.json"
LAUNCHERS = ("inline", "ray")
EPOCHS_READ, FEW, WARM_UP = 300, 50, 10
PEOPLE, IMAGES, HEIGHT = 16, 12, 64
SETTINGS = (
    "model.backbone_args={channels: [8, 8, 8, 8]}", f"data.height={HEIGHT}", f"data.width={HEIGHT // 2}",
    "batch.identities=4", "cluster.k1=8", "schedule.source_epochs=2", "schedule.stage_two_epoch=6",
    "schedule.steps_per_epoch=8", "schedule.milestones=[20, 40]", "schedule.evaluate_every=1",
)  # fmt: skip
POLL_S = 0.02
TIMEOUT_S = 3600.0
# What counts as growing, an epoch.
MOST_BYTES, MOST_THINGS = 2**18, 0.1
MEMORY, THINGS = ("held_bytes",), ("handles", "threads", "maps", "mapped_files", "processes")
# Written down before each was measured.
PREDICTION = {
    "growth": {"held_mib_an_epoch": 0.05, "handles": 0.0, "threads": 0.0, "maps": 0.0},
    "reason": "nothing is kept from epoch to epoch but the list of results, a kilobyte each; threads of the "
    "loader and of kernels come and go with an epoch. TensorBoard's file stays open from the start.",
    "ray": {"held_mib_an_epoch": 0.1},
    "ray_reason": "of epochs 11 to 300, after the worker had begun to decode in threads of its own and fifty "
    "epochs had been looked at (+0.2): the allocator spreads for a hundred epochs, and a few hundredths are "
    "those of Ray's processes that watch. With Ray Data it was +0.22, and +0.47 over the first fifty.",
}


def dmx(*words: str) -> None:
    """A command of DMX to its end."""
    done = subprocess.run([sys.executable, "-m", "dmx", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"dmx {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def worlds(folder: Path) -> list[str]:
    """Three small data sets; the options of `dmx train` that name them."""
    words = []
    for option, style, split in (
        ("--source", LABELLED_STYLE, "train"),
        ("--target", UNLABELLED_STYLE, "train"),
        ("--test", UNSEEN_STYLE, "test"),
    ):
        pictures, data = str(folder / f"{style}-images"), str(folder / style)
        people = ["--identities", str(PEOPLE), "--images", str(IMAGES), "--height", str(HEIGHT)]
        dmx("synth", pictures, "--style", style, *people, "--split", split)
        dmx("ingest", pictures, data, "--overwrite")  # of an earlier soak
        words += [option, data]
    return words


def train(
    data: list[str], run: Path, launcher: str, epochs: int, settings: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """What a run and all it started take at the end of every epoch; `settings` come after SETTINGS."""
    command = ["train", "--recipe", "demo", *data, "--run", str(run), "--launcher", launcher]
    for setting in (*SETTINGS, f"schedule.epochs={epochs}", *settings):
        command += ["--set", setting]
    rows: list[dict[str, Any]] = []
    log = run.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as out:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "dmx", *command], stdout=out, stderr=out, preexec_fn=die_with_parent
        )
        try:
            while process.poll() is None:
                if time.monotonic() - start > TIMEOUT_S:
                    raise SystemExit(f"{launcher}: waited {TIMEOUT_S:.0f} s for the end, in vain; see {log}")
                if ended(run) > len(rows):
                    found = usage(process.pid)
                    rows.append(row(found, len(rows) + 1, time.monotonic() - start, run))
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise SystemExit(f"{launcher}: ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    if len(rows) < epochs - 1:  # the last epoch may end together with the command
        raise SystemExit(f"{launcher}: wanted readings of {epochs} epochs, found {len(rows)}")
    return rows


def ended(run: Path) -> int:
    """Epochs that a run has told of."""
    path = run / EPOCHS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def row(found: Usage, epoch: int, seconds: float, run: Path) -> dict[str, Any]:
    """A reading as JSON."""
    return {"epoch": epoch, "seconds": round(seconds, 2), **found.tree(), "disk_bytes": disk_bytes(run)}


def slopes(rows: list[dict[str, Any]], warm_up: int) -> dict[str, dict[str, float]]:
    """Growth an epoch of everything that was read, after the warm-up: median and 95 % interval.

    Of the epochs with as many processes as most have.
    """
    late = [row for row in rows if row["epoch"] > warm_up]
    # Ray ends workers that are idle for ten minutes: what they held would hide what the others gain.
    usual = Counter(row["processes"] for row in late).most_common(1)[0][0]
    late = [row for row in late if row["processes"] == usual]
    epochs = [row["epoch"] for row in late]
    found = {}
    for name in late[0]:
        if name not in ("epoch", "seconds"):
            middle, _, low, high = theilslopes([row[name] for row in late], epochs)
            found[name] = {"slope": float(middle), "low": float(low), "high": float(high)}
    return found


def spans(rows: list[dict[str, Any]], warm_up: int) -> list[dict[str, Any]]:
    """Growth over the first FEW epochs after the warm-up, and over all."""
    last = rows[-1]["epoch"]
    return [
        {"first": warm_up + 1, "last": end, "slopes": slopes([r for r in rows if r["epoch"] <= end], warm_up)}
        for end in sorted({min(FEW, last), last})
    ]


def growing(found: dict[str, dict[str, float]]) -> list[str]:
    """What grows by more than it may, with certainty."""
    limits = dict.fromkeys(MEMORY, MOST_BYTES) | dict.fromkeys(THINGS, MOST_THINGS)
    return [
        f"{name} grows by {found[name]['slope']:.3g} an epoch (at least {found[name]['low']:.3g}), more than "
        f"{limit:.3g}"
        for name, limit in limits.items()
        if found[name]["low"] > limit
    ]


def kept(path: Path, result: dict[str, Any], anew: Sequence[str]) -> list[dict[str, Any]]:
    """The runs of an earlier result that are not made anew, if they were made in the same way."""
    if not path.exists():
        return []
    old, new = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(result))
    if any(old.get(name) != new[name] for name in ("settings", "epochs", "warm_up")):
        return []
    return [run for run in old["runs"] if run["launcher"] not in anew]


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    names = ("torch", "ray", "deepspeed", "numpy", "numba")
    return {
        "date": datetime.date.today().isoformat(), "cpu": processor(), "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {"dmx": __version__} | {name: importlib.metadata.version(name) for name in names},
    }  # fmt: skip


def main() -> None:
    """Train, read, fit, write; fails where something grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS_READ, help="(default: %(default)s)")
    parser.add_argument(
        "--warm-up", type=int, default=WARM_UP, metavar="E", help="epochs left out (default: %(default)s)"
    )
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS)
    parser.add_argument("--work", type=Path, help="keep data and runs here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.epochs < args.warm_up + 4:
        parser.error(f"--epochs: wanted at least 4 more than {args.warm_up} to warm up, found {args.epochs}")
    work = (args.work or Path(tempfile.mkdtemp(prefix="dmx-soak-"))).resolve()
    result: dict[str, Any] = {
        "environment": environment(), "prediction": PREDICTION, "settings": SETTINGS, "epochs": args.epochs,
        "warm_up": args.warm_up, "limits": {"bytes": MOST_BYTES, "things": MOST_THINGS}, "runs": [],
    }  # fmt: skip
    result["runs"] = kept(args.out, result, args.launchers)
    failed = []
    try:
        data = worlds(work)
        for launcher in args.launchers:
            run = work / f"run-{launcher}"
            shutil.rmtree(run, ignore_errors=True)
            load = round(os.getloadavg()[0], 2)
            rows = train(data, run, launcher, args.epochs)
            found = spans(rows, args.warm_up)
            result["runs"] += [{"launcher": launcher, "load": load, "spans": found, "rows": rows}]
            for span in found:
                where = f"{launcher}, epochs {span['first']} to {span['last']}"
                failed += [f"{where}: {told}" for told in growing(span["slopes"])]
                told = {name: round(span["slopes"][name]["slope"], 3) for name in (*MEMORY, *THINGS)}
                print(f"{where}: {json.dumps(told)}", flush=True)
            write_whole(args.out, json.dumps(result, indent=1) + "\n")
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
