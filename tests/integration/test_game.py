"""The game of stage two: who is trained in which step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dmx.config import from_tree
from dmx.train.checkpoint import latest
from dmx.train.runlog import STEPS, describe_run, read_lines
from dmx.train.worker import train_worker


def stage_two(run: Path, settings: dict[str, Any], **schedule: Any) -> list[dict[str, Any]]:
    """The log of stage two, its discriminator taught in every fourth step."""
    torch.set_num_threads(1)
    describe_run(run, from_tree(("test", settings), ("change", {"schedule": schedule})))
    train_worker(run)
    return [line for line in read_lines(run / STEPS) if line["epoch"] >= 2]


def test_the_model_loses_no_step_to_a_discriminator_that_is_taught_beside_it(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    alone = stage_two(tmp_path / "alone", tiny_settings)
    beside = stage_two(tmp_path / "beside", tiny_settings, discriminator_alone=False)
    for lines in (alone, beside):
        assert [line["step"] for line in lines if "domain" in line] == [0, 4, 8] * 2
    assert [line["step"] for line in alone if "loss" in line] == [1, 2, 3, 5, 6, 7, 9, 10, 11] * 2
    assert [line["step"] for line in beside if "loss" in line] == [*range(12)] * 2
    # Before its first update the discriminator sees the same features either way.
    assert beside[0]["domain"] == alone[0]["domain"]
    assert beside[0]["domain_accuracy"] == alone[0]["domain_accuracy"]
    folder = latest(tmp_path / "beside")
    assert folder is not None
    learned = load_file(folder / "discriminator.safetensors")
    assert learned["1.num_batches_tracked"] == 6, "the model's own steps leave its statistics alone"
    assert not torch.equal(learned["1.weight"], torch.ones_like(learned["1.weight"]))
