"""Does it work on cameras that nobody labelled? Ways of training on rendered worlds, by seeds and roles.

    python benchmarks/generalisation.py                          # the claim: four ways, three seeds
    python benchmarks/generalisation.py --switches               # every switch of the method beside it
    python benchmarks/generalisation.py --roles 2 --ways --switches IBN-a      # one of them in another role
    python benchmarks/generalisation.py --setting ibn            # IBN-a in the backbone, a lighter game
    python benchmarks/generalisation.py --setting scattered      # a person is before two of the cameras
    python benchmarks/generalisation.py --setting gpu            # ResNet-50 at 256 x 128, for one GPU
    python benchmarks/generalisation.py --setting trial          # whether it runs; its numbers mean nothing

A role is a style that is labelled, one that is not, and two that only test. All ways take equally many steps
of equally many images, by the recipe `demo` with the settings in ADDED; what differs are those in WAYS and
SWITCHES, and that without a target there is no stage two, in which identities weigh less. A seed is that of
people, cameras, weights and batches.

DomainMix runs first, and the others of its role and seed branch off where they begin to differ from it, which
gives to the bit what they would be if trained from the start (tests/integration/test_branch.py).

A run that is finished is not repeated: the folder of `--work` keeps it, and the same command goes on. After
every run its row takes the place of the one before in benchmarks/results/generalisation.json (other settings:
generalisation_gpu.json and so on).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generalisation_tables import BOUND, METHOD, WITHOUT
from synth import cpu_model

from dmx.config import differences, from_tree, overrides, recipe
from dmx.cores import cores
from dmx.demo import LABELLED_STYLE, RECIPE, UNLABELLED_STYLE, UNSEEN_STYLE, Demo
from dmx.train.runlog import EPOCHS, STEPS, read_lines
from dmx.train.worker import RESULT
from dmx.writing import write_whole

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
    Role(LABELLED_STYLE, UNLABELLED_STYLE, UNSEEN_STYLE, "station"),
    Role("campus", "mall", "street", "station"),
    Role("mall", "street", "campus", "station"),
)

WAYS: dict[str, list[str]] = {
    WITHOUT: [],
    "pseudo-labels": ["loss.balance_weight=0"],
    METHOD: [],
    BOUND: ["cluster.labels=identities"],
}

# What changes, in which of the ways.
PLAIN = "no switch"
OFF = [
    "batch.norm_by_domain=false", "cluster.centre_cameras=false", "cluster.same_camera_share=1",
    "cluster.k1=20",
]  # fmt: skip
SWITCHES: dict[str, tuple[str, list[str]]] = {
    PLAIN: (METHOD, OFF),
    "no switch, without the game": ("pseudo-labels", OFF),
    "domains together": (METHOD, ["batch.norm_by_domain=false"]),
    "cameras as they are": (METHOD, ["cluster.centre_cameras=false"]),
    "neighbours of any camera": (METHOD, ["cluster.same_camera_share=1"]),
    "more neighbours, of any camera": (METHOD, ["cluster.same_camera_share=1", "cluster.k1=20"]),
    "every cluster": (METHOD, ["cluster.eps_gap=0"]),
    "true labels, domains together": (BOUND, ["batch.norm_by_domain=false"]),
    "synthetic only, identities weigh 1": (WITHOUT, ["loss.identity_weight_stage_one=1"]),
    "identities weigh 1 throughout": (METHOD, ["loss.identity_weight_stage_one=1"]),
    "identities weigh 10 throughout": (METHOD, ["loss.identity_weight_stage_two=10"]),
    "IBN-a": (METHOD, ["model.backbone={backbone}_ibn_a"]),
    "discriminator in every 3rd step": (METHOD, ["schedule.discriminator_every=3"]),
    "balance loss times three": (METHOD, ["loss.balance_weight=3"]),
    "balance loss times 0.3": (METHOD, ["loss.balance_weight=0.3"]),
    "a quarter of the batch labelled": (METHOD, ["batch.source_share=0.25"]),
    "radius of the paper": (METHOD, ["cluster.k1=30", "cluster.eps=0.6"]),
}

# Settings that make no difference before stage two, and those that make none before the target is clustered.
OF_STAGE_TWO = (
    "loss.balance_weight", "loss.identity_weight_stage_two", "schedule.discriminator_every",
)  # fmt: skip
OF_THE_TARGET = ("data.target", "cluster.", "batch.norm_by_domain", "batch.source_share")


@dataclass(frozen=True)
class Setting:
    """How large it is: the demo's recipe with these settings, and so many people in each set.

    Cameras, and images of a person, are as many as in the demo; `unlabelled_seen_by` is how many of the
    cameras see a person of the unlabelled set, all of them where it is None.
    """

    backbone: str
    settings: tuple[str, ...]
    height: int
    labelled_people: int
    unlabelled_people: int
    test_people: int
    result: str
    unlabelled_seen_by: int | None = None


# What every run adds to the demo's recipe, which has to be done in a quarter of an hour: a third more time.
ADDED = ("schedule.epochs=16", "schedule.stage_two_epoch=12", "schedule.milestones=[12, 15]")

SETTINGS = {
    "cpu": Setting(
        "resnet18", ADDED, 128, Demo.labelled.people, Demo.unlabelled.people, Demo.unseen.people,
        "generalisation.json",
    ),
    "ibn": Setting(
        "resnet18", (*ADDED, "model.backbone=resnet18_ibn_a", "loss.balance_weight=0.3"), 128,
        Demo.labelled.people, Demo.unlabelled.people, Demo.unseen.people, "generalisation_ibn.json",
    ),
    "scattered": Setting(
        "resnet18", ADDED, 128, Demo.labelled.people, Demo.unlabelled.people, Demo.unseen.people,
        "generalisation_scattered.json", 2,
    ),
    "gpu": Setting(
        "resnet50",
        (*ADDED, "model.backbone=resnet50", "model.backbone_args={}", "data.height=256", "data.width=128",
         "augment.pad=10", "schedule.steps_per_epoch=200", "data.workers=12"),
        256, 600, 600, 300, "generalisation_gpu.json",
    ),
    "trial": Setting(
        "resnet18",
        (*ADDED, "model.backbone_args={channels: [8, 8, 8, 8]}", "data.height=64", "data.width=32",
         "batch.identities=4", "schedule.steps_per_epoch=4", "schedule.epochs=3",
         "schedule.source_epochs=1", "schedule.stage_two_epoch=2"),
        64, 16, 16, 8, "generalisation_trial.json",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run: a way, or a switch in its way `base`."""

    way: str
    base: str
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
        "labelled": (role.labelled, Demo.labelled, setting.labelled_people),
        "unlabelled": (role.unlabelled, Demo.unlabelled, setting.unlabelled_people),
        "unseen": (role.unseen, Demo.unseen, setting.test_people),
        "second": (role.second, Demo.unseen, setting.test_people),
    }
    found = {}
    for name, (style, like, people) in sets.items():
        folder = work / "worlds" / f"{style}-{like.name}-{seed}" / name
        pictures = folder.parent / "images"
        # It renders what is missing, and refuses a folder that was rendered with other sizes.
        size = ["--identities", people, "--cameras", like.cameras, "--images", like.images]
        if name == "unlabelled" and setting.unlabelled_seen_by is not None:
            size += ["--cameras-per-identity", setting.unlabelled_seen_by]
        seen = ["--split", like.split, "--height", setting.height, "--seed", seed]
        dmx("synth", pictures, "--style", style, *size, *seen)
        if not (folder / "manifest.json").exists():
            dmx("ingest", pictures, folder)
        found[name] = folder
    return found


def train(
    run: Run, setting: Setting, sets: dict[str, Path], work: Path, cpus: set[int], jobs: int
) -> dict[str, Any]:
    """One run, or what it left when it was done before."""
    folder = work / "runs" / run.folder
    words: list[object] = ["train", "--recipe", RECIPE, "--launcher", "inline", "--run", folder]
    words += ["--source", sets["labelled"], "--test", sets["unseen"], "--test", sets["second"]]
    chosen = [*setting.settings, *run.settings, f"seed={run.seed}", f"schedule.evaluate_every={10**6}"]
    chosen += [f"data.target={'null' if run.base == WITHOUT else sets['unlabelled']}"]
    chosen += [f"schedule.keep_checkpoints={10**6 if run.way == METHOD else 1}"]
    trunk = work / "runs" / Run(METHOD, METHOD, (), run.role, run.seed).folder
    shared = shared_epochs(run, setting)
    if run.way != METHOD and shared and (trunk / RESULT).exists():
        words += ["--branch", trunk, "--after", shared]
    # It goes on with an interrupted run, says so of a finished one, and refuses one of other settings.
    dmx(*words, *(word for value in chosen for word in ("--set", value)), cpus=cpus)
    machine = folder / "machine.json"
    if not machine.exists():
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        found = {"cpu": cpu_model(), "cores": cores(), "gpu": gpu, "jobs": jobs}
        write_whole(machine, json.dumps(found))
    row = told(run, folder)
    return row | {"machine": json.loads(machine.read_text(encoding="utf-8")), "recipe": digest(setting)}


def shared_epochs(run: Run, setting: Setting) -> int:
    """Epochs that a run has in common with DomainMix: until a setting that differs makes a difference."""
    target = [f"data.target={'null' if run.base == WITHOUT else 'x'}"]
    own, trunk = (
        from_tree(recipe(RECIPE), overrides([*setting.settings, *words]))
        for words in ([*run.settings, *target], ["data.target=x"])
    )
    changed = differences(trunk, own)
    if all(name in OF_STAGE_TWO for name in changed):
        return trunk.schedule.stage_two_epoch
    if all(name.startswith((*OF_STAGE_TWO, *OF_THE_TARGET)) for name in changed):
        return trunk.schedule.source_epochs
    return 0


def digest(setting: Setting) -> str:
    """Of what all runs share, so that rows of different recipes are not taken for each other's."""
    sizes = {name: value for name, value in vars(setting).items() if name not in ("settings", "result")}
    # Only what differs from the defaults: a setting that DMX gains or loses makes no other recipe.
    chosen = differences(from_tree(), from_tree(recipe(RECIPE), overrides([*setting.settings])))
    shared = [{name: value for name, (_, value) in chosen.items()}, sizes]
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def told(run: Run, folder: Path) -> dict[str, Any]:
    """What is kept of a finished run."""
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    epochs = read_lines(folder / EPOCHS)
    clustered = [line for line in epochs if "clusters" in line]
    seconds = sum(value for line in epochs for name, value in line.items() if name.endswith("_s"))
    return {
        "way": run.way, "base": run.base, "settings": list(run.settings),
        "seed": run.seed, "role": vars(run.role),
        "steps": result["steps"], "tests": result["tests"],
        "seconds": round(seconds),
        "clusters": [{"epoch": line["epoch"] + 1, **line["clusters"]} for line in clustered],
        "discriminator": discriminator(read_lines(folder / STEPS)),
    }  # fmt: skip


def discriminator(steps: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """By epoch: how often the discriminator is right, and the balance loss.

    That is log 2 less the entropy, in nats, of what the discriminator says of the backbone's features.
    """
    seen: dict[int, dict[str, list[float]]] = {}
    for line in steps:
        for name in ("domain_accuracy", "balance"):
            if name in line:
                seen.setdefault(line["epoch"] + 1, {}).setdefault(name, []).append(line[name])
    return [
        {"epoch": epoch, **{name: statistics.mean(values) for name, values in by_name.items()}}
        for epoch, by_name in sorted(seen.items())
    ]


def names(choices: Iterable[str]) -> str:
    """As they have to be written."""
    return ", ".join(f'"{name}"' if " " in name else name for name in choices)


def plan(args: argparse.Namespace, setting: Setting) -> list[Run]:
    """All runs: DomainMix before those that branch off from it, the ways of the claim before switches."""
    roles = [ROLES[number - 1] for number in args.roles]
    runs = [
        Run(way, way, tuple(WAYS[way]), role, seed)
        for role in roles
        for seed in args.seeds
        for way in args.ways
    ]
    for seed in args.seeds:
        for switch in args.switches:
            base, changed = SWITCHES[switch]
            settings = (each.replace("{backbone}", setting.backbone) for each in [*WAYS[base], *changed])
            runs.append(Run(switch, base, tuple(settings), roles[0], seed))
    return sorted(runs, key=lambda run: run.way != METHOD)


def main() -> None:
    """Run what is not done yet, and write the result after every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument(
        "--roles",
        type=int,
        nargs="+",
        choices=range(1, len(ROLES) + 1),
        default=range(1, len(ROLES) + 1),
        metavar="ROLE",
        help=f"only these of the roles 1 to {len(ROLES)}",
    )
    parser.add_argument(
        "--ways", nargs="*", choices=WAYS, default=WAYS, metavar="WAY", help=f"only these of {names(WAYS)}"
    )
    parser.add_argument(
        "--switches",
        nargs="*",
        choices=SWITCHES,
        default=(),
        metavar="SWITCH",
        help=f"these besides, in the first of the roles; without a name all: {names(SWITCHES)}",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side, with a share of the cores each"
    )
    parser.add_argument("--work", type=Path, default=Path("generalisation"), help="data sets and runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON that is written")
    args = parser.parse_args()
    args.switches = SWITCHES if args.switches == [] else args.switches
    own = sorted(os.sched_getaffinity(0))
    if not 1 <= args.jobs <= len(own):
        parser.error(f"--jobs: wanted 1 to {len(own)}, as many as there are cores, found {args.jobs}")
    args.results.mkdir(parents=True, exist_ok=True)  # now, and not after the first run
    setting = SETTINGS[args.setting]
    work = args.work.resolve() / args.setting
    runs = plan(args, setting)
    asked = {(run.role, run.seed): None for run in runs}
    sets = {(role, seed): worlds(setting, role, seed, work) for role, seed in asked}
    shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for job in range(args.jobs):
        shares.put(set(own[job :: args.jobs]))

    def do(run: Run, trunk: Future[None] | None) -> None:
        """One run on a share of the cores, once the run is done that it may branch off from."""
        if trunk is not None:
            trunk.result()
        cpus = shares.get()
        try:
            found = train(run, setting, sets[run.role, run.seed], work, cpus, args.jobs)
        finally:
            shares.put(cpus)
        maps = {name: round(100 * measured["map"], 1) for name, measured in found["tests"].items()}
        print(run.folder, maps, flush=True)
        record(found, setting, args.results / setting.result)

    with ThreadPoolExecutor(args.jobs) as pool:
        trunks: dict[tuple[Role, int], Future[None]] = {}
        futures = []
        for run in runs:
            futures.append(pool.submit(do, run, trunks.get((run.role, run.seed))))
            if run.way == METHOD:
                trunks[run.role, run.seed] = futures[-1]
        for future in futures:
            future.result()


def record(row: dict[str, Any], setting: Setting, path: Path) -> None:
    """Put a row in the place of the same run's, whoever else writes there."""

    def key(each: dict[str, Any]) -> tuple[str, str, int]:
        return each["way"], each["role"]["labelled"], each["seed"]

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        rows = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        rows = sorted([*(old for old in rows if key(old) != key(row)), row], key=key)
        result = {"setting": vars(setting), "claim": ROLES[0].labelled, "runs": rows}
        write_whole(path, json.dumps(result, indent=1) + "\n")
    finally:
        os.close(folder)  # unlocks it, too


if __name__ == "__main__":
    main()
