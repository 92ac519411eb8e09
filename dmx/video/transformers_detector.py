"""Detectors of Hugging Face transformers (RT-DETR, D-FINE, DETR, YOLOS ...), by folder or name on the hub.

A folder that `save_pretrained` wrote, or a clone of one on the hub, tells everything: the network, what its
labels mean and how frames are prepared. Weights are read as safetensors only, and no code of a model's author
is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torchvision.ops import nms

from dmx.deployment.hub import HUB_ID
from dmx.errors import DmxError
from dmx.extraction.plan import weights_sha256
from dmx.video.detector import Found, without_tracks

# What detectors call a person, in small letters: COCO's word first.
PERSON = ("person", "pedestrian", "people", "human")
FILES = ("config.json", "preprocessor_config.json", "*.safetensors")
# Two boxes of which more is shared show one person twice, or one of whom only the other is seen.
MOST_OVERLAP = 0.7


class TransformersDetector:
    """A detector of transformers.

    Args:
        model: a `...ForObjectDetection`.
        processor: its image processor.
        labels: numbers of its labels that are people.
        least_score: what is less sure is left out.
        device: where it computes.
    """

    def __init__(
        self, model: Any, processor: Any, labels: list[int], least_score: float, device: str
    ) -> None:
        self._model = model.eval().requires_grad_(False).to(device)
        self._processor, self._labels, self._least_score = processor, labels, least_score
        self._device = device
        self.fingerprint = f"{weights_sha256(model)} {labels} {least_score} {torch.__version__} {device}"

    @torch.inference_mode()
    def detect(self, frames: NDArray[np.uint8]) -> list[Found]:
        """The people in each of (B, H, W, 3) RGB frames."""
        pictures = list(torch.from_numpy(frames).permute(0, 3, 1, 2))
        prepared = self._processor(images=pictures, return_tensors="pt").to(self._device)
        sizes = [frames.shape[1:3]] * len(frames)
        results = self._processor.post_process_object_detection(
            self._model(**prepared), threshold=self._least_score, target_sizes=sizes
        )
        return [self._people(result) for result in results]

    def _people(self, result: dict[str, torch.Tensor]) -> Found:
        labels = torch.tensor(self._labels, device=result["labels"].device)
        is_person = torch.isin(result["labels"], labels)
        boxes, scores = result["boxes"][is_person].float(), result["scores"][is_person].float()
        kept = nms(boxes, scores, MOST_OVERLAP)
        return without_tracks(boxes[kept].cpu().numpy(), scores[kept].cpu().numpy())


def load_detector(
    name: str, *, least_score: float, device: str, label: str | None = None
) -> TransformersDetector:
    """A detector by its folder, or by its name on the hub.

    Args:
        name: folder, or `owner/model`; what the hub gave before is kept in its cache and taken offline.
        least_score: what is less sure is left out.
        device: where it computes.
        label: what it calls a person; None: as detectors usually do.

    Raises:
        DmxError: transformers is not installed, there is no such model, the hub cannot be reached, or the
            model knows no people.
    """
    try:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise DmxError(
            f"wanted transformers, which runs the detector, found that it cannot be imported ({error}); `pip "
            'install "dmx[video]"` brings it. Without a detector, --boxes takes the boxes of another program'
        ) from error
    folder = _local_folder(name)
    transformers_logging.disable_progress_bar()  # it would draw one for the loading of tensors
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForObjectDetection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DmxError(
            f"--detector {name}: wanted an object detector of transformers, found one that cannot be loaded: "
            f"{reason}; download it again, or take another"
        ) from error
    return TransformersDetector(model, processor, _person_labels(name, model, label), least_score, device)


def _local_folder(name: str) -> Path:
    """The folder of a detector: `name` itself, or what the hub has by that name.

    Raises:
        DmxError: there is neither, the hub cannot be reached, or a file of it is missing.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise DmxError(
            f"--detector {name}: wanted the folder of a detector ({', '.join(FILES)}), found a file; give "
            "the folder that it is in"
        )
    if not path.is_dir():
        if not HUB_ID.fullmatch(name):
            raise DmxError(
                f"--detector {name}: wanted the folder of a detector, or the name of one on the Hugging Face "
                "hub such as PekingU/rtdetr_v2_r18vd, found neither"
            )
        path = _download(name)
    missing = [wanted for wanted in FILES if not any(path.glob(wanted))]
    if missing:
        raise DmxError(
            f"--detector {name}: wanted an object detector of transformers, found one without "
            f"{' and '.join(missing)} in {path}; weights have to be safetensors: save others with "
            "`save_pretrained`"
        )
    return path


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DmxError(
            f"--detector {name}: wanted a folder, or a detector of this name on the Hugging Face hub, found "
            f"no such folder, and the hub gave none: {str(error).splitlines()[0]}. Without a network, "
            f"download it where there is one, `hf download {name} --local-dir detector`, copy the folder "
            "`detector` here and give --detector detector"
        ) from error


def _person_labels(name: str, model: Any, label: str | None) -> list[int]:
    known = {int(number): str(text) for number, text in model.config.id2label.items()}
    wanted = PERSON if label is None else (label.lower(),)
    for word in wanted:
        if found := [number for number, text in known.items() if text.lower() == word]:
            return found
    some = ", ".join(list(known.values())[:8]) + (" ..." if len(known) > 8 else "")
    raise DmxError(
        f"--detector {name}: wanted one that knows {' or '.join(map(repr, wanted))}, found the labels "
        f"{some}; name the right one with --label, or take another detector"
    )
