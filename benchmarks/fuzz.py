"""Fuzzes every reader of files from outside with atheris, and writes what was found.

    python benchmarks/fuzz.py --seconds 60

Wants `pip install "dmx[fuzz]"`, on x86-64 Linux. The readers and their seeds are those of tests/targets.py;
each runs in a process of its own, guided by the Python code that it reaches (libraries in C are not
instrumented). A file that is answered with anything but a DmxError ends its target; build/fuzz keeps it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from synth import cpu_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
RESULTS = Path(__file__).parent / "results" / "fuzz.json"
FOUND = ROOT / "build" / "fuzz"
# A file of kilobytes that takes more than this is one that attacks: memory beyond it, or time. Arrow makes
# room for a page of Parquet before it finds that there is none: 2 GiB, the most that its header can claim.
MEMORY_MIB = 4096
TIMEOUT_S = 120
LONGEST_BYTES = 1 << 16
# What is no reader, numba's and Triton's code, is imported before and stays as it is.
UNTOUCHED = ("dmx.cluster.approximate", "dmx.cluster.sharded")
INSTRUMENTED = [
    "dmx.data",
    "dmx.features",
    "dmx.config",
    "dmx.settings",
    "dmx.model.weights",
    "dmx.search.stored",
    "pickle",
    "tarfile",
    "targets",
    "yaml",
    "zipfile",
]
STATISTICS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
COVERED = re.compile(r"cov: (\d+) ft: (\d+)")


def fuzz(name: str, seconds: int, folder: Path) -> dict[str, Any]:
    """Run a target in a process of its own.

    Args:
        name: of the target.
        seconds: how long.
        folder: for its files, and for a file that breaks it.
    """
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--target", name, "--seconds", str(seconds), "--folder", str(folder)],
        capture_output=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    said = done.stderr.decode(errors="replace")
    runs, covered = STATISTICS.findall(said), COVERED.findall(said)
    found = sorted(path.name for path in folder.glob("found-*"))
    if done.returncode:
        print(said[-3000:], file=sys.stderr)
    return {
        "target": name,
        "seconds": round(time.monotonic() - start, 1),
        "files": int(runs[-1]) if runs else 0,
        "edges": int(covered[-1][0]) if covered else 0,
        "faults": found,
        "status": done.returncode,
    }


def run_target(name: str, seconds: int, folder: Path) -> None:
    """Be the process of a target; libFuzzer ends it."""
    import atheris

    for module in UNTOUCHED:
        importlib.import_module(module)
    with atheris.instrument_imports(include=INSTRUMENTED):
        import targets
    corpus, work = folder / "corpus", folder / "work"
    corpus.mkdir(parents=True)
    work.mkdir()
    target = targets.make(work)[name]
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = {
        "max_total_time": seconds,
        "max_len": LONGEST_BYTES,
        "rss_limit_mb": MEMORY_MIB,
        "timeout": TIMEOUT_S,
        "report_slow_units": TIMEOUT_S,
        "artifact_prefix": f"{folder}/found-",
        "print_final_stats": 1,
    }
    words = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *words, str(corpus)], target.read)
    atheris.Fuzz()


def main() -> int:
    """Fuzz every target, or be the process of one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=60, help="a target (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="targets (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.target:
        run_target(arguments.target, arguments.seconds, arguments.folder)
        return 0
    import targets

    names = arguments.only or list(targets.make())
    rows = []
    if arguments.only and arguments.out.exists():  # the others stay as they were found
        found = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in found if row["target"] not in names]
    FOUND.mkdir(parents=True, exist_ok=True)
    for name in names:
        rows.append(fuzz(name, arguments.seconds, Path(tempfile.mkdtemp(prefix=f"{name}-", dir=FOUND))))
        print(json.dumps(rows[-1]), flush=True)
    packages = ("atheris", "pillow", "simplejpeg", "pyarrow", "pyyaml", "torch", "safetensors")
    result = {
        "machine": {"processor": cpu_model(), "cores": os.cpu_count()},
        "python": sys.version.split()[0],
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "date": date.today().isoformat(),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row["status"] or row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
