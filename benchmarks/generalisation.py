"""Does it work on cameras that nobody labelled? Ways of training on rendered worlds, by seeds and roles.

    python benchmarks/generalisation.py                          # the claim: four ways, three seeds
    python benchmarks/generalisation.py --ablation               # every switch of the method beside it
    python benchmarks/generalisation.py --setting gpu            # ResNet-50 at 256 x 128, for one GPU
    python benchmarks/generalisation.py --setting trial          # whether it runs; its numbers mean nothing

A role is a style that is labelled, one that is not, and two that only test. All ways take equally many steps
of equally many images; what differs are the settings in WAYS and SWITCHES. A run that is finished is not
repeated: the folder of `--work` keeps it, and the same command goes on. After every run its row takes the
place of the one before in benchmarks/results/generalisation.json (`--setting gpu`: generalisation_gpu.json).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
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
    "IBN-a": ["model.backbone={backbone}_ibn_a"],
}


@dataclass(frozen=True)
class Setting:
    """How large it is: the demo's recipe with these settings, and so many people in each set."""

    backbone: str
    settings: tuple[str, ...]
    height: int
    labelled_people: int
    unlabelled_people: int
    test_people: int
    result: str


SETTINGS = {
    "cpu": Setting("resnet18", (), 128, 100, 200, 100, "generalisation.json"),
    "gpu": Setting(
        "resnet50",
        ("model.backbone=resnet50", "model.backbone_args={}", "data.height=256", "data.width=128",
         "augment.pad=10", "schedule.steps_per_epoch=200", "data.workers=12"),
        256, 600, 600, 300, "generalisation_gpu.json",
    ),
    "trial": Setting(
        "resnet18",
        ("model.backbone_args={channels: [8, 8, 8, 8]}", "data.height=64", "data.width=32",
         "batch.identities=4", "schedule.steps_per_epoch=4", "schedule.epochs=3",
         "schedule.source_epochs=1", "schedule.stage_two_epoch=2"),
        64, 16, 16, 8, "generalisation_trial.json",
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
    words: list[object] = ["train", "--recipe", "demo", "--launcher", "inline", "--run", folder]
    words += ["--source", sets["labelled"], "--test", sets["unseen"], "--test", sets["second"]]
    if run.way != WITHOUT_TARGET:
        words += ["--target", sets["unlabelled"]]
    own = [each.format(backbone=setting.backbone) if "{backbone}" in each else each for each in run.settings]
    chosen = [*setting.settings, *own, f"seed={run.seed}", f"schedule.evaluate_every={10**6}"]
    # It goes on with an interrupted run, says so of a finished one, and refuses one of other settings.
    dmx(*words, *(word for value in chosen for word in ("--set", value)), cpus=cpus)
    return told(run, folder)


def told(run: Run, folder: Path) -> dict[str, Any]:
    """What is kept of a finished run."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    epochs = read_lines(folder / EPOCHS)
    clustered = [line for line in epochs if "clusters" in line]
    seconds = sum(value for line in epochs for name, value in line.items() if name.endswith("_s"))
    return {
        "way": run.way, "settings": list(run.settings), "seed": run.seed, "role": vars(run.role),
        "steps": result["steps"], "tests": result["tests"],
        "seconds": round(seconds),
        "clusters": [{"epoch": line["epoch"] + 1, **line["clusters"]} for line in clustered],
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
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON that is written")
    args = parser.parse_args()
    own = sorted(os.sched_getaffinity(0))
    if not 1 <= args.jobs <= len(own):
        parser.error(f"--jobs: wanted 1 to {len(own)}, as many as there are cores, found {args.jobs}")
    if not 1 <= args.roles <= len(ROLES):
        parser.error(f"--roles: wanted 1 to {len(ROLES)}, found {args.roles}")
    setting = SETTINGS[args.setting]
    work = args.work.resolve() / args.setting
    runs = plan(args)
    for role, seed in {(run.role, run.seed): None for run in runs}:
        worlds(setting, role, seed, work)
    shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for job in range(args.jobs):
        shares.put(set(own[job :: args.jobs]))
    writing = threading.Lock()

    def do(run: Run) -> None:
        """One run, on a share of the cores."""
        cpus = shares.get()
        try:
            found = train(run, setting, work, cpus)
        finally:
            shares.put(cpus)
        with writing:
            maps = {name: round(100 * measured["map"], 1) for name, measured in found["tests"].items()}
            print(run.folder, maps, flush=True)
            record(found, setting, args.results / setting.result)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(do, runs))


def record(row: dict[str, Any], setting: Setting, path: Path) -> None:
    """Put a row in the place of the same run's."""

    def key(each: dict[str, Any]) -> tuple[str, str, int]:
        return each["way"], each["role"]["labelled"], each["seed"]

    rows = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    rows = sorted([*(old for old in rows if key(old) != key(row)), row], key=key)
    machine = {"cpu": cpu_model(), "cores": cores(), "dmx": __version__}
    result = machine | {"setting": vars(setting), "runs": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
