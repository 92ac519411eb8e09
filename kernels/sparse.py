"""Sparse rows: what k-reciprocal encoding and the Jaccard join hand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmx.kernels.cpu import k_reciprocal as cpu


@dataclass(frozen=True)
class SparseRows:
    """CSR rows: columns `indices[starts[i]:starts[i + 1]]`, each once, with their `values`.

    Attributes:
        starts: (N + 1,) int64.
        indices: (entries,) int32.
        values: (entries,) float64, on the same device as the others.
    """

    starts: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def rows(self) -> torch.Tensor:
        """(entries,) int64, the row of every entry."""
        numbers = torch.arange(len(self), device=self.starts.device)
        return torch.repeat_interleave(numbers, self.starts.diff(), output_size=len(self.indices))

    def on_cpu(self) -> cpu.SparseRows:
        """As NumPy arrays; a view where the tensors lie on the CPU already."""
        return cpu.SparseRows(*(part.cpu().numpy() for part in (self.starts, self.indices, self.values)))

    @staticmethod
    def of(rows: cpu.SparseRows) -> SparseRows:
        """From NumPy arrays, without a copy."""
        parts = (rows.starts, rows.indices, rows.values)
        return SparseRows(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def join_rows(parts: Sequence[SparseRows]) -> SparseRows:
    """Blocks of consecutive rows as one."""
    sizes = torch.cat([part.starts.diff() for part in parts])
    return SparseRows(
        starts_of(sizes),
        torch.cat([part.indices for part in parts]),
        torch.cat([part.values for part in parts]),
    )


def starts_of(sizes: torch.Tensor) -> torch.Tensor:
    """(N,) entries a row -> (N + 1,) int64 starts."""
    starts = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(sizes, 0, out=starts[1:])
    return starts
