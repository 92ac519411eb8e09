"""Which JPEG decoder and which resizer take the least of a core, and how far their pixels are from Pillow's.

    pip install opencv-python-headless imagecodecs kornia-rs PyTurboJPEG
    python benchmarks/decoders.py

Rendered people are decoded to RGB and resized to 256 x 128, bicubic with anti-aliasing, as
`dmx.data.transforms` does; candidates that are not installed are listed with the reason. PyTurboJPEG looks
for the system's libturbojpeg, or takes the file that TURBOJPEG names. Counts the process's own CPU time, so
that other load on the machine matters little, and takes the median of rounds in turn. Writes
benchmarks/results/decoders.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from synth import cpu_model

from dmx.synth.dataset import Request, write_dataset

RESULT = Path(__file__).parent / "results" / "decoders.json"
HEIGHT, WIDTH = 256, 128
SOURCE_HEIGHTS = (128, 256, 512)
PACKAGES = {
    "Pillow": "pillow", "simplejpeg": "simplejpeg", "PyTurboJPEG": "PyTurboJPEG", "OpenCV":
    "opencv-python-headless", "torchvision": "torchvision", "imagecodecs": "imagecodecs",
    "kornia-rs": "kornia-rs", "torch": "torch",
}  # fmt: skip

Pixels = NDArray[np.uint8]


def pillow() -> Callable[[bytes], Any]:
    return lambda encoded: np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def simplejpeg() -> Callable[[bytes], Any]:
    module: Any = importlib.import_module("simplejpeg")
    return lambda encoded: module.decode_jpeg(encoded, "RGB", fastdct=False, fastupsample=False)


def pyturbojpeg() -> Callable[[bytes], Any]:
    module: Any = importlib.import_module("turbojpeg")
    codec = module.TurboJPEG(os.environ.get("TURBOJPEG"))
    return lambda encoded: codec.decode(encoded, pixel_format=module.TJPF_RGB)


def opencv() -> Callable[[bytes], Any]:
    module: Any = importlib.import_module("cv2")
    return lambda encoded: module.imdecode(np.frombuffer(encoded, np.uint8), module.IMREAD_COLOR_RGB)


def torchvision() -> Callable[[bytes], Any]:
    module: Any = importlib.import_module("torchvision.io")
    mode = module.ImageReadMode.RGB

    def decode(encoded: bytes) -> Any:
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return module.decode_jpeg(data, mode=mode).permute(1, 2, 0).numpy()

    return decode


def imagecodecs() -> Callable[[bytes], Any]:
    module: Any = importlib.import_module("imagecodecs")
    return lambda encoded: module.jpeg8_decode(encoded)


def kornia() -> Callable[[bytes], Any]:
    decoder = importlib.import_module("kornia_rs.io").ImageDecoder()
    return lambda encoded: np.asarray(decoder.decode(encoded))


def pillow_resize(pixels: Pixels) -> Any:
    return np.asarray(Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def torch_resize(pixels: Pixels) -> Any:
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(image, (HEIGHT, WIDTH), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


DECODERS = {
    "Pillow": pillow, "simplejpeg": simplejpeg, "PyTurboJPEG": pyturbojpeg, "OpenCV": opencv,
    "torchvision": torchvision, "imagecodecs": imagecodecs, "kornia-rs": kornia,
}  # fmt: skip
RESIZERS = {"Pillow": pillow_resize, "torch": torch_resize}


def available() -> tuple[dict[str, Callable[[bytes], Any]], dict[str, str]]:
    """The decoders that are here, and the reasons of the others."""
    found, missing = {}, {}
    for name, make in DECODERS.items():
        try:
            found[name] = make()
        except (ImportError, RuntimeError, AttributeError, OSError) as error:
            missing[name] = str(error).splitlines()[0]
    return found, missing


def rendered(height: int) -> list[bytes]:
    """JPEGs of people, `height` x `height` / 2 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), Request(style="street", identities=4, seed=0, images=20, height=height))
        return [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))]


def measured(
    candidates: dict[str, Callable[[Any], Any]], inputs: list[Any], rounds: int
) -> list[dict[str, Any]]:
    """For every candidate, the median of its microseconds an image, and how far it is from the first one."""
    spent: dict[str, list[float]] = {name: [] for name in candidates}
    first = next(iter(candidates.values()))
    reference = [np.asarray(first(item), np.int16) for item in inputs]
    worst = {
        name: max(int(np.abs(call(x) - y).max()) for x, y in zip(inputs, reference, strict=True))
        for name, call in candidates.items()
    }
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.process_time()
            for item in inputs:
                call(item)
            spent[name].append(1e6 * (time.process_time() - start) / len(inputs))
    return [
        {
            "name": name,
            "cpu_us": round(statistics.median(times), 1),
            "fastest_us": round(min(times), 1),
            "max_difference": worst[name],
        }
        for name, times in spent.items()
    ]


def main() -> None:
    """Measure all, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds a candidate (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    decoders, missing = available()
    rows = []
    for height in SOURCE_HEIGHTS:
        encoded = rendered(height)
        pixels = [np.array(decoders["Pillow"](item)) for item in encoded]
        about = {"source": [height, height // 2], "bytes": round(statistics.mean(map(len, encoded)))}
        for part, found in (
            ("decode", measured(decoders, encoded, args.rounds)),
            ("resize", measured(RESIZERS, pixels, args.rounds)),
        ):
            if part == "resize" and (height, height // 2) == (HEIGHT, WIDTH):
                continue
            rows += [{"part": part, **about, **row} for row in found]
    for row in rows:
        print(*row.values(), sep="\t")
    versions = {
        name: importlib.metadata.version(package)
        for name, package in PACKAGES.items()
        if name in decoders or name == "torch"
    }
    result = {
        "cpu": cpu_model(), "target": [HEIGHT, WIDTH], "images": len(encoded), "rounds": args.rounds,
        "versions": versions, "not_measured": missing, "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
