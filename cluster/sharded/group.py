"""The workers of a sharded clustering: W processes, the rows that each holds, and how tensors are exchanged.

Every method with an underscore-free name is collective: all workers call it, in the same order. A wait that
fails or takes longer than the process group's timeout ends in an error that names the rank, the host and what
was waited for, and so does every worker that waits for the one that failed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class WorkerLostError(RuntimeError):
    """A worker waited in vain for the others; says which, where, and for what."""


@dataclass(frozen=True)
class Group:
    """This worker among W.

    Attributes:
        process_group: of torch.distributed, with gloo for tensors on the CPU; None when alone or for the
            default group.
        rank: this worker; size: W.
        bounds: W + 1 row numbers: worker r holds rows bounds[r] to bounds[r + 1] - 1.
    """

    process_group: Any
    rank: int
    size: int
    bounds: tuple[int, ...]

    @staticmethod
    def of(rows: int, process_group: Any = None) -> Group:
        """The group in which this worker holds the next `rows` rows after those of the ranks before it."""
        if not dist.is_initialized() and process_group is None:
            return Group(None, 0, 1, (0, rows))
        rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
        alone = Group(process_group, rank, size, (0,) * (size + 1))
        counts = alone.collect([rows], "how many rows each worker holds")[:, 0].tolist()
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        return Group(process_group, rank, size, tuple(bounds))

    @property
    def rows(self) -> int:
        """N, over all workers."""
        return self.bounds[-1]

    @property
    def first(self) -> int:
        """The number of this worker's first row."""
        return self.bounds[self.rank]

    @property
    def own(self) -> int:
        """How many rows this worker holds."""
        return self.bounds[self.rank + 1] - self.bounds[self.rank]

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Name what is waited for in the error of a collective that fails."""
        try:
            yield
        except RuntimeError as error:
            host = os.uname().nodename
            raise WorkerLostError(
                f"worker {self.rank} of {self.size} on {host} waited in vain for {what}: {error}. "
                "Another worker failed, hangs or cannot be reached: its own log says more. Start the job "
                "again; if a step only takes longer than the group's timeout, raise the timeout"
            ) from error

    def collect(self, numbers: Sequence[int], what: str) -> torch.Tensor:
        """Everybody's numbers: (W, len(numbers)) int64 on the CPU."""
        own = torch.tensor([list(numbers)], dtype=torch.int64)
        if self.size == 1:
            return own
        out = own.new_empty((self.size, len(numbers)))
        with self.waiting(what):
            dist.all_gather(list(out.chunk(self.size)), own, group=self.process_group)
        return out

    def most(self, number: int, what: str) -> int:
        """The largest of everybody's numbers."""
        return int(self.collect([number], what).max())

    def deal(self, tensors: Sequence[torch.Tensor], counts: torch.Tensor, what: str) -> list[torch.Tensor]:
        """Send rows of tensors to the others and receive theirs.

        Args:
            tensors: (M, ...) each, on one device: first the rows for worker 0, then those for worker 1, ...
            counts: (W,) int64 on the CPU, how many rows each gets.
            what: is waited for.

        Returns:
            For each tensor the rows received, in the order of the senders.
        """
        return self.deal_counted(tensors, counts, what)[0]

    def deal_counted(
        self, tensors: Sequence[torch.Tensor], counts: torch.Tensor, what: str
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """As `deal`, and (W,) how many rows came from each."""
        if self.size == 1:
            return list(tensors), counts
        with self.waiting(what):
            received = torch.empty_like(counts)
            dist.all_to_all_single(received, counts, group=self.process_group)
            return [self._deal_one(t, counts, received) for t in tensors], received

    def answer(
        self, tensors: Sequence[torch.Tensor], counts: torch.Tensor, received: torch.Tensor, what: str
    ) -> list[torch.Tensor]:
        """As `deal` where it is known how many rows, (W,) `received`, come from each."""
        if self.size == 1:
            return list(tensors)
        with self.waiting(what):
            return [self._deal_one(t, counts, received) for t in tensors]

    def _deal_one(self, tensor: torch.Tensor, counts: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        # Moved as bytes, because not every backend knows every type.
        shape = (int(received.sum()), *tensor.shape[1:])
        out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        width = tensor.element_size() * (
            tensor[0].numel() if len(tensor) else out[0].numel() if len(out) else 0
        )
        dist.all_to_all_single(
            _as_bytes(out), _as_bytes(tensor),
            [width * n for n in received.tolist()], [width * n for n in counts.tolist()],
            group=self.process_group,
        )  # fmt: skip
        return out

    def swap(
        self, sent: Sequence[torch.Tensor], to: int | None, like: Sequence[torch.Tensor], source: int | None,
        what: str,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Send tensors to one worker and receive into tensors `like` from another; None for nobody."""
        return self.start_swap(sent, to, like, source, what).wait()

    def start_swap(
        self, sent: Sequence[torch.Tensor], to: int | None, like: Sequence[torch.Tensor], source: int | None,
        what: str,
    ) -> Swap:  # fmt: skip
        """As `swap`, under way while this worker goes on; all start and wait in the same order."""
        operations = []
        for tensors, peer, operation in ((sent, to, dist.isend), (like, source, dist.irecv)):
            if peer is not None:
                peer = self._peer(peer)
                operations += [
                    dist.P2POp(operation, tensor, peer, self.process_group)
                    for tensor in tensors
                    if tensor.numel()
                ]
        with self.waiting(what):
            requests = dist.batch_isend_irecv(operations) if operations else []
        return Swap(self, list(sent), list(like), requests, what)

    def _peer(self, rank: int) -> int:
        return rank if self.process_group is None else dist.get_global_rank(self.process_group, rank)

    def sum(self, counts: torch.Tensor, what: str) -> None:
        """Add up everybody's tensor, in place."""
        self._reduce(counts, dist.ReduceOp.SUM, what)

    def least(self, values: torch.Tensor, what: str) -> None:
        """Take the least of everybody's tensor, in place."""
        self._reduce(values, dist.ReduceOp.MIN, what)

    def _reduce(self, tensor: torch.Tensor, operation: Any, what: str) -> None:
        if self.size > 1:
            with self.waiting(what):
                dist.all_reduce(tensor, operation, group=self.process_group)

    def spread(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """The first worker's tensor, on all; theirs has the same shape and type."""
        if self.size > 1:
            with self.waiting(what):
                dist.broadcast(tensor, self._peer(0), group=self.process_group)
        return tensor


@dataclass(frozen=True)
class Swap:
    """An exchange under way. What is sent must not change before it has ended."""

    group: Group
    sent: list[torch.Tensor]
    received: list[torch.Tensor]
    requests: list[Any]
    what: str

    def wait(self) -> list[torch.Tensor]:
        """What was received."""
        with self.group.waiting(self.what):
            for request in self.requests:
                request.wait()
        return self.received


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the tensor's bytes; of nothing, nothing, whatever strides it came with."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return tensor.contiguous().flatten().view(torch.uint8)
