"""The table of `kill.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cells import head, line

KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "out of memory")
FAULTS = ("partial", "differences", "leaks", "rude")
LAUNCHED = ("cluster", "train")


def reliability_kill(results: dict[str, Any]) -> str:
    """How often each command was killed, where, what it came to, and how long it took to end."""
    rows = results["rows"]
    lines = head(
        "command", *KINDS, "at work", "other results", "partial files", "left behind", "end, median s",
        "end, longest s", texts=1,
    )  # fmt: skip
    for row in rows:
        kills = [sum(n for name, n in row["kills"].items() if name.startswith(kind)) for kind in KINDS]
        found = [len(row[name]) for name in ("differences", "partial", "leaks")]
        end = row["end_s"] or {}
        ends = [f"{end[name]:.1f}" if name in end else "" for name in ("median", "max")]
        at_work = row["where"].get("at work", 0) / sum(row["where"].values())
        lines.append(line(called(row["command"]), *kills, f"{at_work:.0%}", *found, *ends))
    kills = sum(sum(row["kills"].values()) for row in rows)
    through = sum(row["where"].get("through", 0) for row in rows)
    faults = sum(len(row[name]) for row in rows for name in FAULTS)
    verdict = "each then came to" if not faults else f"{faults} FAULTS were found; else each came to"
    lines += [
        "",
        f"{kills} kills at random moments, of the main process or of its whole group, out of memory by the "
        f"kernel ({results['machine']['memory_limit']}) or by allocations that fail; {verdict} the "
        f"undisturbed result, by the same command. At work: it had begun to write. {through} ended well all "
        "the same, with the memory that they had, or as the signal came. Left behind: processes, "
        f"shared memory, temporary files. End: from SIGTERM or SIGINT to the end of the process, on "
        f"{results['machine']['cores']} cores, which for some of the commands had other work besides. "
        f"Struck {span(row['dates'] for row in rows)}; `python benchmarks/kill.py` measures it.",
    ]
    return "\n".join(lines)


def span(dates: Iterable[list[str]]) -> str:
    """On a day, or from the first day to the last."""
    first, *others = sorted({date for each in dates for date in each})
    return f"from {first} to {others[-1]}" if others else f"on {first}"


def called(name: str) -> str:
    """`train-ray` is dmx train with --launcher ray, and `train` as one process."""
    command, _, launcher = name.partition("-")
    if command in LAUNCHED:
        launcher = launcher or "inline"
    return f"dmx {command}" + (f", {launcher}" if launcher else "")
