"""Steps that are not finite: told with their images, then left out or the end of the run (`on_nan`).

Such a step changed nothing (see `dmx.train.step`). The run's latest checkpoint is from before it and goes on
in the same way, up to this step: with `--resume --set on_nan=skip` behind it.
"""

from __future__ import annotations

import math

from dmx.errors import DmxError
from dmx.names import printable
from dmx.train.data import EpochLabels
from dmx.train.runlog import NOT_FINITE
from dmx.train.step import NotFiniteError
from dmx.train.trainer import Trainer

# A model whose parameters have run away is not finite at any batch: leaving out more would never end.
MOST_IN_A_ROW = 10
SHOWN = 3


def leave_out(
    trainer: Trainer, epoch: int, step: int, labels: EpochLabels | None, error: NotFiniteError
) -> dict[str, float]:
    """Write a step that was not finite into the run's `not_finite.jsonl`, and say what to log of it.

    Args:
        trainer: the run.
        epoch, step: which step.
        labels: pseudo-labels of the epoch.
        error: what was found.

    Returns:
        Those of its losses that are finite, and `left_out`, 1.

    Raises:
        DmxError: `on_nan` is stop, or the MOST_IN_A_ROW steps before it were left out, too.
    """
    images = trainer.data.images_of(epoch, step, labels)
    if trainer.log is not None:
        found = {name: str(value) for name, value in error.losses.items()}
        trainer.log.not_finite(
            {
                "global_step": trainer.progress.global_step,
                **{"epoch": epoch, "step": step, "losses": found, "images": images},
            }
        )
    trainer.left_out_in_a_row += 1
    what = f"epoch {epoch}, step {step}: {error}"
    shown = printable(", ".join(images[:SHOWN]))
    where = f"Its {len(images)} images ({shown}, ...) are in {trainer.run / NOT_FINITE}"
    remedy = "lower optim.lr, set optim.clip_norm, or train in fp32"
    if trainer.config.on_nan == "stop":
        raise DmxError(
            f"{what}. {where}; nothing was changed by it. Go on from the last checkpoint with --resume, and "
            f"{remedy}, or leave such steps out with --set on_nan=skip"
        )
    if trainer.left_out_in_a_row > MOST_IN_A_ROW:
        raise DmxError(
            f"{what}, and so were the {MOST_IN_A_ROW} steps before it, which on_nan left out. {where}. Go on "
            f"from the last checkpoint with --resume, and {remedy}"
        )
    record = trainer.progress.record
    record["left_out"] = record.get("left_out", 0) + 1
    return {name: value for name, value in error.losses.items() if math.isfinite(value)} | {"left_out": 1.0}
