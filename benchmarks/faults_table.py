"""The table of `faults.py`."""

from __future__ import annotations

from typing import Any

from cells import head, line

NONE = "none"
STRUCK = {
    "worker killed": "a worker is killed",
    "host killed": "a host is killed",
    "host cut off": "a host is cut off",
    "head killed": "the head is killed, and the command given again without it",
}


def faults(results: dict[str, Any]) -> str:
    """How long each job takes from each fault to its end."""
    rows = {(row["fault"], row["job"]): row for row in results["rows"]}
    names = list(dict.fromkeys(row["job"] for row in results["rows"]))
    lines = head("from the fault to the end, s", *(f"dmx {name}" for name in names), texts=1)
    for fault, told in STRUCK.items():
        cells = [f"{row['after_s']:.0f}" if (row := rows.get((fault, name))) else "" for name in names]
        lines.append(line(told, *cells))
    whole = ", ".join(
        f"{rows[NONE, name]['total_s']:.0f} s for dmx {name}" for name in names if (NONE, name) in rows
    )
    same = "Every result is" if all(row["same"] for row in results["rows"]) else "NOT every result is"
    machine = results["machine"]
    lines += [
        "",
        f"{same} that of one host, to the bit. {machine['hosts']} hosts as namespaces of one machine of "
        f"{machine['cores']} cores, busy with other work besides; undisturbed, "
        f"the start of Ray included, the jobs take {whole}. A host that is silent counts as gone after 30 s "
        "(DMX_ALIVE_S); `dmx embed` ends then with an error after its --timeout (here 60 s), and is given "
        "again with the hosts that are left. `python benchmarks/faults.py` measures it.",
    ]
    return "\n".join(lines)
