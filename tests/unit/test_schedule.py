"""Learning rate and stages by epoch."""

from __future__ import annotations

from typing import Any

import pytest

from dmx.config import Config, from_tree
from dmx.train.schedule import (
    Stage,
    begins_anew,
    identity_weight,
    learning_rate,
    plays,
    stage,
    trains_discriminator,
    uses_target,
)

LR = 3.5e-4


def _config(**schedule: Any) -> Config:
    return from_tree(("test", {"data": {"target": "somewhere"}, "schedule": schedule}))


def test_warm_up_is_linear_and_milestones_divide() -> None:
    """The paper's schedule, epoch by epoch, as the published warm-up multi-step schedule gives it."""
    config = _config()
    expected = {
        0: 0.01 * LR,
        1: 0.109 * LR,
        5: 0.505 * LR,
        10: LR,
        39: LR,
        40: 0.1 * LR,
        59: 0.1 * LR,
        70: 0.01 * LR,
    }
    for epoch, rate in expected.items():
        assert learning_rate(config, epoch) == pytest.approx(rate, rel=1e-12), epoch


def test_no_warm_up_starts_at_the_full_rate() -> None:
    """`warmup_epochs: 0` divides nothing by zero."""
    assert learning_rate(_config(warmup_epochs=0), 0) == pytest.approx(LR)


def test_official_stage_two_stays_at_the_first_warm_up_rate() -> None:
    """3.5e-6 throughout, and every optimiser begins anew; `fixed` goes on."""
    official = from_tree(("test", {"compat": "official"}))
    assert [learning_rate(official, epoch) for epoch in (30, 45, 59)] == pytest.approx([3.5e-6] * 3)
    assert learning_rate(official, 29) == pytest.approx(LR)
    assert begins_anew(official, 30)
    assert not begins_anew(official, 29)
    assert not begins_anew(_config(), 45)


def test_stage_follows_epoch_and_pseudo_identities() -> None:
    """Without pseudo-identities there is one domain, whatever the epoch."""
    config = _config(stage_two_epoch=3, source_epochs=1)
    assert stage(config, 0, 0) is Stage.SOURCE
    assert stage(config, 2, 10) is Stage.ONE
    assert stage(config, 3, 10) is Stage.TWO
    assert stage(config, 3, 0) is Stage.SOURCE
    assert [uses_target(config, epoch) for epoch in (0, 1)] == [False, True]
    assert not uses_target(Config(), 5)


def test_identity_weight_and_discriminator_steps() -> None:
    """10, from stage two on 1; in stage two every 10th step is the discriminator's, in the others none."""
    config = _config()
    assert [identity_weight(config, epoch) for epoch in (0, 29, 30, 59)] == [10, 10, 1, 1]
    steps = [step for step in range(25) if trains_discriminator(config, Stage.TWO, step)]
    assert steps == [0, 10, 20]
    assert not any(trains_discriminator(config, s, 10) for s in (Stage.ONE, Stage.SOURCE))


def test_without_the_game_no_step_is_the_discriminators() -> None:
    """Every step trains the model."""
    config = from_tree(("test", {"loss": {"balance_weight": 0}}))
    assert not any(trains_discriminator(config, Stage.TWO, step) for step in range(25))
    assert not plays(config, Stage.TWO)


def test_the_identity_weight_does_not_jump_back_and_a_baseline_keeps_its_own() -> None:
    """It follows the epoch, not what clustering found in it; without a target there is no stage two."""
    config = _config(stage_two_epoch=3)
    assert stage(config, 4, 0) is Stage.SOURCE
    assert identity_weight(config, 4) == 1
    baseline = from_tree(("test", {"schedule": {"stage_two_epoch": 3}}))
    assert identity_weight(baseline, 4) == 10
