"""The whole clustering by Triton kernels: the same labels as on the CPU, to the last image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dmx.cluster import jaccard_distance, jaccard_graph, pseudo_labels
from dmx.evaluation.rerank import reranked_blocks
from dmx.kernels import candidates
from dmx.kernels.candidates import ScanConfig


@pytest.fixture
def device(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(candidates, "BLOCK", 32)
    small = ScanConfig(rows=32, columns=32, depth=64, piece=16, group=2, warps=4, stages=2)
    monkeypatch.setattr(candidates, "_scan_config", small)
    return triton_device


def people(identities: int, images: int, d: int, spread: float, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.standard_normal((identities, d)), images, 0)
    return torch.from_numpy((x + spread * rng.standard_normal(x.shape)).astype(np.float32))


def on_numba(code: str, tmp_path: Path, x: torch.Tensor) -> np.ndarray:
    """What `code` leaves in `out`, from a process where nothing takes the Triton kernels."""
    np.save(tmp_path / "x.npy", x.numpy())
    script = "\n".join([
        "import numpy as np",
        "from dmx.cluster import jaccard_distance, pseudo_labels",
        "from dmx.evaluation.rerank import reranked_blocks",
        "x = np.load('x.npy')",
        code,
        "np.save('out.npy', out)",
    ])  # fmt: skip
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    return np.asarray(np.load(tmp_path / "out.npy"))


def test_labels_equal_those_of_the_cpu(device: torch.device, tmp_path: Path) -> None:
    x = people(9, 12, 24, 0.9)
    x[20], x[21], x[50] = x[19], x[19], x[3]
    code = "f = pseudo_labels(x, k1=14, k2=4); out = np.stack([f.labels, f.tight, f.base, f.loose])"
    found = pseudo_labels(x, k1=14, k2=4, device=device.type)
    assert len(set(found.base)) > 4
    for labels, same in zip(
        (found.labels, found.tight, found.base, found.loose), on_numba(code, tmp_path, x), strict=True
    ):
        np.testing.assert_array_equal(labels, same)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_distances_equal_those_of_the_cpu(dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    x = people(5, 9, 16, 0.8, 1).to(dtype)
    want = on_numba("out = jaccard_distance(x, 12, 3, device='cpu')", tmp_path, x)
    found = jaccard_distance(x, 12, 3, device=device.type)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-7)  # float32 of numbers 1e-12 apart
    close = jaccard_graph(x, 12, 3, 0.7, device=device.type)
    near = np.abs(want - 0.7) > 1e-7
    np.testing.assert_array_equal((close.toarray() > 0)[near], ((want <= 0.7) & (want > 0))[near])


def test_re_ranking_seeks_neighbours_on_the_device(device: torch.device, tmp_path: Path) -> None:
    x = people(8, 9, 16, 0.7, 2)
    x /= x.norm(dim=1, keepdim=True)
    code = "[(_, out)] = reranked_blocks(x[::3].copy(), x[1:].copy(), 8, 3, 0.3, 2**20)"
    want = on_numba(code, tmp_path, x)
    y = x.numpy()
    [(_, found)] = reranked_blocks(y[::3].copy(), y[1:].copy(), 8, 3, 0.3, 2**20, device.type)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
