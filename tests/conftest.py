"""Opt-in tests, which tests run side by side, what every test shares, and Triton's interpreter.

Triton decides between interpreter and compiler when a kernel is defined. Without TRITON_INTERPRET in the
environment this process interprets, so that every kernel is tested in every run; tests that compile or use a
GPU do so in processes of their own, with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def mend_interpreter() -> None:
    """What Triton's interpreter (3.6 to 3.9) gets wrong for our kernels.

    It patches the whole language anew for every call of a device function, `tl.sum` among them, which takes
    4 ms each; and 3.6 makes no range() of numbers, since NumPy 2.5 turns no array into an int.
    """
    from triton.runtime import interpreter

    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    patched: dict[int, Any] = {}

    def patch_tensor_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    class Scope:
        def restore(self) -> None:
            while patched:
                patched.popitem()[1].restore()

    def patch_once(function: Any) -> Scope:
        key = id(function.__globals__)
        if key not in patched:
            patched[key] = patch(function)
        return Scope()

    interpreter._patch_lang = patch_once
    interpreter._patch_lang_tensor = patch_tensor_index


if os.environ.setdefault("TRITON_INTERPRET", "1") == "1":
    import triton.experimental.gluon
    import triton.language  # noqa: F401 - both define kernels of their own now, as interpreted ones

    import dmx.kernels.dbscan
    import dmx.kernels.jaccard
    import dmx.kernels.k_reciprocal
    import dmx.kernels.knn  # noqa: F401 - and so do ours

    mend_interpreter()
    del os.environ["TRITON_INTERPRET"]  # processes that tests start compile as usual
    INTERPRETED = True
else:
    INTERPRETED = False


# With `pytest -n 2 --dist loadscope` a file is what one worker runs. These files start hosts, SLURM or Ray,
# and wait for each other; and those that want other tools, which the first of them installs.
HEAVY = {
    "test_cluster_command", "test_crews", "test_demo", "test_embed_command", "test_full_disk", "test_hosts",
    "test_kill", "test_launch", "test_launch_scripts", "test_load_and_soak", "test_private_ray",
    "test_ray_cluster", "test_readme",
}  # fmt: skip
PEERS = {"test_peer_tools", "test_peer_weights"}


def group(nodeid: str) -> str:
    """Of the tests that one worker runs, one after the other."""
    file = Path(nodeid.partition("::")[0]).stem
    return "heavy" if file in HEAVY else "peers" if file in PEERS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By groups. The marks of `--dist loadgroup` are lost between pytest 9.2 and pytest-xdist 3.8."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, minutes each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU, found none")
    not_asked = pytest.mark.skip(reason="takes minutes: run with --run-slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(not_asked)


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Where tensors take the Triton kernels: the CPU by interpretation, or the GPU.

    The interpreter's time goes by operations, whatever their size, so it gets large steps.
    """
    import torch

    from dmx.kernels import candidates, rescore
    from dmx.kernels.device import interpreted

    if INTERPRETED:
        monkeypatch.setattr(candidates, "_CHUNK", 256)
        monkeypatch.setattr(rescore, "_CHUNK", 256)
        monkeypatch.setattr(rescore, "_RESCORED", 64)
        with interpreted():
            yield torch.device("cpu")
    else:
        yield torch.device("cuda")
