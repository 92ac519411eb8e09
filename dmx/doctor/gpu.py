"""GPUs, their driver and CUDA: what the driver says, and what torch makes of it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx.doctor.report import Problem, Row, gib
from dmx.doctor.trials import Outcome, Task, one_line

_SMI_S = 60.0  # a driver that does not answer may keep nvidia-smi for good
_DRIVER = Path("/proc/driver/nvidia/version")
_HIDING = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that name no GPU; SLURM sets the last

# Names of the tasks, apart from those of the packages.
BUILD, GPUS, BF16, DRIVER = "torch.version", "torch.cuda", "torch.cpu", "libcuda"

QUESTIONS = (
    Task(BUILD, "dmx.doctor.gpu:ask_build", needs=("torch",)),
    Task(GPUS, "dmx.doctor.gpu:ask_gpus", needs=("torch",)),
    # The trainer is asked, which chooses its precision by it, and imports the backbones of timm.
    Task(BF16, "dmx.doctor.gpu:ask_bf16", needs=("torch", "timm")),
    Task(DRIVER, "dmx.doctor.gpu:ask_driver"),
)


def ask_build() -> dict[str, Any]:
    """What torch is built for: versions of CUDA and NCCL, None where it has none."""
    import torch

    nccl = None
    if torch.version.cuda and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call] # torch has no types for it
        nccl = ".".join(map(str, version))
    return {"cuda": torch.version.cuda, "nccl": nccl}


def ask_gpus() -> dict[str, Any]:
    """The GPUs that torch can use, and what it warns of while it looks for them."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = [_ask_gpu(index) for index in range(count)]
    texts = dict.fromkeys(one_line(str(warning.message)) for warning in caught)
    return {"gpus": found, "warnings": list(texts)}


def _ask_gpu(index: int) -> dict[str, Any]:
    import torch

    with torch.cuda.device(index):
        torch.zeros(1, device="cuda")  # now it warns of a GPU that it is not built for
        free, total = torch.cuda.mem_get_info()
        return {
            "name": torch.cuda.get_device_name(),
            "memory_bytes": total,
            "free_bytes": free,
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }


def ask_bf16() -> dict[str, bool]:
    """Whether the processor multiplies bfloat16 itself."""
    from dmx.train.engines import computes_in_bf16

    return {"cpu": computes_in_bf16("cpu")}


def ask_driver() -> dict[str, str | None]:
    """The newest CUDA that the driver takes, such as 12.4; None where there is no driver."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"cuda": None}
    if status := library.cuDriverGetVersion(ctypes.byref(version)):
        raise RuntimeError(f"cuDriverGetVersion returns {status}")
    return {"cuda": f"{version.value // 1000}.{version.value % 1000 // 10}"}


@dataclass(frozen=True)
class Driver:
    """What can be known of the driver without CUDA.

    Attributes:
        version: None: there is none, or it does not say.
        gpus: names of the GPUs that it drives.
        error: what nvidia-smi complains of.
    """

    version: str | None = None
    gpus: tuple[str, ...] = ()
    error: str | None = None


def find_driver() -> Driver:
    """By nvidia-smi, or by what the kernel says of its modules where that is not installed."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return Driver(_version_of_module())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        return Driver(_version_of_module(), error=one_line(error))
    if done.returncode != 0:
        said = done.stdout.strip() or done.stderr.strip() or f"nvidia-smi ends with {done.returncode}"
        return Driver(_version_of_module(), error=one_line(said))
    lines = [line.split(", ", 1) for line in done.stdout.strip().splitlines()]
    return Driver(lines[0][0], tuple(line[-1] for line in lines)) if lines else Driver(_version_of_module())


def _version_of_module() -> str | None:
    try:
        text = _DRIVER.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else None


def usable(outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """The GPUs that torch can use, as `ask_gpus` describes them."""
    return list((outcomes[GPUS].result or {}).get("gpus", []))


def build(outcomes: Mapping[str, Outcome]) -> str:
    """What torch is built for, in words; empty where it does not say."""
    found = outcomes[BUILD].result
    if found is None:
        return ""
    return f"CUDA {found['cuda']}" if found["cuda"] else "the CPU alone"


def rows(driver: Driver, outcomes: Mapping[str, Outcome]) -> list[Row]:
    """GPUs, driver and CUDA."""
    found = [Row(f"cuda:{i}", _described(gpu), gpu) for i, gpu in enumerate(usable(outcomes))]
    if not found:
        unused = f"none that torch can use; the driver has {', '.join(driver.gpus)}"
        found = [Row("GPU", unused if driver.gpus else "none", list(driver.gpus))]
    newest = (outcomes[DRIVER].result or {}).get("cuda")
    text = driver.version or "none"
    if newest:
        text += f", takes CUDA up to {newest}"
    found.append(Row("driver", text, {"version": driver.version, "cuda": newest}))
    facts = outcomes[BUILD].result or {}
    text = f"torch is built for {build(outcomes)}" if facts else f"unknown: {outcomes[BUILD].error}"
    if facts.get("nccl"):
        text += f", with NCCL {facts['nccl']}"
    found.append(Row("CUDA", text, facts))
    return found


def _described(gpu: Mapping[str, Any]) -> str:
    memory = f"{gib(gpu['memory_bytes'])}, {gib(gpu['free_bytes'])} free"
    bf16 = "yes" if gpu["bf16"] else "no"
    return (
        f"{gpu['name']}, {memory}, compute capability {gpu['compute_capability']}, bf16 in hardware: {bf16}"
    )


def problems(driver: Driver, outcomes: Mapping[str, Outcome]) -> list[Problem]:
    """Why GPUs are not used that are there, and what torch warns of."""
    remedy = "compare driver and GPU, as nvidia-smi tells them, with https://pytorch.org/get-started/locally"
    found = [
        Problem(task, "an answer", str(outcomes[task].error), remedy)
        for task in (BUILD, GPUS, DRIVER)
        if outcomes[task].error is not None and outcomes[task].tried
    ]
    if driver.error is not None:
        # Machines without a GPU may have its tools: no failure by itself.
        remedy = "load the driver, or install it anew, if this machine has a GPU"
        found.append(Problem("nvidia-smi", "the GPUs", driver.error, remedy, fails=False))
    said = (outcomes[GPUS].result or {}).get("warnings", [])
    if driver.gpus and outcomes[GPUS].works and not usable(outcomes):
        if os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDING:
            return found  # whoever hides them knows
        found.append(_unusable(driver, outcomes, said))
    else:
        found += [Problem("torch.cuda", "no warning", text, "see what it asks for", False) for text in said]
    return found


def _unusable(driver: Driver, outcomes: Mapping[str, Outcome], said: list[str]) -> Problem:
    newest = (outcomes[DRIVER].result or {}).get("cuda")
    upto = f" up to {newest}" if newest else ""
    reason = f": {said[0]}" if said else ""
    return Problem(
        "GPU",
        f"torch to use {', '.join(driver.gpus)} with driver {driver.version}",
        f"torch built for {build(outcomes)}, which sees no GPU{reason}",
        f"install a torch for CUDA{upto} as https://pytorch.org/get-started/locally says, or a newer driver",
    )
