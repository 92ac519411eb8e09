"""The folder of an exported model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors.torch import save_file

from dmx.config import Config, to_tree
from dmx.deployment import OPSET
from dmx.deployment.card import model_card
from dmx.deployment.onnx import write_onnx
from dmx.train.checkpoint import BEST, LATEST, MODEL, checkpoint_folder, load_model

# What builds the network and its input; where the run's data lay is nobody else's business.
NEEDED = {
    "model": ("backbone", "backbone_args", "last_stride", "discriminator_widths"),
    "data": ("height", "width"),
}


def export_model(
    checkpoint: Path, out: Path, *, formats: Sequence[str], opset: int = OPSET, name: str | None = None,
    best: bool = False,
) -> list[str]:  # fmt: skip
    """Write a model into a folder, which is there whole or not at all.

    Args:
        checkpoint: run or checkpoint folder.
        out: folder to make; may be there, but empty.
        formats: of `safetensors` and `onnx`.
        opset: version of ONNX's operators.
        name: of the model in its card; None takes the run folder's.
        best: take a run's best checkpoint instead of its last.

    Returns:
        A line for each file.

    Raises:
        DmxError: there is no model, or it cannot be expressed in a format.
    """
    folder = checkpoint_folder(checkpoint, BEST if best else LATEST)
    model, config = load_model(folder)
    height, width = config.data.height, config.data.width
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    told = []
    try:
        furthest = None
        if "safetensors" in formats:
            weights = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(weights, temporary / f"{MODEL}.safetensors", metadata={"format": "pt"})
            text = yaml.safe_dump(_needed(config), sort_keys=False)
            (temporary / "config.yaml").write_text(text, encoding="utf-8")
            told.append(f"{out / f'{MODEL}.safetensors'}: {len(weights)} tensors, D = {model.width}")
        if "onnx" in formats:
            furthest = write_onnx(model, height, width, temporary / f"{MODEL}.onnx", opset)
            told.append(
                f"{out / f'{MODEL}.onnx'}: opset {opset}, (batch, 3, {height}, {width}) to "
                f"(batch, {model.width}), within {furthest:.1g} of torch"
            )
        onnx = None if furthest is None else (opset, furthest)
        card = model_card(folder, config, model, name=name or _name_of(checkpoint), onnx=onnx)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        told.append(f"{out / 'README.md'}: the model card")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return told


def _needed(config: Config) -> dict[str, dict[str, object]]:
    tree = to_tree(config)
    return {section: {name: tree[section][name] for name in names} for section, names in NEEDED.items()}


def _name_of(checkpoint: Path) -> str:
    """The run's name, also where one of its checkpoints was given."""
    path = checkpoint.absolute()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name
