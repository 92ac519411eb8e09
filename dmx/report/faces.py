"""Makes heads unrecognisable on crops of people, without looking for faces.

A crop holds one person from head to feet, so the head lies at its top: in the first of six equal stripes
where the box is tight, in the first two where it is loose. So the upper third goes; of a crop that is less
than twice as high as wide, which shows no whole body, two thirds of its width. That part is averaged over
cells of a quarter of the width, about the size of a head, and drawn smoothly between their means: some twenty
colours are all that is left of it, from which no filter brings back a face.

It protects a face, not a person: clothes, build, bag and place stay, and telling people apart by those is
what re-identification does. A head that is not at the top stays as it is: of someone who lies, bends down or
rides, of a second person below, of a whole scene. For pages that show nobody there is `--no-images`.

Source: stripes: Sun et al., "Beyond Part Models", ECCV 2018; that embeddings hardly need faces: Dietlmeier et
al., "How Important Are Faces for Person Re-Identification?", ICPR 2020.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

SHARE_OF_HEIGHT = 1 / 3
SHARE_OF_WIDTH = 2 / 3
CELLS_ACROSS = 4


def blurred_rows(height: int, width: int) -> int:
    """How many of a crop's upper rows of pixels hold the head."""
    return min(height, math.ceil(max(SHARE_OF_HEIGHT * height, SHARE_OF_WIDTH * width)))


def without_face(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy of a crop (H, W, 3) whose upper part is a few colours."""
    height, width = pixels.shape[:2]
    rows = blurred_rows(height, width)
    cells = max(1, round(CELLS_ACROSS * rows / width)), min(CELLS_ACROSS, width)
    part = torch.from_numpy(pixels[:rows].astype(np.float32)).permute(2, 0, 1)[None]
    means = F.adaptive_avg_pool2d(part, cells)
    smooth = F.interpolate(means, (rows, width), mode="bilinear", align_corners=False)
    out = pixels.copy()
    out[:rows] = smooth[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    return out
