"""The Jaccard join of some rows with inverted lists and rows that were brought here: a shard's part.

The method is that of `jaccard.py`, in the same whole numbers: rows j > i that share at least m_min - T with
row i in the heads are candidates, and the distance of each is summed over its whole rows. There the lists and
the rows of all are at hand; here only those that these rows need.

Shapes: R rows of this shard, the first of them row `first` of N. Error: as `jaccard.py`.
Memory: 4 N bytes a thread on the CPU; on a GPU what the lists hold, three times over, for their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmx.kernels.cpu import jaccard as cpu
from dmx.kernels.device import takes_triton
from dmx.kernels.jaccard import collect_candidates, distances_of
from dmx.kernels.sparse import SparseRows, starts_of


@dataclass(frozen=True)
class Lists:
    """Inverted lists of C columns, or the heads of R rows.

    Attributes:
        starts: (C + 1 or R + 1,) int64.
        indices: (entries,) int32; of a list its rows, ascending; of a head its columns or their lists.
        weights: (entries,) int16, w of `heads.py`.
    """

    starts: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def part(self, begin: int, end: int) -> Lists:
        """Lists [begin, end)."""
        first, last = int(self.starts[begin]), int(self.starts[end])
        starts = self.starts[begin : end + 1] - first
        return Lists(starts, self.indices[first:last], self.weights[first:last])


@dataclass(frozen=True)
class Pairs:
    """Rows that others are paired with: `others[starts[r] : starts[r + 1]]`, int32, ascending."""

    starts: torch.Tensor
    others: torch.Tensor


def candidates(heads: Lists, lists: Lists, first: int, n: int, enough: int) -> Pairs:
    """Rows j > first + r that share at least `enough` with row r in the heads.

    Args:
        heads: of R rows.
        lists: of every column in them.
        first: number of the first row.
        n: rows in all.
        enough: m_min - T, as `jaccard.bounds` gives it.
    """
    if not takes_triton(heads.starts):
        starts, others = cpu.candidates(
            heads.starts.numpy(), heads.indices.numpy(), heads.weights.numpy(),
            lists.starts.numpy(), lists.indices.numpy(), lists.weights.numpy(), first, n, enough,
        )  # fmt: skip
        return Pairs(torch.from_numpy(starts), torch.from_numpy(others))
    rows = torch.arange(first, first + len(heads), device=heads.starts.device)
    own = torch.repeat_interleave(rows, heads.starts.diff(), output_size=len(heads.indices))
    # Where in its list the row that follows stands.
    number = torch.arange(len(lists), device=own.device)
    column = torch.repeat_interleave(number, lists.starts.diff(), output_size=len(lists.indices))
    keys = (column << 32) | lists.indices
    after = torch.searchsorted(keys, (heads.indices.long() << 32) | own, right=True)
    others, places = torch.unique(lists.indices, return_inverse=True)
    found = collect_candidates(
        heads.starts,
        heads.indices,
        heads.weights,
        lists.starts,
        places.int(),
        lists.weights,
        after,
        len(others),
        enough,
    )
    found = torch.unique(found)  # a row may have met another in several lists
    sizes = torch.bincount(found >> 32, minlength=len(heads))
    return Pairs(starts_of(sizes), others[found & 0xFFFFFFFF])


def pair_distances(rows: SparseRows, pairs: Pairs, n: int) -> torch.Tensor:
    """d of each of the first rows and those that it is paired with.

    Args:
        rows: rows that sum to 1; on a GPU columns ascend.
        pairs: of the first R rows; `others` are places in `rows`.
        n: columns in all.

    Returns:
        (P,) float64, in the order of the pairs.
    """
    if not takes_triton(rows.values):
        found = cpu.pair_distances(rows.on_cpu(), pairs.starts.numpy(), pairs.others.numpy(), n)
        return torch.from_numpy(found)
    own = torch.arange(len(pairs.starts) - 1, device=pairs.starts.device)
    own = torch.repeat_interleave(own, pairs.starts.diff(), output_size=len(pairs.others))
    longest = int(rows.starts.diff().max()) if len(rows) else 0
    return distances_of(rows, (own << 32) | pairs.others, longest)
