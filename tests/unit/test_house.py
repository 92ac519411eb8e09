"""The rules of the house: what may import what, and nothing heavy at import time."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [path for folder in ("dmx", "cluster", "kernels") for path in (ROOT / folder).rglob("*.py")]


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def users_of(package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in CODE
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


def test_dependencies_point_one_way() -> None:
    for path in CODE:
        folder = path.relative_to(ROOT).parts[0]
        dmx_imports = {name for name in imports(path) if name == "dmx" or name.startswith("dmx.")}
        if folder == "kernels":
            allowed = ("dmx.kernels",)
        elif folder == "cluster":
            allowed = ("dmx.kernels", "dmx.cluster")
        else:
            continue
        wrong = {name for name in dmx_imports if name != "dmx" and not name.startswith(allowed)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_only_the_engine_module_imports_deepspeed() -> None:
    assert users_of("deepspeed") == {"dmx/train/engines.py"}


def test_only_launching_and_embedding_import_ray() -> None:
    assert users_of("ray") == {
        "dmx/extraction/feed.py",
        "dmx/extraction/pipeline.py",
        "dmx/ray_cluster.py",
        "dmx/ray_workers.py",
    }


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, dmx, dmx.cli; dmx.cli.build_parser(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    ).stdout.split()
    heavy = {"torch", "numba", "ray", "deepspeed", "timm", "pyarrow", "faiss", "scipy"} & set(loaded)
    assert not heavy


def test_cores_are_counted_in_one_way() -> None:
    """A process pinned to one core counts one, wherever the count is asked for."""
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    code = f"{pin}; import dmx.cores; print(dmx.cores.cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert not [path for path in CODE if "cpu_count" in path.read_text()]


@pytest.mark.parametrize("name", ["kernels", "cluster"])
def test_mapped_folders_are_not_top_level_names(name: str, tmp_path: Path) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_every_package_is_named_in_setup() -> None:
    found = {
        ".".join(("dmx", *path.parent.relative_to(ROOT / "dmx").parts))
        for path in (ROOT / "dmx").rglob("__init__.py")
    } | {"dmx.kernels", "dmx.cluster"}
    for package in found:
        assert f'"{package}"' in (ROOT / "setup.py").read_text(), f"setup.py does not install {package}"


def test_files_stay_readable() -> None:
    too_long = {str(path.relative_to(ROOT)): n for path in CODE if (n := path.read_text().count("\n")) > 420}
    assert not too_long, f"split these: {too_long}"


def test_nothing_but_a_tracker_imports_wandb() -> None:
    """It makes temporary folders when it is imported, which killed processes leave behind."""
    code = (
        "import sys, dmx.model, dmx.deployment.onnx; from dmx.train.engines import import_deepspeed; "
        "import_deepspeed(); assert 'wandb' not in sys.modules; import wandb"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
