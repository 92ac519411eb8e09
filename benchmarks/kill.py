"""Kills every command at random moments: does the same command then come to the same result?

For each command the undisturbed result is taken once. Then, as often as --kills says, the command starts in
a new folder and is struck: by SIGKILL, SIGTERM or SIGINT, its main process alone or all of its group, or by
want of memory (the kernel kills a process of it, by a limit of its control group; or its allocations fail,
by RLIMIT_AS). The moment is drawn from the time in which it writes, one in five from its start on. What has
a final name then must be whole. The same command is given until it is through; its result must be the
undisturbed one, and neither processes, nor shared memory, nor temporary files may be left.

Results are written as they come: benchmarks/results/kill.json. All of it takes about two hours on two cores.

    python benchmarks/kill.py
    python benchmarks/kill.py --command train --kills 5 --seed 7
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import kills  # noqa: E402  # beside the tests, which use them too

RESULTS = ROOT / "benchmarks" / "results" / "kill.json"


def summary(command: str, undisturbed: kills.Undisturbed, outcomes: list[kills.Outcome]) -> dict[str, Any]:
    """What all kills of a command come to."""
    ends = [outcome.end_s for outcome in outcomes if outcome.strike.is_polite and outcome.heard]
    return {
        "command": command,
        "undisturbed_s": round(undisturbed.total_s, 1),
        "writes_from_s": round(undisturbed.begins_s, 1),
        "kills": dict(Counter(outcome.strike.name for outcome in outcomes)),
        "where": dict(Counter(outcome.where for outcome in outcomes)),
        "at_s": [round(outcome.at_s, 2) for outcome in outcomes],
        "restarts": sum(outcome.restarts for outcome in outcomes),
        "end_s": {"count": len(ends), "median": round(median(ends), 2), "max": round(max(ends), 2)}
        if ends
        else None,
        **{
            name: [
                f"{outcome.strike.name}: {told}" for outcome in outcomes for told in getattr(outcome, name)
            ]
            for name in ("partial", "differences", "leaks", "rude")
        },
    }


def record(row: dict[str, Any]) -> None:
    """Put the row of a command in the place of an earlier one."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": []}
    rows = [old for old in found["rows"] if old["command"] != row["command"]] + [row]
    rows.sort(key=lambda old: list(kills.JOBS).index(old["command"]))
    machine = {"cores": len(os.sched_getaffinity(0)), "memory_limit": kills.memory_limit() or "none"}
    tree = {"date": date.today().isoformat(), "machine": machine, "rows": rows}
    RESULTS.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Kill; status 1 when something was lost, left or told badly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--command", choices=tuple(kills.JOBS), action="append", help="only this; repeatable")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--round", type=int, default=0, metavar="N", help="kills of each command in turn")
    parser.add_argument("--log", type=Path, help="file that gets a line of JSON for each kill")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="kill-", dir="/var/tmp"))
    names = arguments.command or list(kills.JOBS)
    outcomes: dict[str, list[kills.Outcome]] = {name: [] for name in names}
    try:
        jobs = {name: kills.JOBS[name](folder) for name in names}
        undisturbed = {name: kills.undisturbed(job) for name, job in jobs.items()}
        step = arguments.round or arguments.kills
        for begin in range(0, arguments.kills, step):
            for name, job in jobs.items():
                for number in range(begin, min(begin + step, arguments.kills)):
                    rng = random.Random(f"{arguments.seed}/{name}/{number}")
                    outcome = kills.strike(job, undisturbed[name], number, rng)
                    outcomes[name].append(outcome)
                    line = json.dumps({"command": name, "number": number, **asdict(outcome)})
                    print(line, flush=True)
                    if arguments.log is not None:
                        with open(arguments.log, "a", encoding="utf-8") as log:
                            log.write(line + "\n")
                record(summary(name, undisturbed[name], outcomes[name]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(outcome.faults for found in outcomes.values() for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
