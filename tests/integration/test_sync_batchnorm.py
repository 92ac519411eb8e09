"""Two processes with parts of a batch must do what one process does with all of it.

The file is its own worker: `python test_sync_batchnorm.py RANK RENDEZVOUS OUT`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmx.model import Discriminator, build_model, frozen_statistics, synchronise_batchnorm
from dmx.sections import ModelConfig

WORLD = 2
TOLERANCE = 1e-10  # float64: some hundred roundings of 1e-16 on values of order 1 to 100
STEPS = 3

Result = dict[str, Tensor]


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module
    if kind == "cumulative":
        module = nn.BatchNorm2d(4, momentum=None)
    elif kind == "plain":
        module = nn.BatchNorm2d(4, affine=False)
    elif kind == "untracked":
        module = nn.BatchNorm2d(4, track_running_stats=False)
    elif kind == "discriminator":
        module = Discriminator(4, hidden=(6, 5))
    else:
        config = ModelConfig(backbone="resnet18_ibn_a", backbone_args={"channels": (4, 4, 8, 8)})
        module = build_model(config)
    return module.double().train()


def batch(kind: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    shape = {"discriminator": (8, 4), "model": (8, 3, 32, 16)}.get(kind, (8, 4, 3, 2))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 5


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return y[1] if isinstance(y, tuple) else y


def steps(kind: str, module: nn.Module, rows: slice) -> Result:
    """A few steps of a loss that is a sum over samples, so that gradients of parts add up."""
    result: Result = {}
    for step in range(STEPS):
        x = batch(kind, step)[rows].requires_grad_()
        y = outputs(module, x)
        loss = (
            (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype).view(1, -1, *[1] * (y.ndim - 2)))
            .sin()
            .sum()
        )
        loss.backward()
        assert x.grad is not None
        result[f"y{step}"], result[f"dx{step}"] = y.detach(), x.grad
    with frozen_statistics(module):
        result["frozen"] = outputs(module, batch(kind, 9)[rows]).detach()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            result[f"grad {name}"] = parameter.grad
    for name, value in module.named_buffers():
        result[f"buffer {name}"] = value
    result["eval"] = outputs(module.eval(), batch(kind, 9)[rows]).detach()
    return result


CASES = [
    ("cumulative", 5),
    ("plain", 5),
    ("untracked", 4),
    ("plain", 0),  # a worker without samples
    ("discriminator", 5),
    ("model", 5),
]


def worker(rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    results = []
    for kind, cut in CASES:
        rows = slice(0, cut) if rank == 0 else slice(cut, None)
        results.append(steps(kind, synchronise_batchnorm(layer(kind)), rows))
    torch.save(results, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[list[Result]]:
    folder = tmp_path_factory.mktemp("gloo")
    outs = [folder / f"rank{rank}.pt" for rank in range(WORLD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder / "meet"), str(out)], env=environment
        )
        for rank, out in enumerate(outs)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{kind}-{cut}" for kind, cut in CASES])
def test_two_processes_equal_one(halves: list[list[Result]], case: int) -> None:
    kind, cut = CASES[case]
    whole = steps(kind, layer(kind), slice(None))
    first, second = halves[0][case], halves[1][case]
    assert set(whole) == set(first) == set(second)
    for name, expected in whole.items():
        if name.startswith("grad"):
            found = first[name] + second[name]
        elif name.startswith("buffer"):
            assert torch.equal(first[name], second[name]), f"workers disagree on {name}"
            found = first[name]
        else:
            assert len(first[name]) == cut
            found = torch.cat((first[name], second[name]))
        torch.testing.assert_close(
            found, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    assert Path(sys.argv[3]).exists()
