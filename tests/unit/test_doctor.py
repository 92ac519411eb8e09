"""`dmx doctor` says what there is, and everything that can be broken is broken here on purpose."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from dmx import __version__
from dmx.cli import main
from dmx.doctor import gpu, kernels, machine, operations, packages
from dmx.doctor.gpu import Driver
from dmx.doctor.operations import TRIALS, WrongResult, sample, try_operation
from dmx.doctor.report import Problem, Report, Row, Section
from dmx.doctor.trials import Outcome, Task, attempt, one_line
from dmx.kernels.dbscan import dbscan
from dmx.kernels.sparse import SparseRows

ROOT = Path(__file__).parents[2]
GIB = 2**30

# Functions to try, in a module that only the other process can import.
FAULTS = """
import os, sys, time
def works(*arguments): return {"arguments": arguments}
def is_missing(): return None
def prints(): print('{"result": 1}'); os.system("echo '{}'"); return {}
def raises(): raise RuntimeError("no such\\n   symbol")
def leaves(): sys.exit("gone")
def aborts(): print("too\\nbad", file=sys.stderr, flush=True); os.abort()
def vanishes(): os._exit(0)
def hangs(): time.sleep(100)
"""


def importable(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Modules that processes started from here find before any other."""
    folder.mkdir(exist_ok=True)
    for name, code in files.items():
        (folder / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def faults(*names: str, **needs: tuple[str, ...]) -> list[Task]:
    return [Task(name, f"faults:{name}", needs=needs.get(name, ())) for name in names]


def test_whatever_happens_is_told_and_the_rest_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importable(tmp_path, monkeypatch, faults=FAULTS)
    names = ("is_missing", "prints", "raises", "leaves", "aborts", "vanishes", "works")
    tasks = [*faults(*names), Task("with arguments", "faults:works", ("a", "b")), Task("no", "faults:no")]
    found = attempt(tasks, 60)
    assert list(found) == [task.name for task in tasks]
    errors = {name: outcome.error for name, outcome in found.items()}
    assert errors == {
        "is_missing": None,
        "prints": None,
        "raises": "RuntimeError: no such symbol",
        "leaves": "SystemExit: gone",
        "aborts": "its process was ended by signal 6 (Aborted): bad",
        "vanishes": "its process ended with status 0",
        "works": None,
        "with arguments": None,
        "no": "AttributeError: module 'faults' has no attribute 'no'",
    }
    assert found["with arguments"].result == {"arguments": ["a", "b"]}
    assert not found["is_missing"].works
    assert found["prints"].works


def test_what_hangs_is_ended_and_what_needs_it_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importable(tmp_path, monkeypatch, faults=FAULTS)
    tasks = faults("prints", "hangs", "raises", "works", raises=("hangs",), works=("raises",))
    found = attempt(tasks, 4)
    assert found["prints"].works
    assert found["hangs"].error == "did not return within 4 s"
    assert found["raises"] == Outcome(error="not tried, since hangs does not work", tried=False)
    assert found["works"] == Outcome(error="not tried, since raises does not work", tried=False)


def test_long_errors_keep_both_ends() -> None:
    line = one_line(ValueError(f"first\n{'middle ' * 200}\nlast"))
    assert len(line) < 320
    assert line.startswith("ValueError: first middle")
    assert line.endswith("middle last")


def test_packages_are_those_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(stated: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", text)[0] for text in stated}

    assert {package.name for package in packages.REQUIRED} == names(project["dependencies"])
    extras = {extra: names(stated) for extra, stated in project["optional-dependencies"].items()}
    told: dict[str, set[str]] = {}
    for package in packages.OPTIONAL:
        for device in ("cpu", "gpu"):
            extra = re.fullmatch(r"dmx\[(\w+)\]", package.install.format(device=device))
            assert extra
            told.setdefault(extra[1], set()).add(package.name)
    assert told == {extra: names for extra, names in extras.items() if extra not in ("docs", "dev", "fuzz")}


@pytest.mark.parametrize(
    ("version", "wanted", "does"),
    [
        ("2.14.1+cu130", "torch<2.16,>=2.11", True),
        ("2.16.0a0", "torch<2.16,>=2.11", False),
        ("2.9.1", "torch<2.16,>=2.11", False),
        ("2.11", "torch>=2.11.0", True),
        ("0.6.2", "anny==0.6.2", True),
        ("0.6.20", "anny==0.6.2", False),
        ("2.60.0", "ray[default,train]>=2.60", True),
        ("1.0", "torchvision", True),
        ("unknown", "tqdm>=4.66", False),
    ],
)
def test_versions_are_compared_by_numbers(version: str, wanted: str, does: bool) -> None:
    assert packages.meets(version, wanted) is does


def package_section(has_gpu: bool = False, **outcomes: Outcome) -> Section:
    """All packages work, but for those that are given."""
    every = {package.name: Outcome({"version": None}) for package in (*packages.REQUIRED, *packages.OPTIONAL)}
    return packages.section(every | outcomes, "CUDA 13.0", has_gpu)


def line_of(section: Section, name: str) -> str:
    [row] = [row for row in section.rows if row.name == name]
    return row.text


def test_a_missing_package_is_an_error_only_where_all_of_dmx_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "_listed_version", lambda name: None)
    missing = Outcome()
    section = package_section(deepspeed=missing, lmdb=missing, onnxruntime=missing, timm=missing)
    assert line_of(section, "deepspeed") == 'not installed; for dmx train: pip install "dmx[cpu]"'
    assert line_of(section, "lmdb") == 'not installed; for dmx ingest of LUPerson: pip install "dmx[lmdb]"'
    assert line_of(section, "anny").startswith("not installed; for dmx synth and dmx demo: pip install")
    assert line_of(section, "onnx") == (
        "onnx of unknown version, onnxruntime not installed, onnxscript of unknown version; "
        'for dmx export to ONNX: pip install "dmx[export]"'
    )
    assert line_of(section, "timm") == "not installed"
    assert [str(problem) for problem in section.problems] == [
        'timm: wanted timm>=1.0.20, found none installed; pip install "timm>=1.0.20"'
    ]
    assert section.problems[0].fails
    assert 'pip install "dmx[gpu]"' in line_of(package_section(True, ray=missing), "ray")


def test_a_package_that_cannot_be_imported_or_is_too_old_is_a_problem() -> None:
    section = package_section(
        torch=Outcome(error="OSError: libcudart.so.13: no such file"),
        timm=Outcome(error="not tried, since torch does not work", tried=False),
        ray=Outcome({"version": "2.9.0"}),
        lmdb=Outcome(),
    )
    assert line_of(section, "torch").endswith("cannot be imported, built for CUDA 13.0")
    assert line_of(section, "timm").endswith(", not tried, since torch does not work")
    found = {problem.about: problem for problem in section.problems}
    assert set(found) == {"torch", "ray", "lmdb"}
    assert found["torch"].fails
    assert found["torch"].found == "OSError: libcudart.so.13: no such file"
    assert found["torch"].remedy == 'pip install --force-reinstall "torch<2.16,>=2.11"'
    assert not found["ray"].fails
    assert found["ray"].wanted == "ray[default,train]>=2.60"
    assert found["lmdb"].found == "its files are missing, although pip lists it"


def machine_outcomes(gpus: list[dict[str, Any]], said: list[str], cuda: str | None) -> dict[str, Outcome]:
    return {
        gpu.BUILD: Outcome({"cuda": cuda, "nccl": "2.27.7" if cuda else None}),
        gpu.GPUS: Outcome({"gpus": gpus, "warnings": said}),
        gpu.BF16: Outcome({"cpu": True}),
        gpu.DRIVER: Outcome({"cuda": "12.4"}),
    }


H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "memory_bytes": 80 * GIB,
    "free_bytes": 79 * GIB,
    "compute_capability": "9.0",
    "bf16": True,
}


def test_gpus_driver_and_cuda_are_told() -> None:
    outcomes = machine_outcomes([H100, H100], [], "12.4")
    driver = Driver("550.54.15", ("NVIDIA H100 80GB HBM3",) * 2)
    told = {row.name: row.text for row in gpu.rows(driver, outcomes)}
    h100 = "NVIDIA H100 80GB HBM3, 80.0 GiB, 79.0 GiB free, compute capability 9.0, bf16 in hardware: yes"
    assert told == {
        "cuda:0": h100,
        "cuda:1": h100,
        "driver": "550.54.15, takes CUDA up to 12.4",
        "CUDA": "torch is built for CUDA 12.4, with NCCL 2.27.7",
    }
    assert gpu.problems(driver, outcomes) == []


def test_a_gpu_that_torch_cannot_use_is_an_error_unless_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = Driver("550.54.15", ("NVIDIA H100 80GB HBM3",))
    outcomes = machine_outcomes(
        [], ["The NVIDIA driver on your system is too old (found version 12040)"], "13.0"
    )
    [problem] = gpu.problems(driver, outcomes)
    assert problem.fails
    assert str(problem) == (
        "GPU: wanted torch to use NVIDIA H100 80GB HBM3 with driver 550.54.15, found torch built for "
        "CUDA 13.0, which sees no GPU: The NVIDIA driver on your system is too old (found version 12040); "
        "install a torch for CUDA up to 12.4 as https://pytorch.org/get-started/locally says, or a newer "
        "driver"
    )
    assert "built for the CPU alone" in str(gpu.problems(driver, machine_outcomes([], [], None))[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as SLURM names the GPU of a job
    assert gpu.problems(driver, outcomes) == [problem]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.problems(driver, outcomes) == []


def test_what_torch_warns_of_and_a_gpu_that_fails_are_told() -> None:
    [problem] = gpu.problems(
        Driver("550", ("old",)), machine_outcomes([H100], ["sm_50 is not compatible"], "13")
    )
    assert not problem.fails
    assert problem.found == "sm_50 is not compatible"
    broken = machine_outcomes([], [], "13.0") | {gpu.GPUS: Outcome(error="RuntimeError: CUDA error: busy")}
    [problem] = gpu.problems(Driver("550", ("busy",)), broken)
    assert problem.fails
    assert problem.found == "RuntimeError: CUDA error: busy"


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_the_driver_is_asked_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "echo '550.54.15, NVIDIA A100-SXM4-40GB'; echo '550.54.15, NVIDIA T4, small'")
    assert gpu.find_driver() == Driver("550.54.15", ("NVIDIA A100-SXM4-40GB", "NVIDIA T4, small"))
    smi(tmp_path, monkeypatch, "echo 'it could not communicate with the driver'; exit 9")
    monkeypatch.setattr(gpu, "_DRIVER", tmp_path / "none")
    driver = gpu.find_driver()
    assert driver == Driver(error="it could not communicate with the driver")
    [problem] = gpu.problems(driver, machine_outcomes([], [], None))
    assert not problem.fails  # a machine without a GPU may have its tools
    assert problem.found == "it could not communicate with the driver"


def test_the_driver_is_known_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "_DRIVER", tmp_path / "version")
    assert gpu.find_driver() == Driver()
    for kind in ("NVIDIA UNIX x86_64 Kernel Module", "NVIDIA UNIX Open Kernel Module for x86_64"):
        (tmp_path / "version").write_text(
            f"NVRM version: {kind}  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12.2.0"
        )
        assert gpu.find_driver() == Driver("550.54.15")


def test_the_cuda_of_the_driver_is_read_from_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802 - CUDA's name
            version._obj.value = 12040
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert gpu.ask_driver() == {"cuda": "12.4"}


def test_shared_memory_is_measured_by_what_ray_takes() -> None:
    assert machine.shared_memory_problems(free=8 * GIB, available=24 * GIB) == []
    [problem] = machine.shared_memory_problems(free=GIB // 16, available=10 * GIB)
    assert (problem.wanted, problem.found) == ("3.0 GiB free, which Ray takes for objects", "0.1 GiB")
    assert "--shm-size=3.3gb" in problem.remedy
    assert not problem.fails
    # However much memory there is, Ray is content with 10^10 bytes.
    assert machine.shared_memory_problems(free=10**10, available=2048 * GIB) == []
    assert machine.shared_memory_problems(free=10**10 - 1, available=2048 * GIB)


def test_shared_memory_is_judged_as_ray_judges_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same sizes with Ray's own code, which puts the store elsewhere where we warn."""
    from ray._private import services, utils

    for free, available in ((8, 24), (1, 10), (3, 10), (4, 10), (9, 2048), (10, 2048), (500, 2048)):
        monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda free=free: free * GIB)
        store = utils.resolve_object_store_memory(available * GIB)
        monkeypatch.setattr(
            "ray._common.utils.get_system_memory", lambda available=available: available * GIB
        )
        place = services.determine_plasma_store_config(store, str(tmp_path))[0]
        warned = bool(machine.shared_memory_problems(free * GIB, available * GIB))
        assert warned == (place != "/dev/shm"), (free, available)


def test_a_full_disk_is_told_before_ray_tells_it() -> None:
    assert machine.disk_problems(total=100 * GIB, free=6 * GIB) == []
    [problem] = machine.disk_problems(total=100 * GIB, free=4 * GIB)
    assert problem.found == "4.0% (4.0 GiB)"


def test_without_a_temporary_folder_there_is_still_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    monkeypatch.setattr("os.getcwd", none)
    section = machine.room()
    assert line_of(section, "this folder").startswith("cannot tell: FileNotFoundError")
    assert section.problems[0].about == "temporary folder"
    assert section.problems[0].fails


def test_every_operation_has_a_trial() -> None:
    assert tuple(TRIALS) == kernels.OPERATIONS


def test_the_sample_is_worth_comparing() -> None:
    """Clusters, border rows, outliers, pairs at distance 0, and three labelings that differ."""
    given = sample()
    tight, base, loose = given.labelings
    assert 10 < int(base.max()) + 1 < 40
    assert 0 < int((base < 0).sum()) < len(base) // 2
    assert not torch.equal(tight, base)
    assert not torch.equal(base, loose)
    core = (given.distances <= 0.60).sum(1) >= 4
    assert bool(((base >= 0) & ~core).any())
    assert bool((given.distances[given.close] == 0).any())


@pytest.mark.parametrize("name", kernels.OPERATIONS)
def test_every_operation_works_on_the_cpu(name: str) -> None:
    times = try_operation(name, "cpu")
    assert 0 < times["ms"] < 1e5
    assert times["first_call_s"] > 0


@pytest.mark.parametrize("name", [name for name in kernels.OPERATIONS if name != "pseudo_labels"])
def test_every_operation_works_in_triton(
    name: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the interpreter where there is no GPU, and on fewer people."""
    for setting, value in {"PEOPLE": 4, "IMAGES": 6, "QUERIES": 4, "K1": 8, "_TIMED": 1}.items():
        monkeypatch.setattr(operations, setting, value)
    monkeypatch.setattr(operations, "sample", sample.__wrapped__)
    assert try_operation(name, triton_device.type)


def test_wrong_neighbours_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operations.self_knn

    def swapped(features: torch.Tensor, k: int) -> Any:
        found = right(features, k)
        found.indices[7, [3, 4]] = found.indices[7, [4, 3]]
        return found

    def imprecise(features: torch.Tensor, k: int) -> Any:
        found = right(features, k)
        found.similarities[7, 3] += 1e-9
        return found

    monkeypatch.setattr(operations, "self_knn", swapped)
    with pytest.raises(WrongResult, match="other neighbours in 1 of 300 rows"):
        try_operation("self_knn", "cpu")
    monkeypatch.setattr(operations, "self_knn", imprecise)
    with pytest.raises(WrongResult, match="1 of 9000 similarities off by up to 1e-09"):
        try_operation("self_knn", "cpu")


def test_wrong_rows_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, join = operations.k_reciprocal, operations.jaccard_pairs

    def not_a_number(*arguments: Any) -> SparseRows:
        found = encode(*arguments)
        found.values[5] = torch.nan
        return found

    def one_less(v: SparseRows, max_distance: float) -> SparseRows:
        found = join(v, max_distance)
        starts = found.starts.clone()
        starts[starts == starts[-1]] -= 1
        return SparseRows(starts, found.indices[:-1], found.values[:-1])

    monkeypatch.setattr(operations, "k_reciprocal", not_a_number)
    with pytest.raises(WrongResult, match=r"1 of \d+ entries off by up to nan"):
        try_operation("k_reciprocal", "cpu")
    monkeypatch.setattr(operations, "jaccard_pairs", one_less)
    with pytest.raises(WrongResult, match=r"\d+ entries instead of \d+, 1 of which are missing"):
        try_operation("jaccard_pairs", "cpu")


def test_wrong_labels_are_noticed_also_at_a_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def wrong_at_last(pairs: SparseRows, radii: Any, min_samples: int) -> torch.Tensor:
        calls.append(pairs)
        return dbscan(pairs, radii, min_samples + (len(calls) == 3))

    monkeypatch.setattr(operations, "dbscan", wrong_at_last)
    with pytest.raises(WrongResult, match=r"other labels at \d+ of 900 places"):
        try_operation("dbscan", "cpu")


def test_a_failing_kernel_is_one_error_with_its_device() -> None:
    outcomes = {
        task.name: Outcome({"ms": 1.25, "first_call_s": 3.0})
        for device in ("cpu", "cuda:0")
        for task in kernels.tasks(device)
    }
    outcomes["knn on cuda:0"] = Outcome({"ms": 1234.5, "first_call_s": 3.0})
    outcomes["dbscan on cuda:0"] = Outcome(error="RuntimeError: Failed to find C compiler.")
    section = kernels.section(["cpu", "cuda:0"], outcomes)
    report = Report([section])
    assert line_of(section, "dbscan").split() == ["ok,", "1.2", "ms", "failed"]
    assert line_of(section, "knn").split() == ["ok,", "1.2", "ms", "ok,", "1234", "ms"]
    assert not report.works
    [problem] = report.problems
    assert problem.about == "dbscan on cuda:0"
    assert problem.remedy.startswith("install gcc")
    assert report.tree()["kernels"]["dbscan"]["cuda:0"] == {"works": False, "error": problem.found}


def test_warnings_come_after_errors_and_fail_nothing() -> None:
    warning = Problem("disk", "more", "less", "delete", fails=False)
    error = Problem("torch", "torch", "none", "install it")
    lines = [Row("long", "words " * 40)]
    assert Report([Section("room", lines, [warning])]).works
    text = Report([Section("room", lines, [warning, error])]).text()
    assert max(map(len, text.splitlines())) <= 110
    assert text.index("error") < text.index("warning")
    assert "  error          torch: wanted torch, found none; install it\n" in text
    assert text.endswith("errors: 1")


def test_seconds_have_to_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--timeout", "0"]) == 2
    assert capsys.readouterr().err == "dmx doctor: error: --timeout: wanted seconds, more than 0, found 0\n"


# What would go to another machine is refused, and noted.
OFFLINE = """
import os, sys
def watch(event, arguments):
    named = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
    if named or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        with open(os.environ["CALLS"], "a") as file:
            print(event, arguments, file=file)
        raise OSError("there is no network")
sys.addaudithook(watch)
"""


def test_the_command_works_here_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importable(tmp_path / "path", monkeypatch, sitecustomize=OFFLINE)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    command = [sys.executable, "-m", "dmx", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "calls").exists(), (tmp_path / "calls").read_text()
    lines = re.sub(r"\n {17}", " ", done.stdout).splitlines()  # rows that were too wide for a line
    for name, text in (
        ("dmx", re.escape(__version__)),
        ("processor", r".*\d+ of \d+ cores for this process, bf16 in hardware: (yes|no)"),
        ("memory", r"[\d.]+ GiB, [\d.]+ GiB available"),
        ("torch", re.escape(torch.__version__) + ", built for .+"),
        ("ray", r"\d+\.\d+.*"),
        ("deepspeed", r"\d+\.\d+.*"),
        ("this folder", rf"[\d.]+ GiB free of [\d.]+ GiB in {re.escape(str(tmp_path))}"),
        ("/dev/shm", r"[\d.]+ GiB free of [\d.]+ GiB"),
        *((operation, r"ok, [\d.]+ ms.*") for operation in kernels.OPERATIONS),
    ):
        assert any(re.fullmatch(f"  {name:<13}  {text}", line) for line in lines), (name, done.stdout)
    assert lines[-1] == "everything that was tried works"


def test_the_command_outlives_what_is_broken_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packages that raise, abort and lack another, and a kernel that counts one row too few."""
    wrong_dbscan = """
import sys
if any("try_operation" in argument for argument in sys.orig_argv):
    import dmx.kernels.dbscan as module
    right = module.dbscan
    module.dbscan = lambda pairs, radii, min_samples: right(pairs, radii, min_samples + 1)
"""
    importable(
        tmp_path,
        monkeypatch,
        sitecustomize=wrong_dbscan,
        lmdb="raise RuntimeError('undefined symbol')",
        faiss="import os; os.abort()",
        simplejpeg="import nothing_of_this_name",
    )
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["works"] is False
    found = {problem["about"]: problem for problem in report["problems"] if problem["kind"] == "error"}
    assert set(found) == {"lmdb", "faiss-cpu", "simplejpeg", "dbscan on cpu", "pseudo_labels on cpu"}
    assert found["lmdb"]["found"] == "RuntimeError: undefined symbol"
    assert found["faiss-cpu"]["found"].startswith("its process was ended by signal 6")
    assert found["simplejpeg"]["found"] == "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    assert found["dbscan on cpu"]["found"].startswith("WrongResult: other labels at ")
    assert report["kernels"]["dbscan"]["cpu"]["works"] is False
    assert report["kernels"]["knn"]["cpu"]["works"] is True
    assert report["packages"]["torch"]["torch"]["works"] is True


def test_without_torch_there_is_still_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importable(
        tmp_path, monkeypatch, torch="raise OSError('libcudart.so.13: cannot open shared object file')"
    )
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "found OSError: libcudart.so.13: cannot open shared object file; pip install" in text
    assert "  all            not tried, since torch cannot be imported" in text
    assert text.endswith("errors: 1\n")


@pytest.mark.gpu
def test_on_a_gpu_all_kernels_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["cuda:0"]["memory_bytes"] > GIB
    assert report["machine"]["driver"]["cuda"]
    assert all(report["kernels"][operation]["cuda:0"]["works"] for operation in kernels.OPERATIONS)
