"""Rows by their number, wherever they are: ask their owners, who send them.

Worker r holds rows bounds[r] to bounds[r + 1] - 1 of a table. Every worker names the rows it needs, and all
call together, with no numbers where nothing is needed. What moves is the numbers and the rows themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmx.cluster.sharded.group import Group
from dmx.kernels.sparse import SparseRows, places_of, starts_of


@dataclass(frozen=True)
class Request:
    """Rows that this worker needs, and those that the others need from it.

    Attributes:
        wanted: (W,) int64 on the CPU, how many rows this worker needs from each.
        asked: (M,) int64, places among this worker's rows of all that is needed from it, by who needs it.
        asked_counts: (W,) int64 on the CPU, how many each needs from it.
        what: is waited for.
    """

    group: Group
    wanted: torch.Tensor
    asked: torch.Tensor
    asked_counts: torch.Tensor
    what: str

    @staticmethod
    def of(group: Group, numbers: torch.Tensor, what: str) -> Request:
        """Ask for rows by ascending `numbers` (R,) of any integer type."""
        edges = torch.tensor(group.bounds[1:-1], dtype=numbers.dtype, device=numbers.device)
        ends = torch.searchsorted(numbers, edges).cpu()
        whole = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(numbers))])
        wanted = whole.diff()
        received, counts = group.deal_counted([numbers], wanted, what)
        return Request(group, wanted, received[0].long() - group.first, counts, what)

    def rows(self, *tables: torch.Tensor) -> list[torch.Tensor]:
        """The rows needed of tables (own rows, ...) that all workers hold alike."""
        parts = [table[self.asked] for table in tables]
        return self.group.answer(parts, self.asked_counts, self.wanted, self.what)

    def sparse(self, starts: torch.Tensor, *entries: torch.Tensor) -> list[torch.Tensor]:
        """The rows needed of a sparse table: starts (own rows + 1,), and (entries,) of one kind or more.

        Returns:
            Starts (R + 1,) and the entries of the rows needed.
        """
        sizes = starts.diff()
        asked_sizes = sizes[self.asked]
        (wanted_sizes,) = self.group.answer([asked_sizes], self.asked_counts, self.wanted, self.what)
        places = places_of(starts[self.asked], asked_sizes)
        sent, received = (
            _sums(values, counts)
            for values, counts in ((asked_sizes, self.asked_counts), (wanted_sizes, self.wanted))
        )
        parts = [entry[places] for entry in entries]
        return [starts_of(wanted_sizes), *self.group.answer(parts, sent, received, self.what)]

    def sparse_rows(self, table: SparseRows) -> SparseRows:
        """The rows needed of sparse rows."""
        return SparseRows(*self.sparse(table.starts, table.indices, table.values))


def _sums(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The sum of each run of `counts` (W,) values, on the CPU."""
    ends = torch.cat([values.new_zeros(1), values.cumsum(0)])
    at = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return ends[at.to(ends.device)].diff().cpu()


def blocks(group: Group, rows_per_block: int, what: str) -> Sequence[tuple[int, int]]:
    """Blocks [begin, end) of this worker's rows, as many for everyone: those of a short shard end empty."""
    count = group.most(-(-group.own // rows_per_block), what)
    edges = [min(i * rows_per_block, group.own) for i in range(count + 1)]
    return list(itertools.pairwise(edges))
