"""Puts the report together."""

from __future__ import annotations

from collections.abc import Callable

from dmx.doctor import gpu, kernels, machine, packages
from dmx.doctor.report import Report, Section
from dmx.doctor.trials import attempt


def examine(timeout_s: float, say: Callable[[str], None]) -> Report:
    """Look at this machine.

    Args:
        timeout_s: seconds that the packages, and the kernels of a device, may take.
        say: is told what takes a while.
    """
    say("importing the packages")
    required, optional = packages.imports(packages.REQUIRED), packages.imports(packages.OPTIONAL)
    # Optional packages come last: one that is missing ends the process, and torch is imported anew after it.
    outcomes = attempt([*required, *gpu.QUESTIONS, *optional], timeout_s)
    driver = gpu.find_driver()
    gpus = gpu.usable(outcomes)
    sections = [
        Section(
            "machine",
            [*machine.rows(outcomes[gpu.BF16]), *gpu.rows(driver, outcomes)],
            gpu.problems(driver, outcomes),
        ),
        packages.section(outcomes, gpu.build(outcomes), has_gpu=bool(gpus or driver.gpus)),
        machine.room(),
    ]
    if lacking := [name for name in kernels.NEEDED if not outcomes[name].works]:
        return Report([*sections, kernels.not_tried(lacking)])
    devices = ["cpu", *(f"cuda:{index}" for index in range(len(gpus)))]
    for device in devices:
        say(f"trying the kernels on {device}")
        outcomes |= attempt(kernels.tasks(device), timeout_s)
    return Report([*sections, kernels.section(devices, outcomes)])
