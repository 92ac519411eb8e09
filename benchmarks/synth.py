"""How many images a second one core renders, people and JPEG included.

    python benchmarks/synth.py

Counts the process's own CPU time, so that other load on the machine does not matter, after everything is
compiled and every camera's backgrounds are painted. Each person is built anew for their 12 images.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import sys
import time
from pathlib import Path

from dmx import __version__
from dmx.synth.render import Renderer
from dmx.synth.styles import STYLES

RESULTS = Path(__file__).parent / "results" / "synth.json"
IMAGES_PER_PERSON = 12
CAMERAS = 6


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def warm_up(renderer: Renderer) -> None:
    """Compile, paint every background and build every passer-by."""
    for camera in range(CAMERAS):
        for index in range(40):
            renderer.render(0, camera, index)


def measure(style: str, height: int, people: int) -> dict[str, object]:
    """CPU seconds of `people` people's images, and of their slowest and fastest person."""
    renderer = Renderer(style, height, identities=1)
    warm_up(renderer)
    seconds = []
    for person in range(1, people + 1):
        start = time.process_time()
        for index in range(IMAGES_PER_PERSON):
            renderer.render(person, (person + index) % CAMERAS, index)
        seconds.append(time.process_time() - start)
    rates = sorted(IMAGES_PER_PERSON / one for one in seconds)
    return {
        "style": style,
        "height": height,
        "width": height // 2,
        "images": people * IMAGES_PER_PERSON,
        "images_per_cpu_second": round(people * IMAGES_PER_PERSON / sum(seconds), 1),
        "images_per_cpu_second_p10": round(rates[len(rates) // 10], 1),
        "images_per_cpu_second_p90": round(rates[len(rates) * 9 // 10], 1),
    }


def main() -> int:
    """Measure all styles at both sizes, print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, default=25, help="people a row, 12 images each (default: 25)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    arguments = parser.parse_args()
    rows = []
    for height in (256, 128):
        for style in STYLES:
            rows.append(measure(style, height, arguments.people))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": "dmx synth, one core, persons built and JPEGs encoded",
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "versions": {
            "dmx": __version__,
            **{name: importlib.metadata.version(name) for name in ("numpy", "numba", "pillow", "anny")},
        },
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
