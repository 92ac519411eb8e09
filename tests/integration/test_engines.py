"""The two engines on two processes against plain torch on one, at every ZeRO stage.

One group of processes runs every case and prints its findings; each test asserts one of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)
STEPS, RESUME_AT = 20, 11
LR, WEIGHT_DECAY, CLIP = 1e-3, 1e-3, 0.05
BATCH = 16
# Twenty Adam steps move a parameter by up to 2e-2. Sums over processes round differently from sums over the
# batch, about 1e-7 of a gradient, which Adam's division by its root mean square keeps near 1e-4 of a step.
TOLERANCE = 5e-6
# bfloat16 keeps 8 bits: a hundredth or so of each gradient, of which Adam makes full steps where signs flip.
BF16_TOLERANCE = 1e-2


def _models(norm: bool = True) -> tuple[nn.Module, nn.Module]:
    """A small G and D; smooth, because one ReLU that flips would show as 3e-3."""
    torch.manual_seed(0)
    channels = nn.BatchNorm2d if norm else nn.Identity
    features = nn.BatchNorm1d if norm else nn.Identity
    generator = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        channels(8),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False),
        channels(16),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 12, bias=False),
        features(12),
    )
    discriminator = nn.Sequential(nn.Linear(12, 8, bias=False), features(8), nn.Tanh(), nn.Linear(8, 2))
    return generator, discriminator


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 12, 8, generator=generator)
    return images, torch.randint(0, 2, (BATCH,), generator=generator)


def _loss(b: Tensor, logits: Tensor, domains: Tensor) -> Tensor:
    return F.cross_entropy(logits, 1 - domains) + (b - 0.5).square().mean()


def _reference(norm: bool = True, clip: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """The same training in plain torch on the whole batch."""
    from dmx.model import frozen_statistics

    players = _models(norm)
    adams = [torch.optim.Adam(p.parameters(), lr=LR, weight_decay=WEIGHT_DECAY) for p in players]
    generator, discriminator = players
    for step in range(STEPS):
        images, domains = _batch(step)
        moves = 1 if step % 3 == 0 else 0
        for adam in adams:
            adam.zero_grad()
        if moves == 1:
            with frozen_statistics(generator), torch.no_grad():
                b = generator(images)
            F.cross_entropy(discriminator(b), domains).backward()
        else:
            b = generator(images)
            with frozen_statistics(discriminator):
                _loss(b, discriminator(b), domains).backward()
        if clip:
            nn.utils.clip_grad_norm_(players[moves].parameters(), clip)
        adams[moves].step()
    return players


class _Run:
    """The training under test, on this process's part of each batch."""

    def __init__(self, world: Any, norm: bool = True, **settings: Any) -> None:
        self.world, self.norm = world, norm
        self.settings = {"lr": LR, "weight_decay": WEIGHT_DECAY, **settings}
        self.moved_in_others_step = 0.0
        self.engines = self._make(*_models(norm))

    def _make(self, *players: nn.Module) -> list[Any]:
        from dmx.model import synchronise_batchnorm
        from dmx.train.engines import Engine, EngineSettings

        return [
            Engine(synchronise_batchnorm(player), EngineSettings(**self.settings), self.world)
            for player in players
        ]

    def train(self, first: int = 0, last: int = STEPS) -> _Run:
        for step in range(first, last):
            idle = self.engines[0 if step % 3 == 0 else 1]
            before = idle.module_state() if step in (3, 4) else None
            self._step(step)
            if before is not None:
                moved = _difference(before, idle.module_state())
                self.moved_in_others_step = max(self.moved_in_others_step, moved)
        return self

    def _step(self, step: int) -> None:
        generator, discriminator = self.engines
        images, domains = _batch(step)
        parts = self.world.size * self.settings.get("accumulation", 1)
        for part in range(self.world.rank, parts, self.world.size):
            x, y = images[part::parts], domains[part::parts]
            if step % 3 == 0:
                with generator.frozen() as frozen, torch.no_grad():
                    b = frozen(x)
                discriminator.backward(F.cross_entropy(discriminator(b), y))
                discriminator.step()
            else:
                b = generator(x)
                with discriminator.frozen() as frozen:
                    logits = frozen(b)
                generator.backward(_loss(b, logits, y))
                generator.step()

    def spoil(self, step: int, moves: int, *, gradient_alone: bool) -> bool:
        """A step in which one process alone is not finite; whether all processes say so of it."""
        generator, discriminator = self.engines
        inputs, engine = _batch(step)[0][self.world.rank :: self.world.size], generator
        if moves == 1:
            with generator.frozen() as frozen, torch.no_grad():
                inputs, engine = frozen(inputs), discriminator
        outputs = engine(inputs)
        # The root's gradient at 0 is infinite, the root is not.
        zero = (outputs * 0).sum()
        bad = zero.sqrt() if gradient_alone else zero / zero
        engine.backward(outputs.square().mean() + (bad if self.world.rank == 1 else zero))
        engine.step()
        return bool(engine.refused)

    def restart(self, **settings: Any) -> None:
        """Go on in fresh engines from the gathered state."""
        states = [engine.module_state() for engine in self.engines]
        moments = [engine.optimizer_state() for engine in self.engines]
        self.settings |= settings
        players = _models(self.norm)
        for player, state in zip(players, states, strict=True):
            player.load_state_dict(state)
        self.engines = self._make(*players)
        for engine, moment in zip(self.engines, moments, strict=True):
            engine.load_optimizer_state(*moment)

    def difference(self, players: tuple[nn.Module, nn.Module]) -> float:
        return max(
            _difference(player.state_dict(), engine.module_state())
            for player, engine in zip(players, self.engines, strict=True)
        )


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def _findings(world: Any) -> dict[str, float]:
    expected, clipped, plain = _reference(), _reference(clip=CLIP), _reference(norm=False)
    found = {
        "clipping matters": max(
            _difference(e.state_dict(), c.state_dict()) for e, c in zip(expected, clipped, strict=True)
        )
    }
    for stage in STAGES:
        run = _Run(world, zero_stage=stage).train()
        found[f"reference {stage}"] = run.difference(expected)
        found[f"idle player {stage}"] = run.moved_in_others_step
        resumed = _Run(world, zero_stage=stage).train(0, RESUME_AT)
        resumed.restart(zero_stage=(stage + 1) % len(STAGES))
        found[f"resumed at another stage {stage}"] = resumed.train(RESUME_AT).difference(expected)
        found[f"clipping {stage}"] = _Run(world, zero_stage=stage, clip_norm=CLIP).train().difference(clipped)
        accumulated = _Run(world, norm=False, zero_stage=stage, accumulation=2).train()
        found[f"accumulation {stage}"] = accumulated.difference(plain)
        found[f"bf16 {stage}"] = _Run(world, zero_stage=stage, precision="bf16").train().difference(expected)
        for gradient_alone in (False, True):
            spoilt = _Run(world, zero_stage=stage).train(0, RESUME_AT)
            told = [spoilt.spoil(STEPS, moves, gradient_alone=gradient_alone) for moves in (0, 1)]
            spoilt.train(RESUME_AT)
            moved = max(
                _difference(mine.module_state(), other.module_state())
                for mine, other in zip(spoilt.engines, run.engines, strict=True)
            )
            found[f"spoilt {stage} {gradient_alone}"] = moved if all(told) else torch.inf
    same = _Run(world, zero_stage=2).train(0, RESUME_AT)
    same.restart()
    found["resumed at the same stage"] = _difference(
        same.train(RESUME_AT).engines[0].module_state(),
        _Run(world, zero_stage=2).train().engines[0].module_state(),
    )
    return found


@pytest.fixture(scope="module")
def findings() -> dict[str, float]:
    """Run all cases in one group of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_two_engines_equal_plain_torch(findings: dict[str, float], stage: int) -> None:
    """Parameters and buffers of both players after alternating steps."""
    assert findings[f"reference {stage}"] <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_the_idle_player_does_not_move(findings: dict[str, float], stage: int) -> None:
    """D stands still in a G step and G in a D step, running statistics included."""
    assert findings[f"idle player {stage}"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_gathered_state_goes_on_at_another_zero_stage(findings: dict[str, float], stage: int) -> None:
    """Parameters, buffers and moments are complete: nothing is lost on the way to another stage."""
    assert findings[f"resumed at another stage {stage}"] <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("gradient_alone", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(
    findings: dict[str, float], stage: int, gradient_alone: bool
) -> None:
    """Of either player, where one process alone has a NaN, or an infinite gradient of a finite loss."""
    assert findings[f"spoilt {stage} {gradient_alone}"] == 0


def test_gathered_state_goes_on_exactly_at_the_same_stage(findings: dict[str, float]) -> None:
    """To the bit."""
    assert findings["resumed at the same stage"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_clipping_equals_torch(findings: dict[str, float], stage: int) -> None:
    """Clipping acts on the norm over all parameters and processes."""
    assert findings["clipping matters"] > 100 * TOLERANCE
    assert findings[f"clipping {stage}"] <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_equals_the_whole_batch(findings: dict[str, float], stage: int) -> None:
    """Two micro-batches on two processes make the step of the whole batch."""
    assert findings[f"accumulation {stage}"] <= TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_near_fp32(findings: dict[str, float], stage: int) -> None:
    """Not equal, or the setting would do nothing; and near."""
    assert TOLERANCE < findings[f"bf16 {stage}"] <= BF16_TOLERANCE


def _main() -> None:
    from dmx.distributed import world

    torch.set_num_threads(1)
    with world(timeout_s=120) as place:
        found = _findings(place)
        if place.leads:
            print(json.dumps(found))


if __name__ == "__main__":
    _main()
