"""The launchers' own arguments, compiled for an H100 without one.

`test_compiled.py` compiles signatures that are written down; here the launchers themselves run, in a process
whose Triton believes in an H100, and every launch is compiled and then left out. That shows what a signature
cannot: arguments that are None, 1, or not aligned, options that a version does not know, and how many
variants of a kernel a search makes. Buffers stay zero, so results mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest


def launch_everything() -> dict[str, int]:
    """Runs the launchers on shapes of all kinds; returns how many variants of each kernel were compiled."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(Hopper())
    compile_, variants = JITFunction.run, {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_(self, *args, grid=grid, warmup=True, **options)
        variants.setdefault(self.__name__, set()).add(id(kernel))
        return kernel

    JITFunction.run = run
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *args, **options: empty(*args, **options).zero_()
    torch.empty_like = lambda *args, **options: empty_like(*args, **options).zero_()

    from dmx.kernels import candidates, device
    from dmx.kernels.cross import NOBODY, Wanted, cross_knn
    from dmx.kernels.dbscan import dbscan
    from dmx.kernels.jaccard import jaccard_pairs
    from dmx.kernels.k_reciprocal import k_reciprocal
    from dmx.kernels.knn import Neighbours, knn, self_knn
    from dmx.kernels.similarity import squared_lengths
    from dmx.kernels.sparse import SparseRows, starts_of

    device._interpreted.set(True)  # tensors on the CPU take the Triton launchers
    shapes = [(2, 1, 2, torch.float32), (70, 130, 64, torch.bfloat16), (600, 3, 31, torch.float16)]
    for n, d, k, dtype in shapes:
        x = torch.rand(n, d).to(dtype)
        self_knn(x, k)
        knn(x[:1].clone(), x, k)
        side = Wanted(x, squared_lengths(x), torch.full((n,), NOBODY).double())
        cross_knn(side, side, k)
        columns = min(k, n)
        lists = (torch.arange(n)[:, None] + torch.arange(columns)).remainder(n).int()
        near = Neighbours(lists, torch.ones(n, columns, dtype=torch.float64))
        k_reciprocal(x, near, k, 6, squares=squared_lengths(x))
    for config in candidates.SCAN_CONFIGS[1:]:
        candidates.use_scan_config(config)
        self_knn(torch.rand(600, 64), 30)
    for n in (1, 2, 40):
        jaccard_pairs(SparseRows(torch.arange(n + 1), torch.arange(n).int(), torch.ones(n).double()), 0.62)
    for n, pairs in ((1, 0), (2, 1), (5, 4)):
        starts = starts_of(torch.tensor([pairs] + [0] * (n - 1)))
        close = SparseRows(starts, torch.arange(1, pairs + 1).int(), torch.full((pairs,), 0.5).double())
        dbscan(close, [0.6], 1)
        dbscan(close, [0.1, 0.6, 0.7], 4)
    return {name: len(kernels) for name, kernels in variants.items()}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_every_kernel_is_launched(variants: dict[str, int]) -> None:
    assert set(variants) == {
        "_squares", "_hash", "_round_rows", "_scan", "_tighten", "_rescore", "_select", "_scan_exact",
        "_mutual", "_additions", "_members", "_weigh", "_order", "_average",
        "_candidates", "_degrees", "_union", "_flatten", "_borders",
    }  # fmt: skip  # but `_verify`, which needs candidates


def test_a_kernel_is_not_compiled_for_every_size(variants: dict[str, int]) -> None:
    """By rows, by columns or both, in passes, at two widths of the buffers, three other configurations."""
    assert variants["_scan"] <= 16
    assert variants["_flatten"] == variants["_union"] == variants["_candidates"] == 1


if __name__ == "__main__":
    print(json.dumps(launch_everything()))
