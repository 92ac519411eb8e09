"""Does it work on cameras that nobody labelled? Ways of training on rendered worlds, by seeds and roles.

    python benchmarks/generalisation.py                          # the claim: four ways, three seeds
    python benchmarks/generalisation.py --ablation               # every switch of the method beside it
    python benchmarks/generalisation.py --setting gpu            # ResNet-50 at 256 x 128, for one GPU

A role is a style that is labelled, one that is not, and two that only test. All ways take equally many steps
of equally many images; what differs are the settings in WAYS and SWITCHES. A run that is finished is not
repeated: the folder of `--work` keeps it, and the same command goes on. The result is written after every
run, to benchmarks/results/generalisation.json (`--setting gpu`: generalisation_gpu.json).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synth import cpu_model

from dmx import __version__
from dmx.cores import cores
from dmx.train.runlog import EPOCHS, STEPS, read_lines

RESULTS = Path(__file__).parent / "results"
TIMEOUT_S = 4 * 3600


@dataclass(frozen=True)
class Role:
    """Which style is labelled, which is unlabelled, and which two are only tested on."""

    labelled: str
    unlabelled: str
    unseen: str
    second: str

    @property
    def name(self) -> str:
        return f"{self.labelled}-{self.unlabelled}"


# The first is the one of the claim; the others change places.
ROLES = (
    Role("street", "campus", "mall", "station"),
    Role("campus", "mall", "street", "station"),
    Role("mall", "street", "campus", "station"),
)

WAYS: dict[str, list[str]] = {
    "synthetic only": [],
    "pseudo-labels": ["loss.balance_weight=0"],
    "DomainMix": [],
    "true labels": ["cluster.labels=identities"],
}
WITHOUT_TARGET = "synthetic only"

# Each is DomainMix with these settings besides.
SWITCHES: dict[str, list[str]] = {
    "domains normalised apart": ["batch.norm_by_domain=true"],
    "cameras centred": ["cluster.centre_cameras=true"],
    "both": ["batch.norm_by_domain=true", "cluster.centre_cameras=true"],
    "both, without the game": [
        "batch.norm_by_domain=true",
        "cluster.centre_cameras=true",
        "loss.balance_weight=0",
    ],
    "true labels, domains apart": ["batch.norm_by_domain=true", "cluster.labels=identities"],
    "IBN-a": ["model.backbone=resnet18_ibn_a"],
}


@dataclass(frozen=True)
class Setting:
    """How large it is."""

    recipe: str
    settings: tuple[str, ...]
    height: int
    labelled_people: int
    unlabelled_people: int
    test_people: int
    result: str


SETTINGS = {
    "cpu": Setting("demo", (), 128, 100, 200, 100, "generalisation.json"),
    "gpu": Setting(
        "demo",
        ("model.backbone=resnet50", "model.backbone_args={}", "data.height=256", "data.width=128",
         "augment.pad=10", "schedule.steps_per_epoch=200", "data.workers=12"),
        256, 600, 600, 300, "generalisation_gpu.json",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run."""

    way: str
    settings: tuple[str, ...]
    role: Role
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.way.replace(' ', '-')}--{self.role.name}--{self.seed}"


def dmx(*words: object, cpus: set[int] | None = None) -> None:
    """Run a command of DMX on some of the cores; its words are shown when it fails."""
    shown = ["dmx", *map(str, words)]
    where = [] if cpus is None else ["taskset", "--cpu-list", ",".join(map(str, sorted(cpus)))]
    done = subprocess.run(
        [*where, sys.executable, "-m", *shown], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(shown)} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def worlds(setting: Setting, role: Role, seed: int, work: Path) -> dict[str, Path]:
    """The data sets of a role, rendered and ingested where they are not there yet."""
    sets = {
        "labelled": (role.labelled, setting.labelled_people, 6, 16, "train"),
        "unlabelled": (role.unlabelled, setting.unlabelled_people, 4, 20, "train"),
        "unseen": (role.unseen, setting.test_people, 6, 12, "test"),
        "second": (role.second, setting.test_people, 6, 12, "test"),
    }
    found = {}
    for name, (style, people, cameras, images, split) in sets.items():
        kind = "unseen" if split == "test" else name
        folder = work / "worlds" / f"{style}-{kind}-{seed}" / ("unseen" if name == "unseen" else name)
        if not (folder / "manifest.json").exists():
            pictures = folder.parent / "images"
            dmx("synth", pictures, "--style", style, "--identities", people, "--cameras", cameras, "--images",
                images, "--split", split, "--height", setting.height, "--seed", seed)  # fmt: skip
            dmx("ingest", pictures, folder)
        found[name] = folder
    return found


def train(run: Run, setting: Setting, work: Path, cpus: set[int]) -> dict[str, Any]:
    """One run, or what it left when it was done before."""
    folder = work / "runs" / run.folder
    sets = worlds(setting, run.role, run.seed, work)
    if not (folder / "result.json").exists():
        words: list[object] = ["train", "--recipe", setting.recipe, "--launcher", "inline", "--run", folder]
        words += ["--source", sets["labelled"], "--test", sets["unseen"], "--test", sets["second"]]
        if run.way != WITHOUT_TARGET:
            words += ["--target", sets["unlabelled"]]
        chosen = [*setting.settings, *run.settings, f"seed={run.seed}", f"schedule.evaluate_every={10**6}"]
        start = time.monotonic()
        dmx(*words, *(word for value in chosen for word in ("--set", value)), cpus=cpus)
        (folder / "seconds.json").write_text(json.dumps(time.monotonic() - start), encoding="utf-8")
    return told(run, folder)


def told(run: Run, folder: Path) -> dict[str, Any]:
    """What is kept of a finished run."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    epochs = [line for line in read_lines(folder / EPOCHS) if "clusters" in line]
    return {
        "way": run.way, "settings": list(run.settings), "seed": run.seed, "role": vars(run.role),
        "steps": result["steps"], "tests": result["tests"],
        "seconds": round(json.loads((folder / "seconds.json").read_text(encoding="utf-8"))),
        "clusters": [{"epoch": line["epoch"] + 1, **line["clusters"]} for line in epochs],
        "discriminator": discriminator(read_lines(folder / STEPS)),
    }  # fmt: skip


def discriminator(steps: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """By epoch: how often the discriminator is right, and the entropy that is left to it, in nats.

    The balance loss is log 2 less the entropy of what the discriminator says of the backbone's features.
    """
    seen: dict[int, dict[str, list[float]]] = {}
    for line in steps:
        for name in ("domain_accuracy", "balance"):
            if name in line:
                seen.setdefault(line["epoch"] + 1, {}).setdefault(name, []).append(line[name])
    return [
        {"epoch": epoch, **{name: sum(values) / len(values) for name, values in by_name.items()}}
        for epoch, by_name in sorted(seen.items())
    ]


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs, those of the claim first."""
    ways = {name: WAYS[name] for name in (args.ways or WAYS)}
    runs = [
        Run(way, tuple(settings), role, seed)
        for role in ROLES[: args.roles]
        for seed in args.seeds
        for way, settings in ways.items()
    ]
    if args.ablation:
        runs += [
            Run(switch, tuple(settings), ROLES[0], seed)
            for seed in args.seeds
            for switch, settings in SWITCHES.items()
        ]
    return runs


def main() -> None:
    """Run what is not done yet, and write the result after every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--roles", type=int, default=len(ROLES), help="how many of the roles (default: all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="only these (default: all)")
    parser.add_argument("--ablation", action="store_true", help="every switch besides")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side, with a share of the cores each"
    )
    parser.add_argument("--work", type=Path, default=Path("generalisation"), help="data sets and runs")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    runs = plan(args)
    for role, seed in {(run.role, run.seed): None for run in runs}:
        worlds(setting, role, seed, args.work)
    shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    own = sorted(os.sched_getaffinity(0))
    for job in range(args.jobs):
        shares.put(set(own[job :: args.jobs]))
    rows: dict[Run, dict[str, Any]] = {}
    writing = threading.Lock()

    def one(run: Run) -> None:
        cpus = shares.get()
        try:
            found = train(run, setting, args.work, cpus)
        finally:
            shares.put(cpus)
        with writing:
            rows[run] = found
            print(
                run.folder, {name: round(100 * m["map"], 1) for name, m in found["tests"].items()}, flush=True
            )
            write(setting, [rows[each] for each in runs if each in rows])

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, runs))


def write(setting: Setting, rows: list[dict[str, Any]]) -> None:
    """Write the result."""
    result = {
        "cpu": cpu_model(),
        "cores": cores(),
        "dmx": __version__,
        "setting": vars(setting),
        "runs": rows,
    }
    path = RESULTS / setting.result
    path.write_text(json.dumps(result, indent=1, default=list) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
