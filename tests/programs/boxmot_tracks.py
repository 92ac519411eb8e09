"""BoxMOT with a model of DMX: its embeddings of boxes, and its trackers' identities.

python boxmot_tracks.py MODEL.onnx FILM.npz OUT.json

FILM.npz holds frames (T, H, W, 3) RGB, detections (N, 5): frame, left, top, right, bottom, and large, people
(M, H, W, 3). OUT.json: embeddings of both; the track of each detection by every tracker, -1 for none; and by
StrongSort with a model that sees no difference.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from boxmot import BotSort, DeepOcSort, StrongSort
from boxmot.reid.backends.onnx_backend import ONNXBackend

model, film, out = sys.argv[1:]
content = np.load(film)
frames, detections = content["frames"][..., ::-1].copy(), content["detections"]  # OpenCV's order of colours
backend = ONNXBackend(Path(model), torch.device("cpu"), half=False)


def tracks(tracker) -> list[int]:
    found = np.full(len(detections), -1)
    for number, frame in enumerate(frames):
        (rows,) = np.nonzero(detections[:, 0] == number)
        boxes = np.c_[detections[rows, 1:], np.full(len(rows), 0.9), np.zeros(len(rows))].astype(np.float32)
        for each in tracker.update(boxes.reshape(-1, 6), frame):
            found[rows[int(each[7])]] = int(each[4])
    return found.tolist()


class SameForAll:
    """As a model that sees no difference."""

    def get_features(self, boxes, frame):
        return np.full((len(boxes), 8), 8**-0.5, np.float32)


embeddings = [
    backend.get_features(detections[detections[:, 0] == number, 1:], frame)
    for number, frame in enumerate(frames)
    if (detections[:, 0] == number).any()
]
whole = [0, 0, *content["large"].shape[2:0:-1]]
large = [backend.get_features([whole], picture[..., ::-1].copy()) for picture in content["large"]]
result = {"embeddings": np.concatenate(embeddings).tolist(), "large": np.concatenate(large).tolist()}
for kind in (StrongSort, DeepOcSort, BotSort):
    result[kind.__name__] = tracks(kind(reid_weights=Path(model)))
result["blind"] = tracks(StrongSort(reid_model=SameForAll()))
Path(out).write_text(json.dumps(result))
