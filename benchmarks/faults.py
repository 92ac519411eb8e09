"""Three jobs across three hosts, struck by every fault: is the result the same, and how long does it take?

Hosts are Linux namespaces on this machine, reached by ssh; `launch/hosts.sh` runs each job on a head and two
others with a core each. Needs root, iproute2 and OpenSSH, and an hour or so for all. Results are written as
they come, so that one can be measured again: python benchmarks/faults.py --job train --fault "head killed"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import faults  # noqa: E402  # beside the tests, which use them too
import hosts  # noqa: E402
import jobs  # noqa: E402
import sshd  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
JOBS = ("embed", "cluster", "train")
NONE = "none"
HOSTS = 3
BIN = Path(sys.executable).parent


def make_job(name: str, folder: Path, out: Path) -> jobs.Job:
    """The job with its results in `out`; `folder` holds what all jobs work on."""
    if name == "train":
        return jobs.train_job(folder / "run", out)
    if name == "embed":
        return jobs.embed_job(folder / "run", folder, out)
    return jobs.cluster_job(folder, out)


def on_one_host(name: str, folder: Path) -> Path:
    """The job's results on this machine alone."""
    out = folder / f"{name}-reference"
    if not out.exists():
        job = make_job(name, folder, out)
        launcher = {"train": ["--launcher", "torchrun"], "cluster": ["--launcher", "torchrun"]}.get(name, [])
        subprocess.run([BIN / job.words[0], *job.words[1:], *launcher], check=True)
    return out


def measure(name: str, fault: str, folder: Path) -> dict[str, Any]:
    """One job with one fault, or none."""
    reference = on_one_host(name, folder)
    out = folder / f"{name}-{fault.replace(' ', '-')}"
    job = make_job(name, folder, out)
    logs = folder / "logs" / out.name
    with (
        hosts.hosts(HOSTS + 1) as machines,
        tempfile.TemporaryDirectory() as keys,
        sshd.ssh_servers(machines, Path(keys)) as ssh,
    ):
        outcome = faults.run_job(job, machines, ssh, logs, None if fault == NONE else fault)
    difference = job.difference(reference)
    print(
        outcome.said[-1][-2000:], f"{name}, {fault}: {outcome}, difference: {difference or 'none'}", sep="\n"
    )
    return {
        "load": round(os.getloadavg()[0], 1),
        "job": name,
        "fault": fault,
        "total_s": round(outcome.total_s, 1),
        "after_s": round(outcome.after_s, 1),
        "noticed_s": round(outcome.noticed_s, 1),
        "same": not difference,
    }


def record(row: dict[str, Any]) -> None:
    """Put a measurement in the place of an earlier one."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": []}
    rows = [old for old in found["rows"] if (old["job"], old["fault"]) != (row["job"], row["fault"])]
    order = [(job, fault) for job in JOBS for fault in (NONE, *faults.FAULTS)]
    rows = sorted([*rows, row], key=lambda r: order.index((r["job"], r["fault"])))
    machine = {"cores": len(os.sched_getaffinity(0)), "hosts": HOSTS}
    tree = {"date": date.today().isoformat(), "machine": machine, "rows": rows}
    RESULTS.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Measure; status 1 when a result differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=JOBS, action="append", help="only this one; repeatable")
    parser.add_argument(
        "--fault", choices=(NONE, *faults.FAULTS), action="append", help="only this one; repeatable"
    )
    arguments = parser.parse_args()
    if reason := hosts.why_not() or sshd.why_not():
        raise SystemExit(f"several hosts cannot be played here: {reason}")
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))
    is_same = True
    try:
        jobs.begin_run(folder / "run")
        for name in arguments.job or JOBS:
            for fault in arguments.fault or (NONE, *faults.FAULTS):
                row = measure(name, fault, folder)
                record(row)
                is_same &= row["same"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(not is_same)


if __name__ == "__main__":
    sys.exit(main())
