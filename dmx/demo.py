"""The demo: which commands it runs, and the table it makes of their results."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx.config import from_tree, recipe
from dmx.errors import DmxError
from dmx.train.runlog import EPOCHS, read_lines
from dmx.writing import write_whole

RECIPE = "demo"
LABELLED_STYLE, UNLABELLED_STYLE, UNSEEN_STYLE = "street", "campus", "mall"
BASELINE, DOMAINMIX = "synthetic only", "DomainMix"
RUNS = {BASELINE: "synthetic-only", DOMAINMIX: "domainmix"}
TEST_SET = "unseen"
RESULT, SECONDS = "result.json", "seconds.json"


@dataclass(frozen=True)
class Set:
    """One rendered data set: so many people, seen by so many cameras, so many images of each."""

    name: str
    style: str
    people: int
    cameras: int
    images: int
    split: str = "train"


@dataclass(frozen=True)
class Demo:
    """What is rendered and for how long it is trained.

    Attributes:
        out: folder for data, runs and the result.
        seed: of people, cameras, weights and batches.
        scale: share of the people and of the steps; 1 is the demo whose numbers the README shows.
    """

    out: Path
    seed: int = 0
    scale: float = 1.0
    labelled: Set = Set("labelled", LABELLED_STYLE, people=100, cameras=6, images=16)
    unlabelled: Set = Set("unlabelled", UNLABELLED_STYLE, people=200, cameras=4, images=20)
    unseen: Set = Set(TEST_SET, UNSEEN_STYLE, people=100, cameras=6, images=12, split="test")

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise DmxError(f"--scale wants a share above 0 and at most 1, found {self.scale}")

    def people(self, full: int) -> int:
        """Number of people at this scale; a batch of the demo's recipe needs 16 of them."""
        return max(round(full * self.scale), 16)


def commands(demo: Demo) -> list[list[str]]:
    """The arguments of `dmx` for every command of the demo, in order."""
    out, height = demo.out, from_tree(recipe(RECIPE)).data.height
    sets = (demo.labelled, demo.unlabelled, demo.unseen)
    todo: list[list[object]] = [["synth", "--sheet", out / "styles.png", "--seed", demo.seed]]
    for each in sets:
        people = ["--style", each.style, "--identities", demo.people(each.people), "--images", each.images]
        scene = ["--cameras", each.cameras, "--split", each.split, "--height", height, "--seed", demo.seed]
        todo.append(["synth", out / "images" / each.name, *people, *scene])
    for each in sets:
        todo.append(["ingest", out / "images" / each.name, out / "data" / each.name])
    for name, folder in RUNS.items():
        data = ["--source", out / "data" / "labelled", "--test", out / "data" / TEST_SET]
        if name == DOMAINMIX:
            data += ["--target", out / "data" / "unlabelled"]
        todo.append(["train", "--recipe", RECIPE, *data, "--run", out / folder, *settings(demo)])
    return [[str(word) for word in words] for words in todo]


def settings(demo: Demo) -> list[str]:
    """What the runs of the demo add to its recipe."""
    chosen = {"seed": demo.seed}
    if demo.scale < 1:
        schedule = from_tree(recipe(RECIPE)).schedule
        chosen["schedule.steps_per_epoch"] = max(round(schedule.steps_per_epoch * demo.scale), 2)
    return [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]


def run_demo(demo: Demo) -> str:
    """Run what is not done yet; write result.json and result.md.

    Returns:
        The result as Markdown.

    Raises:
        DmxError: a command failed; its own message stands above.
    """
    demo.out.mkdir(parents=True, exist_ok=True)
    seconds = _measured(demo.out)
    for words in commands(demo):
        was_done = _is_done(demo, words)
        if was_done and (words[0] == "ingest" or "--sheet" in words):
            continue
        begin = time.monotonic()
        try:
            _run(words)
        finally:
            if not was_done:  # Also what was spent before an interruption; not the look at what is there.
                spent_s = seconds.get(_step(words), 0.0) + time.monotonic() - begin
                seconds[_step(words)] = round(spent_s, 1)
                write_whole(demo.out / SECONDS, json.dumps(seconds, indent=1) + "\n")
    result = _result(demo) | {"seconds": seconds, "total_seconds": round(sum(seconds.values()), 1)}
    text = as_markdown(result)
    write_whole(demo.out / RESULT, json.dumps(result, indent=1) + "\n")
    write_whole(demo.out / "result.md", text)
    return text


def _is_done(demo: Demo, words: list[str]) -> bool:
    """Whether a command has nothing left to do; `synth` and `train` find that out themselves too."""
    if words[0] == "train":
        return (Path(words[words.index("--run") + 1]) / RESULT).exists()
    if "--sheet" in words:
        return Path(words[words.index("--sheet") + 1]).exists()
    return (demo.out / "data" / Path(words[1]).name / "manifest.json").exists()  # Ingested, so rendered too.


def _step(words: list[str]) -> str:
    """The name of a command in the result: what it does, and the folder or file it makes."""
    option = {"train": "--run"}.get(words[0], "--sheet" if "--sheet" in words else "")
    made = words[words.index(option) + 1] if option else words[1]
    return f"{words[0]} {Path(made).name}"


def _measured(out: Path) -> dict[str, float]:
    """Seconds of the steps that were done before, by step."""
    if (out / SECONDS).exists():
        found: dict[str, float] = json.loads((out / SECONDS).read_text(encoding="utf-8"))
        return found
    return {}


def _run(words: list[str]) -> None:
    print(f"\n$ dmx {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "dmx", *words], check=False).returncode
    if status:
        raise DmxError(
            f"`dmx {shlex.join(words)}` ended with status {status}; what it says above tells why. "
            "Run the demo again to go on from there"
        )


def _result(demo: Demo) -> dict[str, Any]:
    """Final test results of both runs and the clusters of DomainMix by epoch."""
    models, epochs = {}, {}
    for name, folder in RUNS.items():
        final = json.loads((demo.out / folder / RESULT).read_text(encoding="utf-8"))
        models[name] = {"steps": final["steps"], **final["tests"][TEST_SET]}
        epochs[name] = read_lines(demo.out / folder / EPOCHS)
    return {
        "seed": demo.seed,
        "scale": demo.scale,
        "styles": {"labelled": LABELLED_STYLE, "unlabelled": UNLABELLED_STYLE, TEST_SET: UNSEEN_STYLE},
        "models": models,
        "clusters": [
            {"epoch": line["epoch"] + 1, "stage": line["stage"], **line["clusters"]}
            for line in epochs[DOMAINMIX]
            if "clusters" in line
        ],
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The result as two tables: models, and clusters by epoch."""
    styles = result["styles"]
    lines = [
        f"Tested on unseen cameras (style {styles[TEST_SET]}); labelled: {styles['labelled']}, "
        f"unlabelled: {styles['unlabelled']}; seed {result['seed']}",
        "",
        "| trained on | steps | mAP | rank-1 | mINP |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, model in result["models"].items():
        scores = " | ".join(f"{model[key]:.1%}" for key in ("map", "rank1", "minp"))
        lines.append(f"| {name} | {model['steps']} | {scores} |")
    lines += ["", "| epoch | clusters | images kept | purity |", "|---:|---:|---:|---:|"]
    for row in result["clusters"]:
        lines.append(
            f"| {row['epoch']} | {row['clusters']} | {row['kept_share']:.0%} | {row['purity']:.1%} |"
        )
    return "\n".join(lines) + "\n"
