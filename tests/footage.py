"""Videos of rendered people whose boxes are known, and a small real detector that has learnt that world."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import box_convert, box_iou

from dmx.synth.effects import develop
from dmx.synth.render import Renderer
from dmx.synth.types import stream

WIDTH, HEIGHT, RATE = 320, 240, 10
PEOPLE, PICTURES = 3, 2
RENDERED_PX = 128
# The detector sees frames at this size, and is taught so many of each film at a time.
SEEN_PX, BATCH = 96, 4
# What it should score people above, and all else below: the tests' threshold lies between.
SURE, UNSURE = 0.55, 0.45


@dataclass(frozen=True)
class Cutout:
    """A person without background: pixels (H, W, 3) uint8, and the share of each that they cover, (H, W)."""

    pixels: NDArray[np.uint8]
    coverage: NDArray[np.float32]

    def scaled(self, height: int) -> Cutout:
        size = (round(self.pixels.shape[1] * height / self.pixels.shape[0]), height)
        pixels = Image.fromarray(self.pixels).resize(size, Image.Resampling.BILINEAR)
        coverage = Image.fromarray(self.coverage).resize(size, Image.Resampling.BILINEAR)
        return Cutout(np.asarray(pixels), np.asarray(coverage))

    def lay_on(self, image: NDArray[np.float32], left: int, top: int) -> None:
        height, width = self.coverage.shape
        under, share = image[top : top + height, left : left + width], self.coverage[..., None]
        under[:] = self.pixels * share + under * (1 - share)


@dataclass(frozen=True)
class Footage:
    """Frames (H, W, 3) uint8, and the true boxes x1, y1, x2, y2 of each, (n, 4)."""

    frames: list[NDArray[np.uint8]]
    boxes: list[NDArray[np.float32]]


@cache
def _cutouts(person: int) -> list[Cutout]:
    """Pictures of a rendered person, cut to what they cover; those that reach to the edge are passed over."""
    renderer, found = _renderer(), []
    for index in range(100):
        rng = stream("view", 0, renderer.style.number, person, 0, index)
        seen = renderer.expose(person, 0, rng)
        ys, xs = np.nonzero(seen.coverage > 0.5)
        if min(ys.min(), xs.min()) == 0 or ys.max() == RENDERED_PX - 1 or xs.max() == RENDERED_PX // 2 - 1:
            continue
        encoded = develop(seen.image, renderer.camera(0).response, seen.exposure, seen.native_height, rng)
        pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        inside = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        found.append(Cutout(pixels[inside], seen.coverage[inside]))
        if len(found) == PICTURES:
            return found
    raise AssertionError(f"person {person} is never wholly in the picture")


@cache
def _renderer() -> Renderer:
    return Renderer("street", RENDERED_PX)


def walk(camera: int, frames: int = 18) -> Footage:
    """People who walk past a camera, two of three at a time."""
    rng = np.random.default_rng(camera)
    colours = Image.fromarray(rng.uniform(60, 190, (5, 7, 3)).astype(np.uint8))
    background = np.asarray(colours.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
    walkers = [
        (
            int(rng.integers(90, 150)),
            int(rng.integers(10, 80)),
            95 * p + rng.uniform(10, 40),
            rng.uniform(-2, 2),
        )
        for p in range(PEOPLE)
    ]
    images, boxes = [], []
    for number in range(frames):
        image, here = background.copy(), []
        for person, (height, top, left, speed) in enumerate(walkers):
            if (number // 6 + person) % PEOPLE == PEOPLE - 1:
                continue
            figure = _cutouts(person)[number // 3 % PICTURES].scaled(height)
            x = int(np.clip(left + speed * number, 0, WIDTH - figure.coverage.shape[1]))
            figure.lay_on(image, x, top)
            here.append((x, top, x + figure.coverage.shape[1], top + height))
        images.append(image.clip(0, 255).astype(np.uint8))
        boxes.append(np.array(here, np.float32))
    return Footage(images, boxes)


def write_video(
    path: Path,
    frames: Sequence[NDArray[np.uint8]],
    codec: str = "libx264",
    *,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Encode frames; `times` counts in frames' lengths, which may skip some."""
    with av.open(str(path), "w", options=container or {}) as file:
        video = file.add_stream(codec, rate=RATE)
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        video.options = {
            "crf": "18",
            **({"x265-params": "log-level=none"} if codec == "libx265" else {}),
            **(options or {}),
        }
        if rotation:
            video.set_display_rotation(rotation)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
    return path


def as_read(film: Footage, path: Path) -> Footage:
    """The film as its video shows it, which is not to the bit what was encoded."""
    with av.open(str(path)) as file:
        return Footage([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)], film.boxes)


def train_detector(folder: Path, films: Sequence[Footage]) -> Path:
    """A small RT-DETR that learns these frames by heart, saved as transformers does it.

    It is taught until it finds everybody and nobody else; what does not get there begins anew from other
    weights.
    """
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

    torch.set_num_threads(1)  # more are no faster with so small a model, and slow where cores are shared
    processor = RTDetrImageProcessor(size={"height": SEEN_PX, "width": SEEN_PX})
    frames = [torch.from_numpy(frame).permute(2, 0, 1) for film in films for frame in film.frames]
    pixels = processor(images=frames, return_tensors="pt")["pixel_values"]
    targets = [_target(boxes) for film in films for boxes in film.boxes]
    halves = list(torch.arange(len(pixels)).split([len(film.frames) for film in films]))
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        model = RTDetrForObjectDetection(_small(RTDetrConfig, RTDetrResNetConfig))
        for steps, rate in ((300, 3e-3), *[(100, 1.5e-3)] * 4):
            _teach(model, pixels, targets, halves, steps, rate)
            with torch.inference_mode():
                found = model(pixel_values=pixels)
            if all(map(_right, found.logits, found.pred_boxes, targets)):
                model.save_pretrained(folder)
                processor.save_pretrained(folder)
                return folder
    raise AssertionError("no detector learned to find everybody")


def _teach(
    model: Any,
    pixels: torch.Tensor,
    targets: list[dict[str, torch.Tensor]],
    films: list[torch.Tensor],
    steps: int,
    rate: float,
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    for step in range(steps):
        # As many of each film, so that what BatchNorm sees is always alike.
        some = torch.cat([film[torch.randperm(len(film))[:BATCH]] for film in films])
        loss = model(pixel_values=pixels[some], labels=[targets[row] for row in some]).loss
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # Its statistics are those of all frames, not of the last few.
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(pixel_values=pixels)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()


def _right(logits: torch.Tensor, boxes: torch.Tensor, target: dict[str, torch.Tensor]) -> bool:
    """Whether everybody in a frame is found once, well above the threshold, and nobody else."""
    scores = logits[:, 0].sigmoid()
    sure = scores > SURE
    if sure.sum() != len(target["boxes"]) or (scores[~sure] > UNSURE).any():
        return False
    found, true = (box_convert(some, "cxcywh", "xyxy") for some in (boxes[sure], target["boxes"]))
    shared = box_iou(found, true)
    return bool((shared.amax(0) > 0.55).all() and (shared.amax(1) > 0.55).all())


def _target(boxes: NDArray[np.float32]) -> dict[str, torch.Tensor]:
    shares = torch.from_numpy(boxes) / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    middle, size = (shares[:, :2] + shares[:, 2:]) / 2, shares[:, 2:] - shares[:, :2]
    return {"class_labels": torch.zeros(len(boxes), dtype=torch.long), "boxes": torch.cat([middle, size], 1)}


def _small(detector: Any, backbone: Any) -> Any:
    return detector(
        backbone_config=backbone(
            embedding_size=16,
            hidden_sizes=[16, 32, 48, 64],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_indices=[2, 3, 4],
        ),
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[32, 48, 64],
        encoder_hidden_dim=32,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=12,
        num_denoising=0,
        id2label={0: "person"},
        label2id={"person": 0},
    )


def overlap(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return float(shared / (areas - shared))
