"""The model card: what a model was trained on, how well it does, what it is for and what it is not for.

Everything in it is read from the run; what the run does not tell is said to be unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.config import Config, differences, from_tree
from dmx.data.manifest import MANIFEST_NAME, read_manifest
from dmx.data.transforms import MEAN, STD
from dmx.errors import DmxError
from dmx.model import EmbeddingModel

FRONT = """---
library_name: dmx
pipeline_tag: image-feature-extraction
tags:
- person-re-identification
- domain-generalisation
---
"""
METRICS = (("mAP", "map"), ("rank-1", "rank1"), ("rank-5", "rank5"), ("rank-10", "rank10"), ("mINP", "minp"))
# Sections whose settings say how a model was trained; where data lay on somebody's disk does not.
TOLD = ("compat", "seed", "model.", "augment.", "batch.", "cluster.", "schedule.", "optim.", "loss.")
USE = """## Intended use

Embeddings of cropped images of people, to be compared by their inner product: research on re-identification,
and linking the tracks of cameras whose operators have a legal basis for it and have told the people they see.

Re-identification is surveillance technology. Do not use the model to identify or follow people without their
knowledge and a legal basis, nor to decide about anybody by its similarities alone: it takes people who dress
alike for each other. Keep images and embeddings no longer than you must; embeddings of people are personal
data.

## Limits

Measured on the sets above and nowhere else: on other cameras, in other weather, of other groups of people it
may do worse. Measure it on images of your own first (`dmx evaluate`).
"""


def model_card(
    folder: Path, config: Config, model: EmbeddingModel, *, name: str, onnx: tuple[int, float] | None
) -> str:
    """The card of a model as Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        folder: of the checkpoint.
        config: that it was trained with.
        model: its network.
        name: of the model.
        onnx: opset of the ONNX file beside the card and its furthest difference from torch; None without one.
    """
    state = _state(folder)
    height, width = config.data.height, config.data.width
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        FRONT,
        f"# {name}",
        "",
        f"A person re-identification model, trained with DMX{_how(config)}.",
        "",
        "| | |",
        "|---|---|",
        f"| network | {config.model.backbone}, {parameters / 1e6:.1f} M parameters |",
        f"| input | {height} x {width} pixels (height x width), RGB |",
        f"| normalisation | pixels in [0, 1], less {list(MEAN)}, divided by {list(STD)} |",
        f"| embedding | {model.width} numbers, of unit length |",
    ]
    if onnx is not None:
        lines.append(f"| ONNX | opset {onnx[0]}, dynamic batch, within {onnx[1]:.1g} of torch |")
    lines += ["", "## Data", "", *_data(config), "", "## Results", "", *_results(state), "", USE]
    lines += ["## Training", "", *_training(state, config), ""]
    return "\n".join(lines)


def _how(config: Config) -> str:
    """The method, where the run tells it."""
    if config.data.source is None:
        return ""
    if config.data.target is None:
        return " on labelled images alone"
    if config.cluster.labels == "identities":
        return " by the method of DomainMix (BMVC 2021), with the identities of both sets"
    return " by the method of DomainMix (BMVC 2021)"


def _state(folder: Path) -> dict[str, Any]:
    """What the checkpoint tells of its run; nothing where it is an export itself."""
    file = folder / "state.json"
    if not file.exists():
        return {}
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return state


def _data(config: Config) -> list[str]:
    """What it was trained on, with the counts of sets that are ingested and still there."""
    lines = []
    labels = "with its identities" if config.cluster.labels == "identities" else "unlabelled"
    for role, path in (("source, labelled", config.data.source), (f"target, {labels}", config.data.target)):
        lines.append(f"- {role}: {_told_set(path)}" if path else f"- {role}: none")
    return lines if config.data.source else ["Not recorded: this was made from an export."]


def _told_set(path: str) -> str:
    """A data set's name, and how many images of how many people it holds."""
    name = Path(path).name
    if "://" in path or not (Path(path) / MANIFEST_NAME).exists():
        return name
    try:
        split = read_manifest(path)[0].splits["train"]
    except (DmxError, KeyError):  # it has changed since; its name is all that is known for certain
        return name
    people = f" of {split.identities:,} identities" if split.identities else ""
    return f"{name}, {split.images:,} images{people} by {split.cameras} cameras"


def _results(state: Mapping[str, Any]) -> list[str]:
    """Those of the last epoch that was tested."""
    tested = [epoch for epoch in state.get("epochs", []) if epoch.get("tests")]
    if not tested:
        return ["None recorded: no test set was given in training. Measure it with `dmx evaluate`."]
    last = tested[-1]
    lines = [f"| test set | {' | '.join(title for title, _ in METRICS)} | queries |"]
    lines.append(f"|---|{'---:|' * (len(METRICS) + 1)}")
    for name, found in last["tests"].items():
        values = " | ".join(f"{100 * found[key]:.1f}" for _, key in METRICS)
        lines.append(f"| {name} | {values} | {found['valid_queries']} |")
    return [
        *lines,
        "",
        f"In percent, after {last['epoch'] + 1} epochs; gallery images of the query's camera left out.",
    ]


def _training(state: Mapping[str, Any], config: Config) -> list[str]:
    """Steps, settings that differ from the defaults, versions."""
    if not state:
        return ["Not recorded: this was made from an export."]
    lines = [
        f"{state['global_step']:,} steps in {state['epoch']} epochs; settings unlike DMX's defaults:",
        "",
    ]
    changed = {
        setting: value
        for setting, (_, value) in differences(from_tree(), config).items()
        if setting.startswith(TOLD) and setting != "model.weights"
    }
    lines += [f"- `{setting}`: {json.dumps(value)}" for setting, value in changed.items()] or ["- none"]
    versions = ", ".join(f"{package} {version}" for package, version in state.get("versions", {}).items())
    return [*lines, "", f"Versions: {versions or 'not recorded'}."]
