"""Which packages are there, in which versions, and whether they can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from dmx import __version__
from dmx.doctor.report import Problem, Row, Section
from dmx.doctor.trials import Outcome, Task


@dataclass(frozen=True)
class Package:
    """A package that DMX uses.

    Attributes:
        name: as pip knows it.
        modules: what DMX imports of it, the package itself first; none: only files in it are read.
        row: under which it is listed.
        wanted_by: the commands that go without it; empty: DMX cannot do without it.
        install: what brings it; empty: what DMX itself requires.
        needs: packages without which it cannot be imported.
        others: names under which pip may know it too.
    """

    name: str
    modules: tuple[str, ...]
    row: str
    wanted_by: str = ""
    install: str = ""
    needs: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


REQUIRED = (
    Package("torch", ("torch",), "torch"),
    Package("triton", ("triton",), "triton"),
    Package("numba", ("numba",), "numba"),
    Package("timm", ("timm",), "timm", needs=("torch", "torchvision")),
    Package("torchvision", ("torchvision",), "others", needs=("torch",)),
    Package("numpy", ("numpy",), "others"),
    Package("scipy", ("scipy",), "others"),
    Package("pyarrow", ("pyarrow",), "others"),
    Package("pillow", ("PIL", "PIL.Image"), "others"),
    Package("pyyaml", ("yaml",), "others"),
    Package("safetensors", ("safetensors",), "others"),
    Package("simplejpeg", ("simplejpeg",), "others"),
    Package("tqdm", ("tqdm",), "others"),
)

_TRAINING = "dmx[{device}]"  # one extra for machines with a GPU, another for those without
_TRACKERS = "dmx train with log.trackers wandb or mlflow"
OPTIONAL = (
    Package("ray", ("ray", "ray.data", "ray.train"), "ray",
            "dmx embed, and dmx train and dmx cluster unless another --launcher is given", _TRAINING),
    Package("deepspeed", ("deepspeed",), "deepspeed", "dmx train", _TRAINING, needs=("torch",)),
    Package("tensorboard", ("tensorboard", "torch.utils.tensorboard"), "tensorboard", "dmx train", _TRAINING,
            needs=("torch",)),
    Package("anny", (), "anny", "dmx synth and dmx demo", "dmx[synth]"),  # to import it takes minutes
    Package("lmdb", ("lmdb",), "lmdb", "dmx ingest of LUPerson", "dmx[lmdb]"),
    Package("faiss-cpu", ("faiss",), "faiss", "dmx search, and ivf neighbours in dmx cluster and dmx train",
            "dmx[search]", others=("faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu", "faiss")),
    Package("av", ("av",), "video", "dmx ingest --video", "dmx[video]"),
    Package("transformers", ("transformers",), "video", "dmx ingest --video with --detector", "dmx[video]"),
    Package("onnx", ("onnx",), "onnx", "dmx export to ONNX", "dmx[export]"),
    Package("onnxruntime", ("onnxruntime",), "onnx", "dmx export to ONNX", "dmx[export]",
            others=("onnxruntime-gpu",)),
    Package("onnxscript", ("onnxscript",), "onnx", "dmx export to ONNX", "dmx[export]"),
    Package("wandb", ("wandb",), "tracking", _TRACKERS, "dmx[track]"),
    Package("mlflow-skinny", ("mlflow",), "tracking", _TRACKERS, "dmx[track]", others=("mlflow",)),
    Package("sqlalchemy", ("sqlalchemy",), "tracking", _TRACKERS, "dmx[track]"),
    Package("alembic", ("alembic",), "tracking", _TRACKERS, "dmx[track]", needs=("sqlalchemy",)),
)  # fmt: skip


def imports(packages: Sequence[Package]) -> list[Task]:
    """The tasks that import them; those that others need first."""
    ordered = sorted(packages, key=lambda package: len(package.needs))
    return [
        Task(package.name, "dmx.doctor.packages:imported", package.modules, package.needs)
        for package in ordered
        if package.modules
    ]


def imported(*modules: str) -> dict[str, Any] | None:
    """Import a package's modules: its version as it says itself; None where there is no such package."""
    try:
        package = importlib.import_module(modules[0])
    except ModuleNotFoundError as error:
        if error.name != modules[0]:
            raise
        return None
    for module in modules[1:]:
        importlib.import_module(module)
    return {"version": getattr(package, "__version__", None)}


def section(outcomes: Mapping[str, Outcome], build: str, has_gpu: bool) -> Section:
    """The versions, and what is wrong with them.

    Args:
        outcomes: of `imports`.
        build: what torch is built for, to be said beside its version.
        has_gpu: which extra to recommend.
    """
    rows = [
        Row("dmx", __version__),
        Row("python", f"{platform.python_version()}, {sys.executable}"),
    ]
    problems: list[Problem] = []
    states = [_State.of(package, outcomes) for package in (*REQUIRED, *OPTIONAL)]
    names = list(dict.fromkeys(state.package.row for state in states if state.package.row != "others"))
    for name in (*names, "others"):
        some = [state for state in states if state.package.row == name]
        text = ", ".join(state.told(named=name in ("others", "onnx", "tracking", "video")) for state in some)
        if name == "torch" and build:
            text += f", built for {build}"
        if missing := [state.package for state in some if not state.is_there]:
            text += _how_to_install(missing[0], has_gpu)
        rows.append(Row(name, text, {state.package.name: state.facts() for state in some}))
    for state in states:
        problems += state.problems()
    return Section("packages", rows, problems)


def _how_to_install(package: Package, has_gpu: bool) -> str:
    if not package.wanted_by:
        return ""
    install = package.install.format(device="gpu" if has_gpu else "cpu")
    return f'; for {package.wanted_by}: pip install "{install}"'


@dataclass(frozen=True)
class _State:
    """What is known of a package.

    Attributes:
        version: None: there is none, or it does not say.
        listed: pip knows of it.
        outcome: of importing it.
    """

    package: Package
    version: str | None
    listed: bool
    outcome: Outcome

    @staticmethod
    def of(package: Package, outcomes: Mapping[str, Outcome]) -> _State:
        listed = next(filter(None, map(_listed_version, (package.name, *package.others))), None)
        only_listed = Outcome(None if listed is None else {})
        outcome = outcomes[package.name] if package.modules else only_listed
        version = (outcome.result or {}).get("version") or listed
        return _State(package, version, listed is not None, outcome)

    @property
    def is_there(self) -> bool:
        return self.listed or self.outcome.works or (self.outcome.tried and self.outcome.error is not None)

    def told(self, named: bool) -> str:
        if not self.is_there:
            text = "not installed"
        elif self.outcome.works:
            text = self.version or "of unknown version"
        else:
            text = f"{self.version or 'of unknown version'}, {self._trouble()}"
        return f"{self.package.name} {text}" if named else text

    def _trouble(self) -> str:
        return "cannot be imported" if self.outcome.tried else str(self.outcome.error)

    def facts(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "works": self.outcome.works if self.is_there else None,
            "error": self.outcome.error,
            "import_s": round(self.outcome.seconds, 2),
        }

    def problems(self) -> list[Problem]:
        """What is wrong: missing, not to be imported, or of a version that DMX was not made for."""
        wanted = requirement(self.package.name) or self.package.name
        remedy = f'pip install "{wanted}"'
        if not self.is_there:
            required = not self.package.wanted_by
            return [Problem(self.package.name, wanted, "none installed", remedy)] if required else []
        if not self.outcome.works:
            found = self.outcome.error or "its files are missing, although pip lists it"
            remedy = f'pip install --force-reinstall "{wanted}"'
            importable = f"{self.package.name} {self.version or ''}".rstrip() + " to be importable"
            return [Problem(self.package.name, importable, found, remedy)] if self.outcome.tried else []
        if self.version is None or meets(self.version, wanted):
            return []
        return [Problem(self.package.name, wanted, self.version, remedy, fails=False)]


def _listed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirement(name: str) -> str | None:
    """What DMX requires of a package, such as `ray[train]>=2.60`, in whichever extra; None: nothing."""
    try:
        stated = importlib.metadata.requires("dmx") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for text in stated:
        wanted = text.partition(";")[0].strip()
        if re.split(r"[^\w.-]", wanted)[0] == name:
            return wanted
    return None


def meets(version: str, wanted: str) -> bool:
    """Whether a version satisfies the bounds of a requirement; ~= and != are not looked at."""
    number = _numbers(version)
    for sign, bound in re.findall(r"(?<![~!])(>=|<=|==|<|>)\s*([\d.]+)", wanted):
        pairs = list(zip_longest(number, _numbers(bound), fillvalue=0))
        order = next((-1 if ours < theirs else 1 for ours, theirs in pairs if ours != theirs), 0)
        if not {">=": order >= 0, "<=": order <= 0, "==": order == 0, "<": order < 0, ">": order > 0}[sign]:
            return False
    return True


def _numbers(version: str) -> list[int]:
    """The release of a version: 2.14.1+cpu is [2, 14, 1], and so is 2.14.1rc2."""
    return [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
