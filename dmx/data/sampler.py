"""Batches of P identities with K images each, a share of them from every domain.

A batch is a pure function of seed, epoch and step, so whoever saves these three numbers has saved the
sampler.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmx.errors import DmxError

# Keys of the random streams; they must differ, their values mean nothing.
_ORDER, _IMAGES = 1, 2


@dataclass(frozen=True)
class BatchIndices:
    """Which images make up a batch, all (B,); images of one identity stand together.

    Attributes:
        domain: int64, index of the domain.
        row: int64, row in that domain's split.
        label: int64, the label given for that row.
        position: int64, place in the batch of all ranks together.
    """

    domain: NDArray[np.int64]
    row: NDArray[np.int64]
    label: NDArray[np.int64]
    position: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.row.size)


@dataclass(frozen=True)
class _Identity:
    domain: int
    label: int
    rows: NDArray[np.int64]


class IdentityBatchSampler:
    """Draws P x K batches with a quota of identities for each domain.

    Every identity of a domain is visited once before any is visited again (a new order each pass and
    epoch), so visits within an epoch differ by at most one between two identities of a domain. A batch
    holds an identity twice only when its domain has fewer identities than its quota. The K images of an
    identity come from as many cameras as it has; an image is drawn twice only when the identity has fewer
    than K. A domain without any identity leaves its quota to the others.

    Args:
        identities_by_domain: for every domain (N,) int64 labels of its split's rows; -1 rows are not used.
        batch_identities: P, identities in a batch (over all ranks).
        instances: K, images of an identity in a batch.
        quota: share of the batch's identities for each domain, e.g. `(0.5, 0.5)`; None draws identities
            uniformly from the union of the domains, as the published code does.
        seed: of all randomness.
        cameras_by_domain: for every domain (N,) cameras of its rows, or None where they are not known.

    Raises:
        DmxError: fewer than two identities in all, or arguments that do not fit each other.
    """

    def __init__(
        self,
        identities_by_domain: Sequence[NDArray[np.int64]],
        *,
        batch_identities: int,
        instances: int,
        quota: Sequence[float] | None,
        seed: int,
        cameras_by_domain: Sequence[NDArray[np.integer] | None] | None = None,
    ) -> None:
        if batch_identities < 1 or instances < 1:
            raise DmxError(
                f"batch: wanted at least 1 identity x 1 image, found {batch_identities} x {instances}"
            )
        cameras = cameras_by_domain or [None] * len(identities_by_domain)
        if len(cameras) != len(identities_by_domain):
            raise DmxError(f"cameras: wanted {len(identities_by_domain)} domains, found {len(cameras)}")
        domains = [_identities(d, labels) for d, labels in enumerate(identities_by_domain)]
        used = (
            domains if quota is None else [d for d, share in zip(domains, quota, strict=False) if share > 0]
        )
        if sum(map(len, used)) < 2:
            raise DmxError(
                f"identities: wanted at least 2 to draw batches from, found {[len(d) for d in domains]} by "
                f"domain (quota {quota}); label more images, or make the clustering keep more"
            )
        self.batch_identities, self.instances, self.seed = batch_identities, instances, seed
        self._cameras = cameras
        if quota is None:
            pools = [[identity for domain in domains for identity in domain]]
            sizes = [batch_identities]
        else:
            pools = domains
            sizes = quota_sizes(quota, [len(domain) for domain in domains], batch_identities)
        self._orders = [
            _PassOrder(len(pool), size, (seed, index))
            for index, (pool, size) in enumerate(zip(pools, sizes, strict=True))
        ]
        self._pools = pools
        self.quota_sizes = tuple(sizes)

    def __len__(self) -> int:
        """Images in a batch, over all ranks."""
        return self.batch_identities * self.instances

    def batch(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> BatchIndices:
        """The batch of one step, or one rank's part of it.

        Ranks get whole identities, dealt out in turn so that every rank has its share of every domain.

        Raises:
            DmxError: P is not a multiple of `world`.
        """
        if self.batch_identities % world:
            raise DmxError(
                f"batch: wanted identities that divide among {world} ranks, found {self.batch_identities}; "
                "change batch identities or the number of ranks"
            )
        if not 0 <= rank < world:
            raise DmxError(f"rank: wanted 0 to {world - 1}, found {rank}")
        drawn: list[tuple[int, _Identity]] = []
        for pool, order in zip(self._pools, self._orders, strict=True):
            drawn += [(len(drawn) + i, pool[index]) for i, index in enumerate(order.batch(epoch, step))]
        mine = drawn[rank::world]
        rows = [self._draw(identity, epoch, step, place) for place, identity in mine]
        places = np.array([place for place, _ in mine], np.int64)
        within = np.arange(self.instances, dtype=np.int64)
        return BatchIndices(
            domain=np.repeat(np.array([identity.domain for _, identity in mine], np.int64), self.instances),
            row=np.concatenate(rows),
            label=np.repeat(np.array([identity.label for _, identity in mine], np.int64), self.instances),
            position=(places[:, None] * self.instances + within).ravel(),
        )

    def _draw(self, identity: _Identity, epoch: int, step: int, place: int) -> NDArray[np.int64]:
        """K rows of one identity."""
        rng = np.random.default_rng((self.seed, _IMAGES, epoch, step, place))
        rows = rng.permutation(identity.rows)
        cameras = self._cameras[identity.domain]
        if cameras is not None and rows.size > 1:
            # How many images of the same camera come before each: all firsts, then all seconds, and so on.
            rows = rows[np.argsort(_rank_within(cameras[rows]), kind="stable")]
        if rows.size < self.instances:
            missing = self.instances - rows.size
            rows = np.concatenate([rows, rng.choice(identity.rows, missing, replace=missing > rows.size)])
        return rows[: self.instances]


class _PassOrder:
    """In which order a pool's items are visited: pass after pass over all of them, `size` at a time."""

    def __init__(self, items: int, size: int, key: tuple[int, int]) -> None:
        self._items, self._size, self._key = items, size, key
        self._lock = threading.Lock()
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Items of one step: computed from the start of the epoch on, and kept for the steps after it."""
        end = (step + 1) * self._size
        with self._lock:
            if epoch != self._epoch:
                self._epoch, self._order = epoch, np.empty(0, np.int64)
            while self._order.size < end:
                passed = self._order.size // max(self._items, 1)
                self._order = np.concatenate([self._order, self._next_pass(epoch, passed)])
            return self._order[end - self._size : end]

    def _next_pass(self, epoch: int, passed: int) -> NDArray[np.int64]:
        seed, index = self._key
        order = np.random.default_rng((seed, _ORDER, index, epoch, passed)).permutation(self._items)
        begun = self._order.size % self._size
        if begun and self._items >= self._size:
            # The batch at the seam holds the last pass's tail: what is in it already must wait for the next
            # batch.
            used = np.isin(order, self._order[-begun:])
            free = np.flatnonzero(~used)[: self._size - begun]
            waits = np.ones(self._items, bool)
            waits[free] = False
            order = np.concatenate([order[free], order[waits]])
        return order


def _identities(domain: int, labels: NDArray[np.int64]) -> list[_Identity]:
    """The identities of one domain, by rising label."""
    labels = np.asarray(labels, dtype=np.int64)
    rows = np.argsort(labels, kind="stable")
    rows = rows[labels[rows] >= 0]
    names, starts = np.unique(labels[rows], return_index=True)
    groups = np.split(rows, starts[1:]) if names.size else []
    return [_Identity(domain, int(name), group) for name, group in zip(names, groups, strict=True)]


def _rank_within(values: NDArray[np.integer]) -> NDArray[np.int64]:
    """For each element, how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    _, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
    ranks = np.empty(values.size, np.int64)
    ranks[order] = np.arange(values.size) - np.repeat(starts, counts)
    return ranks


def quota_sizes(quota: Sequence[float], available: Sequence[int], batch_identities: int) -> list[int]:
    """Whole identities for each domain, by largest remainder; empty domains get none.

    Args:
        quota: share of the batch for each domain.
        available: identities that each domain has.
        batch_identities: P.

    Raises:
        DmxError: not one share a domain, a negative one, or none for a domain with identities.
    """
    if len(quota) != len(available):
        raise DmxError(f"quota: wanted {len(available)} shares, one a domain, found {len(quota)}")
    if any(share < 0 for share in quota):
        raise DmxError(f"quota: wanted shares of at least 0, found {tuple(quota)}")
    shares = np.array([share if count else 0.0 for share, count in zip(quota, available, strict=True)])
    if shares.sum() <= 0:
        raise DmxError(
            f"quota: wanted a share for a domain with identities, found {tuple(quota)} of {available}"
        )
    exact = batch_identities * shares / shares.sum()
    sizes = np.floor(exact).astype(int)
    largest = np.argsort(sizes - exact, kind="stable")
    sizes[largest[: batch_identities - sizes.sum()]] += 1
    return [int(size) for size in sizes]
