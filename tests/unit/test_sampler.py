"""Sampler and loader: batches hold what was asked for, and depend only on seed, epoch, step and place."""

from __future__ import annotations

import io
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from dmx.data.loader import TrainLoader
from dmx.data.sampler import IdentityBatchSampler
from dmx.data.transforms import TrainTransform
from dmx.errors import DmxError


def labels_of(sizes: list[int], offset: int = 0, seed: int = 0) -> NDArray[np.int64]:
    """Labels of identities with so many images each, shuffled, with some unused rows between."""
    labels = np.repeat(np.arange(len(sizes)) + offset, sizes)
    labels = np.concatenate([labels, np.full(5, -1)])
    return np.random.default_rng(seed).permutation(labels).astype(np.int64)


SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=30)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 6), st.integers(1, 5), st.integers(0, 3), st.integers(0, 40))
def test_batches_hold_what_was_asked_for(
    left: list[int], right: list[int], half: int, instances: int, epoch: int, step: int
) -> None:
    domains = [labels_of(left), labels_of(right, 1000, 1)]
    sampler = IdentityBatchSampler(
        domains, batch_identities=2 * half, instances=instances, quota=(0.5, 0.5), seed=7
    )
    batch = sampler.batch(epoch, step)
    assert len(batch) == len(sampler) == 2 * half * instances
    assert batch.position.tolist() == list(range(len(batch)))
    for domain, row, label in zip(batch.domain, batch.row, batch.label, strict=True):
        assert domains[domain][row] == label >= 0
    groups = batch.label.reshape(-1, instances)
    assert (groups == groups[:, :1]).all()
    for domain, sizes in enumerate((left, right)):
        drawn = groups[batch.domain.reshape(-1, instances)[:, 0] == domain, 0]
        assert len(drawn) == half
        # An identity is there twice only when there are too few of them.
        assert len(set(drawn.tolist())) == half if len(sizes) >= half else set(drawn) <= set(domains[domain])
    for rows, domain, label in zip(
        batch.row.reshape(-1, instances), batch.domain[::instances], groups, strict=True
    ):
        available = int((domains[domain] == label[0]).sum())
        # An image is there twice only when the identity has too few.
        assert len(set(rows.tolist())) == min(available, instances)


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(0, 5), st.integers(1, 30))
def test_identities_are_visited_evenly(sizes: list[int], identities: int, epoch: int, steps: int) -> None:
    labels = labels_of(sizes)
    sampler = IdentityBatchSampler([labels], batch_identities=identities, instances=1, quota=(1.0,), seed=3)
    visits = Counter(dict.fromkeys(range(len(sizes)), 0))
    for step in range(steps):
        visits.update(sampler.batch(epoch, step).label.tolist())
    assert max(visits.values()) - min(visits.values()) <= 1


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50)), min_size=1, max_size=8)
)
def test_a_batch_is_a_pure_function(seed: int, visits: list[tuple[int, int]]) -> None:
    domains = [labels_of([4] * 9), labels_of([3] * 20, 100)]

    def make() -> IdentityBatchSampler:
        return IdentityBatchSampler(domains, batch_identities=8, instances=4, quota=(0.5, 0.5), seed=seed)

    used = make()
    for epoch, step in visits:  # in any order, with whatever was asked before
        left, right = used.batch(epoch, step), make().batch(epoch, step)
        assert left.row.tolist() == right.row.tolist()
        assert left.label.tolist() == right.label.tolist()


def test_seeds_epochs_and_steps_differ() -> None:
    def rows(seed: int, epoch: int, step: int) -> tuple[int, ...]:
        sampler = IdentityBatchSampler(
            [labels_of([6] * 40)], batch_identities=4, instances=4, quota=(1,), seed=seed
        )
        return tuple(sampler.batch(epoch, step).row.tolist())

    assert len({rows(s, e, t) for s in range(3) for e in range(3) for t in range(3)}) == 27


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_batch_by_whole_identities(world: int) -> None:
    sampler = IdentityBatchSampler(
        [labels_of([5] * 12), labels_of([5] * 12, 100)],
        batch_identities=8,
        instances=3,
        quota=(0.5, 0.5),
        seed=1,
    )
    whole = sampler.batch(2, 5)
    parts = [sampler.batch(2, 5, rank, world) for rank in range(world)]
    merged = {
        int(place): (int(row), int(label), int(domain))
        for part in parts
        for place, row, label, domain in zip(part.position, part.row, part.label, part.domain, strict=True)
    }
    assert [merged[place] for place in range(24)] == list(
        zip(whole.row.tolist(), whole.label.tolist(), whole.domain.tolist(), strict=True)
    )
    for part in parts:
        assert len(part) == 24 // world
        assert Counter(part.domain.tolist()) == {0: 12 // world, 1: 12 // world}
    with pytest.raises(DmxError, match="divide among 3 ranks"):
        sampler.batch(0, 0, 0, 3)
    with pytest.raises(DmxError, match="rank: wanted 0 to 1"):
        sampler.batch(0, 0, 2, 2)


def test_images_of_an_identity_come_from_different_cameras() -> None:
    labels = np.repeat(np.arange(6), 20)
    cameras = np.tile(np.repeat([0, 1, 2, 3], [14, 3, 2, 1]), 6)
    sampler = IdentityBatchSampler(
        [labels], batch_identities=6, instances=4, quota=(1,), seed=0, cameras_by_domain=[cameras]
    )
    seen: Counter[int] = Counter()
    for step in range(50):
        batch = sampler.batch(0, step)
        assert all(set(group) == {0, 1, 2, 3} for group in cameras[batch.row].reshape(6, 4).tolist())
        seen.update(batch.row.tolist())
    assert len(seen) > 110  # nearly all of the 120 images get their turn
    six = IdentityBatchSampler(
        [labels], batch_identities=2, instances=6, quota=(1,), seed=0, cameras_by_domain=[cameras]
    )
    for group in cameras[six.batch(0, 0).row].reshape(2, 6):
        assert np.bincount(group, minlength=4).tolist()[3] == 1
        assert np.bincount(group, minlength=4).max() == 2


def test_quota_is_shared_out_in_whole_identities() -> None:
    domains = [labels_of([2] * 50), labels_of([2] * 50, 100), labels_of([2] * 50, 200)]

    def sizes(quota: tuple[float, ...], identities: int = 16) -> tuple[int, ...]:
        return IdentityBatchSampler(
            domains, batch_identities=identities, instances=2, quota=quota, seed=0
        ).quota_sizes

    assert sizes((1, 1, 2)) == (4, 4, 8)
    assert sizes((1, 1, 1)) == (6, 5, 5)
    assert sizes((1, 0, 0)) == (16, 0, 0)
    assert sizes((0.1, 0.2, 0.7), 10) == (1, 2, 7)


def test_no_quota_draws_uniformly_from_the_union() -> None:
    sampler = IdentityBatchSampler(
        [labels_of([2] * 30), labels_of([2] * 10, 100)], batch_identities=8, instances=2, quota=None, seed=0
    )
    visits: Counter[int] = Counter()
    domains: Counter[int] = Counter()
    for step in range(5):
        batch = sampler.batch(0, step)
        visits.update(batch.label[::2].tolist())
        domains.update(batch.domain[::2].tolist())
    assert set(visits.values()) == {1}
    assert domains == {0: 30, 1: 10}


def test_an_empty_domain_leaves_its_quota_to_the_others() -> None:
    nothing = np.full(20, -1)
    sampler = IdentityBatchSampler(
        [labels_of([4] * 10), nothing], batch_identities=8, instances=2, quota=(0.5, 0.5), seed=0
    )
    assert sampler.quota_sizes == (8, 0)
    assert set(sampler.batch(0, 0).domain.tolist()) == {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quota": (0.5,)}, "wanted 2 shares"),
        ({"quota": (0.5, -0.5)}, "at least 0"),
        ({"quota": (0.0, 0.0)}, "identities: wanted at least 2"),
        ({"batch_identities": 0}, "batch: wanted"),
        ({"instances": 0}, "batch: wanted"),
        ({"cameras_by_domain": [None]}, "cameras: wanted 2 domains"),
        ({"identities_by_domain": [np.zeros(5, np.int64), np.full(5, -1)]}, r"found \[1, 0\] by domain"),
    ],
)
def test_what_does_not_fit_is_said(arguments: dict[str, object], message: str) -> None:
    everything: dict[str, object] = {
        "identities_by_domain": [labels_of([2] * 4), labels_of([2] * 4, 10)],
        "batch_identities": 4,
        "instances": 2,
        "quota": (0.5, 0.5),
        "seed": 0,
    } | arguments
    with pytest.raises(DmxError, match=message):
        IdentityBatchSampler(**everything)  # type: ignore[arg-type]


class MemorySplit:
    """A split in memory; one row may be broken."""

    def __init__(self, images: int, broken: int | None = None) -> None:
        self.name = "train"
        self.identities = np.arange(images, dtype=np.int64) // 4
        self.cameras = np.zeros(images, np.int32)
        self.keys = [f"image {row}" for row in range(images)]
        self._encoded = [self._png(row) for row in range(images)]
        if broken is not None:
            self._encoded[broken] = b"broken"
        self.threads: set[str] = set()

    @staticmethod
    def _png(seed: int) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 16, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def __len__(self) -> int:
        return len(self.keys)

    def image_bytes(self, row: int) -> bytes:
        self.threads.add(threading.current_thread().name)
        return self._encoded[row]


def make_loader(
    splits: list[MemorySplit], *, workers: int = 2, world: int = 1, rank: int = 0, seed: int = 5
) -> TrainLoader:
    sampler = IdentityBatchSampler(
        [split.identities + 100 * domain for domain, split in enumerate(splits)],
        batch_identities=4,
        instances=2,
        quota=(0.5, 0.5),
        seed=9,
    )
    return TrainLoader(
        splits, sampler, TrainTransform(24, 12), seed=seed, num_workers=workers, rank=rank, world=world
    )


def test_loader_gives_the_same_batches_ahead_alone_and_on_ranks() -> None:
    splits = [MemorySplit(24), MemorySplit(40)]
    with make_loader(splits, workers=0) as plain, make_loader(splits, workers=3) as ahead:
        one = list(plain.batches(1, 6))
        assert splits[0].threads == {"MainThread"}
        three = list(ahead.batches(1, 6))
        resumed = list(ahead.batches(1, 6, start=4))
        alone = ahead.batch(1, 4)
    assert len(one) == len(three) == 6
    for left, right in [*zip(one, three, strict=True), *zip(one[4:], resumed, strict=True), (one[4], alone)]:
        assert left["images"].shape == (8, 3, 24, 12)
        assert left["images"].dtype == torch.float32
        for name in ("images", "label", "domain", "row"):
            assert torch.equal(left[name], right[name])  # type: ignore[literal-required]
    with make_loader(splits, world=2, rank=0) as first, make_loader(splits, world=2, rank=1) as second:
        parts = [loader.batch(1, 4) for loader in (first, second)]
    whole = torch.empty_like(alone["images"])
    for part in parts:
        whole[part["position"]] = part["images"]
    assert torch.equal(whole, alone["images"])


def test_loader_augments_anew_by_seed_epoch_and_step() -> None:
    splits = [MemorySplit(4), MemorySplit(4)]
    batches = []
    for seed, epoch, step in ((5, 0, 0), (6, 0, 0), (5, 1, 0), (5, 0, 1)):
        with make_loader(splits, workers=0, seed=seed) as loader:
            batches.append(loader.batch(epoch, step)["images"])
    assert all(not torch.equal(batches[0], other) for other in batches[1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_at_its_step(workers: int) -> None:
    splits = [MemorySplit(8), MemorySplit(8, broken=5)]
    with make_loader(splits, workers=workers) as loader:
        batches = loader.batches(0, 100)
        with pytest.raises(DmxError, match="domain 1: image image 5: wanted an image that can be decoded"):
            for _ in batches:
                pass


def test_loader_ends_its_threads_when_left_early() -> None:
    before = threading.active_count()
    with make_loader([MemorySplit(8), MemorySplit(8)]) as loader:
        next(loader.batches(0, 1000))
    assert threading.active_count() == before
    with pytest.raises(DmxError, match="loader"):
        make_loader([MemorySplit(8), MemorySplit(8)], workers=-1)
