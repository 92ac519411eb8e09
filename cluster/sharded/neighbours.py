"""Exact nearest neighbours over all shards: a half ring in which each pair of shards meets once.

Every worker first searches among its own rows. In step t worker r meets worker r + t (mod W), for t = 1 to
W / 2: it receives that worker's rows with the similarity of the worst neighbour each has so far, computes all
products of the two shards once (`kernels/cross.py`), joins what is new to its own lists and sends the other
worker what it found for theirs. In the last step of an even W two workers name each other; each then takes
half of their product.

Symbols: N rows in all, D their width, k neighbours, W workers.
The shard of the next step travels while this one is computed; the similarities that it brings are then a
step old, which lets a few more rows through and misses none.

Memory: own rows and lists, and two shards more with lists for one: O(N D / W + N k / W).
Network: (W - 1) / 2 shards of features, N D / 2 elements a worker, and 12 k bytes a row for every shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmx.cluster.sharded.group import Group, Swap
from dmx.kernels.cpu.candidates import LABEL, UNIT, pairs_within
from dmx.kernels.cross import NOBODY, Wanted, cross_knn, nearer
from dmx.kernels.knn import Neighbours, self_knn
from dmx.kernels.progress import adding_up


def sharded_knn(group: Group, features: torch.Tensor, squares: torch.Tensor, k: int) -> Neighbours:
    """The k nearest of all rows to every row of this worker, itself first.

    Args:
        group: the workers.
        features: (own rows, D), as `as_features` returns them.
        squares: (own rows,) float64.
        k: columns wanted; min(k, N) are returned.

    Returns:
        Neighbours (own rows, min(k, N)) whose indices are numbers among all N rows.
    """
    steps = [_Step(group, t, features, squares, k) for t in range(1, group.size // 2 + 1)]
    with adding_up(pairs_within(group.own) + sum(step.pairs for step in steps), LABEL, UNIT):
        best = _own(group, features, squares, k)
        coming = steps[0].start(best) if steps else None
        while coming is not None:
            step = steps.pop(0)
            visitor = Wanted(*coming.wait())
            coming = steps[0].start(best) if steps else None
            step.meet(best, visitor)
    best.similarities[:, 0] = 1
    columns = min(k, group.rows)
    return Neighbours(best.indices[:, :columns].contiguous(), best.similarities[:, :columns].contiguous())


def _own(group: Group, features: torch.Tensor, squares: torch.Tensor, k: int) -> Neighbours:
    """Lists of k columns from this shard alone; a row leads its own, whoever is equal to it."""
    device = features.device
    indices = torch.full((group.own, k), -1, dtype=torch.int32, device=device)
    similarities = torch.full((group.own, k), NOBODY, dtype=torch.float64, device=device)
    if group.own:
        found = self_knn(features, k, squares=squares)
        columns = found.indices.shape[1]
        indices[:, :columns] = found.indices + group.first
        similarities[:, :columns] = found.similarities
        similarities[:, 0] = 2
    return Neighbours(indices, similarities)


@dataclass(frozen=True)
class _Step:
    """One step of the ring: this worker receives a shard, and another one receives its own."""

    group: Group
    step: int
    features: torch.Tensor
    squares: torch.Tensor
    k: int

    @property
    def _source(self) -> int:
        """Whose shard is received."""
        return (self.group.rank + self.step) % self.group.size

    @property
    def _to(self) -> int:
        """Who receives this worker's."""
        return (self.group.rank - self.step) % self.group.size

    @property
    def _name(self) -> str:
        return f"in step {self.step} of {self.group.size // 2} of the neighbours"

    def start(self, best: Neighbours) -> Swap:
        """Send own rows on their way, and expect the others."""
        group = self.group
        own = (self.features, self.squares, best.similarities[:, -1].contiguous())
        sent = [t[: self._sent(self._to, group.rank)] for t in own]
        room = _room(own, self._sent(group.rank, self._source))
        return group.start_swap(sent, self._to, room, self._source,
                                f"the rows of worker {self._source} {self._name}")  # fmt: skip

    def meet(self, best: Neighbours, visitor: Wanted) -> None:
        """Join what this step finds to own lists, in both directions."""
        group, begun = self.group, self._compared(self.group.rank, self._source)
        mine = Wanted(self.features[begun:], self.squares[begun:], best.similarities[begun:, -1].contiguous())
        here, there = _cross(mine, group.first + begun, visitor, group.bounds[self._source], self.k)
        lists = (best.indices, best.similarities)
        back = group.swap(
            (there.indices, there.similarities), self._source,
            _room(lists, self._sent(self._to, group.rank)), self._to,
            f"what worker {self._to} found {self._name}",
        )  # fmt: skip
        _join(best, here, begun)
        _join(best, Neighbours(*back), 0)

    @property
    def _is_mutual(self) -> bool:
        """Whether the two that meet name each other, and take half of their product each."""
        return 2 * self.step == self.group.size

    @property
    def pairs(self) -> int:
        """Pairs of rows that this worker compares in it."""
        mine = self.group.own - self._compared(self.group.rank, self._source)
        return mine * self._sent(self.group.rank, self._source)

    def _rows(self, rank: int) -> int:
        return self.group.bounds[rank + 1] - self.group.bounds[rank]

    def _sent(self, to: int, source: int) -> int:
        """How many of its first rows `source` sends."""
        return self._rows(source) // 2 if self._is_mutual and to < source else self._rows(source)

    def _compared(self, rank: int, source: int) -> int:
        """The first of its own rows that `rank` compares with those from `source`."""
        return self._rows(rank) // 2 if self._is_mutual and rank > source else 0


def _room(like: tuple[torch.Tensor, ...], rows: int) -> list[torch.Tensor]:
    return [t.new_empty((rows, *t.shape[1:])) for t in like]


def _cross(
    mine: Wanted, my_first: int, theirs: Wanted, their_first: int, k: int
) -> tuple[Neighbours, Neighbours]:
    """Lists by numbers among all rows: of my rows among theirs, k columns of theirs among mine."""
    if len(mine.features) == 0 or len(theirs.features) == 0:
        return _nobody(mine, 0), _nobody(theirs, k)
    here, there = cross_knn(mine, theirs, k)
    whole = _nobody(theirs, k)
    columns = there.indices.shape[1]
    whole.indices[:, :columns] = _numbered(there.indices, my_first)
    whole.similarities[:, :columns] = there.similarities
    return Neighbours(_numbered(here.indices, their_first), here.similarities), whole


def _numbered(indices: torch.Tensor, first: int) -> torch.Tensor:
    return torch.where(indices < 0, indices, indices + first)


def _nobody(rows: Wanted, k: int) -> Neighbours:
    shape, device = (len(rows.features), k), rows.features.device
    indices = torch.full(shape, -1, dtype=torch.int32, device=device)
    return Neighbours(indices, torch.full(shape, NOBODY, dtype=torch.float64, device=device))


def _join(best: Neighbours, more: Neighbours, first: int) -> None:
    """Join lists to those of rows `first` and on, in place."""
    if len(more.indices) == 0 or more.indices.shape[1] == 0:
        return
    part = slice(first, first + len(more.indices))
    joined = nearer(Neighbours(best.indices[part], best.similarities[part]), more, best.indices.shape[1])
    best.indices[part], best.similarities[part] = joined.indices, joined.similarities
