"""Export a trained model for use elsewhere: safetensors, ONNX and a model card, in one folder.

CHECKPOINT is a run folder of dmx train (its last checkpoint is taken), or one checkpoint's folder. OUT gets

  model.safetensors, config.yaml   weights, and what builds the network; dmx.load and all commands of DMX that
                                   take a model take OUT, too
  model.onnx                       images (batch, 3, height, width) float32 of RGB pixels in [0, 1], less
                                   ImageNet's mean and divided by its deviation; to embeddings (batch, D)
                                   float32, rows of unit length. The batch is dynamic. It is written once
                                   onnxruntime computes with it what torch does, within 1e-4.
  README.md                        the model card: data, results, intended use

  dmx export runs/first export/first
  dmx export runs/first export/first --formats safetensors --name "street to campus"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dmx.commands.sources import add_best_argument
from dmx.deployment import FORMATS, OPSET
from dmx.errors import DmxError

SUMMARY = "export a trained model: safetensors, ONNX and a model card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="run or checkpoint folder, or a name on the hub"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not hold an export yet")
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=FORMATS, help="what to write (default: both)"
    )
    parser.add_argument("--opset", type=int, default=OPSET, help="of ONNX's operators (default: %(default)s)")
    parser.add_argument("--name", help="of the model, in its card (default: the run folder's)")
    add_best_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Export, and say what was written."""
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise DmxError(
            f"{args.out}: wanted a new or empty folder to export to, found "
            f"{'files in it' if args.out.is_dir() else 'a file'}; choose another"
        )

    from dmx.deployment.folder import export_model
    from dmx.deployment.onnx import require_packages
    from dmx.writing import writing

    if "onnx" in args.formats:
        require_packages()
    with writing(args.out, "the export", stays="nothing of it is left"):
        told = export_model(
            args.checkpoint,
            args.out,
            formats=tuple(args.formats),
            opset=args.opset,
            name=args.name,
            best=args.best,
        )
    print("\n".join(told))
    return 0
