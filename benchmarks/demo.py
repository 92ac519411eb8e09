"""Does DomainMix win? The demo for several seeds: accuracy, time and peak memory of each, as JSON.

    python benchmarks/demo.py --seeds 0 1 2

Memory is the sum of the resident memory that is not shared (proportional set size) of all processes that the
demo starts, sampled every half second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from processes import family, processor

from dmx.config import recipe
from dmx.demo import RECIPE

RESULTS = Path(__file__).parent / "results" / "demo.json"
PACKAGES = ("dmx", "torch", "deepspeed", "ray", "timm", "numba")


def descendants_memory(root: int) -> int:
    """Bytes of memory of a process and all it started, whatever session they moved to."""
    total = 0
    for process in family(root):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def run(seed: int, out: Path) -> dict[str, Any]:
    """One demo from nothing."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "dmx", "demo", "--seed", str(seed), "--out", str(out)])
    peak = 0
    while process.poll() is None:
        peak = max(peak, descendants_memory(process.pid))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"seed {seed}: the demo ended with status {process.returncode}")
    result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return result | {"total_seconds": round(time.monotonic() - start, 1), "peak_memory_bytes": peak}


def main() -> None:
    """Run every seed; write the JSON after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory(prefix="dmx-demo-") as folder:
            runs.append(run(seed, Path(folder)))
        results = {
            "machine": {
                "cores": os.cpu_count(),
                "processor": processor(),
                "python": platform.python_version(),
            },
            "recipe": recipe(RECIPE)[1],
            "versions": {name: version(name) for name in PACKAGES},
            "runs": runs,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
