"""A tiny run: generated people that a small network can tell apart in seconds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 32, 16
CAMERAS, PER_CAMERA = 3, 3


def picture_of(seed: int, person: int, camera: int, index: int) -> bytes:
    """A JPEG: a person's pattern of colours, a camera's tint, some noise."""
    colours = np.random.default_rng((seed, person)).uniform(30, 225, (6, 3, 3)).astype(np.uint8)
    pattern = np.asarray(Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    tint = np.random.default_rng((seed, camera)).uniform(0.7, 1.3, 3)
    noise = np.random.default_rng((seed, person, camera, index)).normal(0, 12, pattern.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pattern * tint + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_set(folder: Path, seed: int, splits: dict[str, int], rows_per_shard: int = 4096) -> None:
    """Write a data set of `splits` people, in shards."""
    from dmx.data.shards import DatasetWriter

    with DatasetWriter(folder, layout="folders", rows_per_shard=rows_per_shard) as writer:
        for split, people in splits.items():
            for person in range(people):
                for camera in range(CAMERAS):
                    for index in range(1 if split == "query" else PER_CAMERA):
                        picture = index + 100 * (split == "query")
                        encoded = picture_of(seed, person, camera, picture)
                        writer.add(split, encoded, person, camera, f"{split}/{person}_{camera}_{index}.jpg")


def tiny_settings(folder: Path) -> dict[str, Any]:
    """Settings of a run over four epochs: source alone, stage one, twice stage two.

    Args:
        folder: where its data is written.
    """
    write_set(folder / "source", 1, {"train": 20})
    write_set(folder / "target", 2, {"train": 16})
    write_set(folder / "unseen", 3, {"query": 8, "gallery": 8})
    return {
        "data": {
            "source": str(folder / "source"),
            "target": str(folder / "target"),
            "tests": [str(folder / "unseen")],
            "height": HEIGHT,
            "width": WIDTH,
        },
        "model": {
            "backbone": "resnet10t",
            "backbone_args": {"channels": [8, 16, 32, 64], "stem_width": 8},
            "discriminator_widths": [64, 32],
        },
        "augment": {"pad": 2},
        "batch": {"identities": 8, "instances": 4},
        "cluster": {"k1": 12, "min_cluster_size": 3},
        "schedule": {
            "epochs": 4,
            "steps_per_epoch": 12,
            "source_epochs": 1,
            "stage_two_epoch": 2,
            "discriminator_every": 4,
            "warmup_epochs": 1,
            "checkpoint_every_steps": 3,
        },
    }
