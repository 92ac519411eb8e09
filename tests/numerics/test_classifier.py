"""The class-sharded classifier against one softmax over all classes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dmx.distributed import World
from dmx.train.classifier import Classifier, ClassifierSettings, share_of
from dmx.train.softmax import Pass, Softmax, block_rows, rows_gradient, sharded_cross_entropy

WIDTH, BATCH = 7, 12
# (source identities, pseudo-identities): even, uneven, fewer classes than processes, no pseudo-identities.
CASES = ((6, 6), (7, 4), (2, 1), (1, 2), (5, 0))
SMOOTHING, SCALE = 0.1, 0.5
# Sums of a few dozen terms of order 1: 100 roundings of float32 (6e-8) each way.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 6e-6}
# Of the temporaries of a block: room for one class, for three (which divide few of the shares), for all.
BLOCK_BYTES = (1, 3 * (8 * BATCH + 16 * WIDTH), 2**20)


def _problem(source: int, pseudo: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(source * 100 + pseudo)
    features = 4 * torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=generator)
    rows = torch.randn(source + pseudo, WIDTH, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, source + pseudo, (BATCH,), generator=generator)
    return features.to(dtype), rows.to(dtype), labels


def _unsharded(
    features: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients of features and rows, in float64 and by torch's own cross-entropy."""
    x, w = features.double().clone().requires_grad_(), rows.double().clone().requires_grad_()
    loss = F.cross_entropy(F.linear(x, w) * SCALE, labels, label_smoothing=SMOOTHING)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def _check_softmax(world: World) -> None:
    """In both precisions and all kinds of blocks."""
    for source, pseudo in CASES:
        for dtype in TOLERANCE:
            for block_bytes in BLOCK_BYTES:
                _check_shard(world, source, pseudo, dtype, block_bytes)


def _check_shard(world: World, source: int, pseudo: int, dtype: torch.dtype, block_bytes: int) -> None:
    features, rows, labels = _problem(source, pseudo, dtype)
    expected_loss, expected_x, expected_w = _unsharded(features, rows, labels)
    own = _own(len(rows), world)
    column = torch.where((labels >= own.start) & (labels < own.stop), labels - own.start, -1)
    x, mine, passes = features.clone().requires_grad_(), rows[own], list[Pass]()
    softmax = Softmax(len(rows), SMOOTHING, SCALE, world.size, block_bytes)
    # In two parts, as the classifier has them.
    loss = sharded_cross_entropy(x, [mine[:1], mine[1:]], column, softmax, passes)
    loss.backward()
    assert x.grad is not None
    if world.size > 1:
        dist.all_reduce(x.grad)
    step = block_rows(BATCH, WIDTH, block_bytes)
    found = [rows_gradient(passes, mine[at : at + step], at) for at in range(0, len(mine), step)]
    gradient = torch.cat([mine[:0], *found])
    for name, got, wanted in (
        ("loss", loss, expected_loss),
        ("features", x.grad, expected_x),
        ("rows", gradient, expected_w[own]),
    ):
        torch.testing.assert_close(
            got.detach().double(),
            wanted,
            atol=TOLERANCE[dtype],
            rtol=0.1 * TOLERANCE[dtype],
            msg=lambda text, name=name: f"{name} {world} {source, pseudo, dtype, block_bytes}: {text}",
        )


def _set_pseudo_rows(classifier: Classifier, rows: torch.Tensor, **options: bool) -> None:
    """Each process gives its share of all rows."""
    classifier.set_pseudo_rows(rows[share_of(len(rows), classifier.world)], len(rows), **options)


def _classifier(world: World, rows: torch.Tensor, source: int) -> Classifier:
    settings = ClassifierSettings(width=WIDTH, lr=0.01, weight_decay=1e-3, smoothing=SMOOTHING, scale=SCALE)
    classifier = Classifier(world, settings, rows[:source])
    _set_pseudo_rows(classifier, rows[source:])
    return classifier


def _check_loss_and_gradients(world: World) -> None:
    mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
    for source, pseudo in CASES:
        features, rows, labels = _problem(source, pseudo, torch.float32)
        expected_loss, expected_x, expected_w = _unsharded(features, rows, labels)
        classifier = _classifier(world, rows, source)
        x = features[mine].clone().requires_grad_()
        loss = classifier.loss(x, labels[mine])
        loss.backward()
        # The engine averages over processes, so each one's features get W times their gradient.
        torch.testing.assert_close(loss.detach().double(), expected_loss, atol=TOLERANCE[x.dtype], rtol=1e-6)
        torch.testing.assert_close(
            x.grad.double(), world.size * expected_x[mine], atol=TOLERANCE[x.dtype], rtol=1e-5
        )
        grads = _gradient(classifier).double()
        own = torch.cat(
            [torch.arange(len(rows))[:source][_own(source, world)], _own_pseudo(source, pseudo, world)]
        )
        torch.testing.assert_close(grads, expected_w[own], atol=TOLERANCE[x.dtype], rtol=1e-5)


def _gradient(classifier: Classifier) -> torch.Tensor:
    """Of all rows of this process, its blocks put together."""
    found = [gradient for _, _, gradient in classifier.gradients()]
    return torch.cat([torch.zeros(0, WIDTH), *found])


def _own(total: int, world: World) -> slice:
    return slice(total * world.rank // world.size, total * (world.rank + 1) // world.size)


def _own_pseudo(source: int, pseudo: int, world: World) -> torch.Tensor:
    return source + torch.arange(pseudo)[_own(pseudo, world)]


def _from_the_first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    box = [tensors]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _check_steps_and_state(world: World) -> None:
    """Updates equal one process's, and the state moves to any number of processes."""
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    for source, pseudo in CASES:
        features, rows, labels = _problem(source, pseudo, torch.float32)
        mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
        sharded = _classifier(world, rows, source)
        expected = _reference_steps(features, rows, labels, source, steps=5)
        for _ in range(3):
            sharded.loss(features[mine], labels[mine]).backward()
            sharded.step()
        state, steps = sharded.state()
        tensors = _from_the_first(state)  # the first process has them whole, as in a checkpoint
        assert steps == {"source": 3, "pseudo": 3}
        continued = Classifier(world, sharded.settings, torch.zeros(1, WIDTH))
        continued.load_state(tensors, steps)
        for _ in range(2):
            continued.loss(features[mine], labels[mine]).backward()
            continued.step()
        found = _from_the_first(continued.state()[0])
        whole = torch.cat([found["source"], found["pseudo"]])
        torch.testing.assert_close(whole.double(), expected, atol=2e-5, rtol=0)
        elsewhere = Classifier(alone, sharded.settings, torch.zeros(1, WIDTH))
        elsewhere.load_state(found, steps)
        assert torch.equal(elsewhere.rows["source"].exact(), found["source"])


def _check_bfloat16(world: World) -> None:
    """The loss of the rounded factors, and a state that goes on to the bit, from block to block."""
    for source, pseudo in CASES:
        features, rows, labels = _problem(source, pseudo, torch.float32)
        mine = slice(BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size)
        settings = ClassifierSettings(WIDTH, 0.01, 1e-3, SMOOTHING, SCALE, "bf16", BLOCK_BYTES[1])
        whole = Classifier(world, settings, rows[:source])
        _set_pseudo_rows(whole, rows[source:])
        loss = whole.loss(features[mine], labels[mine])
        expected, _, _ = _unsharded(features.bfloat16(), rows.bfloat16(), labels)
        torch.testing.assert_close(loss.detach().double(), expected, atol=1e-5, rtol=0)
        _steps(whole, features[mine], labels[mine], 2)
        state, steps = whole.state()
        continued = Classifier(world, settings, torch.zeros(1, WIDTH))
        continued.load_state(_from_the_first(state), steps)
        for classifier in (whole, continued):
            _steps(classifier, features[mine], labels[mine], 2)
        for part in whole.rows:
            assert torch.equal(whole.rows[part].exact(), continued.rows[part].exact())


def _steps(classifier: Classifier, features: torch.Tensor, labels: torch.Tensor, count: int) -> None:
    for _ in range(count):
        classifier.loss(features, labels).backward()
        classifier.step()


def _reference_steps(
    features: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor, source: int, steps: int
) -> torch.Tensor:
    w = rows.double().requires_grad_()
    adam = torch.optim.Adam([w], lr=0.01, weight_decay=1e-3)
    for _ in range(steps):
        adam.zero_grad()
        F.cross_entropy(F.linear(features.double(), w) * SCALE, labels, label_smoothing=SMOOTHING).backward()
        adam.step()
    return w.detach()


def test_sharded_classifier_equals_unsharded() -> None:
    """Loss, gradients and updates over 4, then 3, then 2 processes, with uneven and empty shares."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["4", "3", "2"]


def test_one_process_equals_unsharded() -> None:
    """The same without a process group."""
    world = World(0, 1, 0, 1, torch.device("cpu"))
    _check_softmax(world)
    _check_loss_and_gradients(world)
    _check_steps_and_state(world)
    _check_bfloat16(world)


def test_source_rows_keep_their_moments_and_pseudo_rows_start_anew() -> None:
    """A new epoch replaces the pseudo-identities alone; the published way forgets everything."""
    world = World(0, 1, 0, 1, torch.device("cpu"))
    features, rows, labels = _problem(6, 6, torch.float32)
    classifier = _classifier(world, rows, 6)
    for _ in range(2):
        classifier.loss(features, labels).backward()
        classifier.step()
    before, _ = classifier.state()
    centroids = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    _set_pseudo_rows(classifier, centroids)
    after, steps = classifier.state()
    assert steps == {"source": 2, "pseudo": 0}
    assert torch.equal(after["source"], before["source"])
    assert torch.equal(after["source.exp_avg_sq"], before["source.exp_avg_sq"])
    assert torch.equal(after["pseudo"], centroids)
    assert classifier.classes == 9
    _set_pseudo_rows(classifier, centroids, forget_moments=True)
    assert classifier.state()[1] == {"source": 0, "pseudo": 0}


def _main() -> None:
    """The checks over 4 processes, then over the first 3, then over the first 2 of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for size in (4, 3, 2):
        _check_in_group(size)
        if not dist.is_initialized():
            return
        if os.environ["RANK"] == "0":
            print(size)
    dist.destroy_process_group()  # one that lives until the interpreter ends may abort it: its threads run on


def _check_in_group(size: int) -> None:
    rank = int(os.environ["RANK"])
    if dist.get_world_size() != size:
        store = [tempfile.mkdtemp() + "/store"]
        dist.broadcast_object_list(store)
        dist.destroy_process_group()
        if rank >= size:
            return
        dist.init_process_group("gloo", init_method=f"file://{store[0]}", rank=rank, world_size=size)
    world = World(rank, size, rank, size, torch.device("cpu"), control=dist.new_group(backend="gloo"))
    _check_softmax(world)
    _check_loss_and_gradients(world)
    _check_steps_and_state(world)
    _check_bfloat16(world)


if __name__ == "__main__":
    _main()
