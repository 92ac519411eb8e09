"""Rendered people for trackers: a short film, and a model that sees differences between them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dmx.config import from_tree
from dmx.data.transforms import normalise_batch
from dmx.model import build_model
from dmx.synth.render import Renderer
from dmx.train.checkpoint import Progress, write_checkpoint

STYLE, SEED, CAMERA = "mall", 0, 0
HEIGHT, WIDTH = 120, 240
PERSON_HEIGHT, PERSON_WIDTH = 64, 32
TOP, STEP, PACES = 40, 4, 12
HIDDEN = 9  # frames behind a pillar
APART = STEP * (HIDDEN + 1)
NOISE = 6.0  # levels of 255, a new one in every frame


@dataclass(frozen=True)
class Film:
    """Two people walk to the right; the one behind overtakes the other while a pillar hides both.

    Motion alone takes each for the other afterwards. Each is shown in one view, with the noise of a sensor.

    Attributes:
        frames: (T, HEIGHT, WIDTH, 3) uint8, RGB.
        detections: (N, 5) float64: frame, left, top, right, bottom.
        people: (N,) int64, who it is.
    """

    frames: NDArray[np.uint8]
    detections: NDArray[np.float64]
    people: NDArray[np.int64]

    def crops(self) -> list[NDArray[np.uint8]]:
        """What the detections show."""
        return [self.frames[t, y0:y1, x0:x1] for t, x0, y0, x1, y1 in self.detections.astype(int)]


def film(people: tuple[int, int] = (0, 1)) -> Film:
    """Render it."""
    renderer = Renderer(STYLE, height=PERSON_HEIGHT, seed=SEED)
    rng = np.random.default_rng(SEED)
    pictures = [np.asarray(_render(renderer, person, 0), np.float64) for person in people]
    frames, detections, who = [], [], []
    for moment in range(PACES + HIDDEN + PACES):
        frame = np.full((HEIGHT, WIDTH, 3), 110.0)
        behind, ahead = STEP * moment, STEP * moment + APART
        lefts = (behind, ahead) if moment < PACES else (ahead, behind)
        for person, left in enumerate(() if PACES <= moment < PACES + HIDDEN else lefts):
            frame[TOP : TOP + PERSON_HEIGHT, left : left + PERSON_WIDTH] = pictures[person]
            detections.append((moment, left, TOP, left + PERSON_WIDTH, TOP + PERSON_HEIGHT))
            who.append(person)
        frames.append(np.clip(frame + rng.normal(0, NOISE, frame.shape), 0, 255).astype(np.uint8))
    return Film(np.stack(frames), np.array(detections, np.float64), np.array(who))


def write_untrained(folder: Path) -> Path:
    """A checkpoint that can tell people apart by their colours, though nobody trained it.

    Its weights are drawn; its statistics, the neck's too, are those of other rendered people.
    """
    config = from_tree(
        (
            "test",
            {
                "model": {
                    "backbone": "resnet10t",
                    "backbone_args": {"channels": [16, 32, 32, 64], "stem_width": 8},
                },
                "data": {"height": PERSON_HEIGHT, "width": PERSON_WIDTH},
            },
        )
    )
    torch.manual_seed(SEED)
    model = build_model(config.model)
    renderer = Renderer(STYLE, height=PERSON_HEIGHT, seed=SEED, identities=1)
    pixels = np.stack([np.asarray(_render(renderer, person, 0)) for person in range(10, 42)])
    images = normalise_batch(torch.from_numpy(pixels))
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.momentum = 1.0  # the batch's statistics, at once
        for _ in range(2):
            model.train()(images)
        features, _ = model.eval()(images)
        model.neck.running_mean, model.neck.running_var = features.mean(0), features.var(0)
    write_checkpoint(folder, Progress(seed=SEED), config, {"model": model.state_dict()}, keep=1)
    return folder


def _render(renderer: Renderer, person: int, moment: int) -> Image.Image:
    return Image.open(io.BytesIO(renderer.render(person, CAMERA, moment)))
