"""The kernels on every device: which are tried, and how that reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dmx.doctor.report import Problem, Row, Section
from dmx.doctor.trials import Outcome, Task

OPERATIONS = ("self_knn", "knn", "k_reciprocal", "jaccard_pairs", "dbscan", "pseudo_labels")
NEEDED = ("torch", "triton", "numba", "numpy", "scipy")  # to import them

_CELL = 14  # characters that a device's column has


def tasks(device: str) -> list[Task]:
    """Every operation on a device, such as `cpu` or `cuda:0`."""
    return [
        Task(_name(operation, device), "dmx.doctor.operations:try_operation", (operation, device))
        for operation in OPERATIONS
    ]


def section(devices: Sequence[str], outcomes: Mapping[str, Outcome]) -> Section:
    """A table of operations and devices.

    Args:
        devices: those that were tried.
        outcomes: of their `tasks`.
    """
    rows, problems = [], []
    for operation in OPERATIONS:
        found = {device: outcomes[_name(operation, device)] for device in devices}
        text = "".join(f"{_cell(outcome):<{_CELL}}" for outcome in found.values()).rstrip()
        facts = {
            device: {"works": outcome.works, "error": outcome.error, **(outcome.result or {})}
            for device, outcome in found.items()
        }
        rows.append(Row(operation, text, facts))
        problems += [
            Problem(_name(operation, device), "its reference's result", outcome.error, _remedy(outcome.error))
            for device, outcome in found.items()
            if outcome.error is not None
        ]
    heading = "".join(f"{device:<{_CELL}}" for device in devices).rstrip()
    return Section("kernels", rows, problems, heading)


def not_tried(lacking: Sequence[str]) -> Section:
    """Said where packages do not work that the kernels need."""
    return Section("kernels", [Row("all", f"not tried, since {' and '.join(lacking)} cannot be imported")])


def _name(operation: str, device: str) -> str:
    return f"{operation} on {device}"


def _cell(outcome: Outcome) -> str:
    if outcome.result is None:
        return "failed"
    ms = outcome.result["ms"]
    return f"ok, {ms:.0f} ms" if ms >= 10 else f"ok, {ms:.2g} ms"


def _remedy(error: str) -> str:
    if "C compiler" in error:
        return "install gcc: Triton builds what starts its kernels with it"
    if "out of memory" in error or "NotEnoughMemory" in error:
        return "end what else uses this device"
    return "report it, with what dmx doctor --json prints"
