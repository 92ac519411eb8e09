"""Kills every command at random moments: does the same command then come to the same result?

For each command the undisturbed result is taken once. Then, as often as --kills says, the command starts in
a new folder and is struck: by SIGKILL, SIGTERM or SIGINT, its main process alone or all of its group, or by
want of memory (the kernel kills a process of it, by a limit of its control group; or its allocations fail,
by RLIMIT_AS). The moment is drawn from the time in which it writes, one in five from its start on. What has
a final name then must be whole. The same command is given until it is through; its result must be the
undisturbed one, and neither processes, nor shared memory, nor temporary files may be left.

Results are written as they come: benchmarks/results/kill.json. All of it takes some hours on two cores;
interrupted, it goes on where its log ends.

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
LOG = ROOT / "build" / "kill.jsonl"
FAULTS = ("partial", "differences", "leaks", "rude")


def summary(command: str, kills_of_it: list[dict[str, Any]]) -> dict[str, Any]:
    """What all kills of a command come to, from their lines in the log."""
    polite = [one for one in kills_of_it if one["heard"] and one["strike"]["signum"] in kills.POLITE]
    ends = [one["end_s"] for one in polite]
    return {
        "command": command,
        "dates": sorted({one["date"] for one in kills_of_it}),
        "undisturbed_s": sorted({round(one["undisturbed_s"], 1) for one in kills_of_it}),
        "writes_from_s": sorted({round(one["writes_from_s"], 1) for one in kills_of_it}),
        "kills": dict(Counter(one["strike"]["name"] for one in kills_of_it)),
        "where": dict(Counter(one["where"] for one in kills_of_it)),
        "at_s": [round(one["at_s"], 2) for one in kills_of_it],
        "restarts": sum(one["restarts"] for one in kills_of_it),
        "end_s": {"count": len(ends), "median": round(median(ends), 2), "max": round(max(ends), 2)}
        if ends
        else None,
        **{
            name: [f"{one['strike']['name']}: {told}" for one in kills_of_it for told in one[name]]
            for name in FAULTS
        },
    }


def record(row: dict[str, Any]) -> None:
    """Put the row of a command in the place of an earlier one."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": []}
    rows = [old for old in found["rows"] if old["command"] != row["command"]] + [row]
    rows.sort(key=lambda old: list(kills.JOBS).index(old["command"]))
    machine = {"cores": len(os.sched_getaffinity(0)), "memory_limit": kills.memory_limit() or "none"}
    tree = {"machine": machine, "rows": rows}
    RESULTS.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Kill; status 1 when something was lost, left or told badly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--command", choices=tuple(kills.JOBS), action="append", help="only this; repeatable")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument(
        "--log",
        type=Path,
        default=LOG,
        help="gets a line of JSON for each kill; those in it are not done again",
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="kill-", dir="/var/tmp"))
    names = arguments.command or list(kills.JOBS)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    log = (
        [json.loads(line) for line in arguments.log.read_text().splitlines()]
        if arguments.log.exists()
        else []
    )
    done = {(one["command"], one["number"]) for one in log}
    try:
        jobs = {name: kills.JOBS[name](folder) for name in names}
        undisturbed = {name: kills.undisturbed(job) for name, job in jobs.items() if arguments.kills}
        for number in range(arguments.kills):
            for name, job in jobs.items():
                if (name, number) in done:
                    continue
                rng = random.Random(f"{arguments.seed}/{name}/{number}")
                whole = undisturbed[name]
                outcome = kills.strike(job, whole, number, rng)
                times = {"undisturbed_s": whole.total_s, "writes_from_s": whole.begins_s}
                when = {"date": date.today().isoformat()}
                log.append({"command": name, "number": number, **when, **times, **asdict(outcome)})
                with open(arguments.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(log[-1]) + "\n")
                print(json.dumps(log[-1]), flush=True)
                record(summary(name, [one for one in log if one["command"] == name]))
        for name in {one["command"] for one in log}:
            record(summary(name, [one for one in log if one["command"] == name]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(one[name] for one in log for name in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
