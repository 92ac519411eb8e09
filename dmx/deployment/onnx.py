"""A model as ONNX, run by onnxruntime before anybody else runs it."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmx.deployment import OPSET
from dmx.errors import DmxError
from dmx.model import EmbeddingModel, Retrieval

INPUT, OUTPUT = "images", "embeddings"
TOLERANCE = 1e-4
BATCHES = (1, 2, 5)  # the exported one and others, since the batch is dynamic
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Raises DmxError when what ONNX needs is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DmxError(
            f'ONNX wants {", ".join(PACKAGES)}, found no {", ".join(missing)}: pip install "dmx[export]", or '
            "export with --formats safetensors"
        )


def write_onnx(model: EmbeddingModel, height: int, width: int, path: Path, opset: int = OPSET) -> float:
    """Write a model as ONNX with a dynamic batch, once onnxruntime computes with it what torch does.

    Args:
        model: in evaluation mode, on the CPU.
        height, width: of its input, pixels.
        path: file to write; stays away when the results differ.
        opset: version of ONNX's operators.

    Returns:
        The largest difference from torch's embeddings that was seen, at most `TOLERANCE`.

    Raises:
        DmxError: packages are missing, the model cannot be expressed, or the results differ.
    """
    require_packages()
    retrieval = Retrieval(model)
    example = _images(2, height, width)
    temporary = path.with_name(f".{path.name}")
    try:
        with warnings.catch_warnings():
            # Its own deprecations; what matters is checked below.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                retrieval, (example,), dynamo=True, opset_version=opset, verbose=False, input_names=[INPUT],
                output_names=[OUTPUT], dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            )  # fmt: skip
            assert program is not None
            program.save(temporary, external_data=False)
        _require_opset(temporary, path, opset)
        furthest = _difference(retrieval, temporary, height, width)
        if not furthest <= TOLERANCE:
            raise DmxError(
                f"{path}: wanted onnxruntime's embeddings within {TOLERANCE} of torch's, found "
                f"{furthest:.2g}, so nothing was written: try another --opset"
            )
        temporary.replace(path)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise DmxError(f"{path}: this model cannot be exported at opset {opset}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return furthest


def _require_opset(written: Path, path: Path, opset: int) -> None:
    """What torch cannot convert to an older version it leaves at the one it makes, and says nothing."""
    import onnx

    (found,) = (each.version for each in onnx.load(written).opset_import if each.domain in ("", "ai.onnx"))
    if found != opset:
        raise DmxError(
            f"{path}: wanted opset {opset}, found that torch makes opset {found} of this model, so nothing "
            f"was written: give --opset {found}"
        )


def _difference(retrieval: Retrieval, path: Path, height: int, width: int) -> float:
    """Furthest that onnxruntime is from torch, over batches of several sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    furthest = 0.0
    for count in BATCHES:
        images = _images(count, height, width)
        (found,) = session.run([OUTPUT], {INPUT: images.numpy()})
        with torch.inference_mode():
            wanted = retrieval(images).numpy()
        difference = np.abs(found - wanted).max()
        # Not max(): it would lose a difference that is no number.
        furthest = float(difference) if not difference <= furthest else furthest
    return furthest


def _images(count: int, height: int, width: int) -> Tensor:
    """(count, 3, height, width) of about the mean and deviation of normalised pixels."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(count))
