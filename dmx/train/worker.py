"""The training worker: a plain function that every process runs, however it was started.

`dmx.launching` starts it; one process, without a launcher:  python -m dmx.train.worker RUN
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import dmx.config
from dmx import stopping
from dmx.config import Config
from dmx.distributed import share, use_cores, world
from dmx.errors import DmxError
from dmx.kernels.progress import listening
from dmx.progress import progress_bar, silence
from dmx.train import loop
from dmx.train.checkpoint import read_checkpoint
from dmx.train.determinism import determinism
from dmx.train.engines import forget_process_group
from dmx.train.recovery import recover
from dmx.train.runlog import CONFIG
from dmx.train.trainer import Trainer, build_trainer
from dmx.waiting import waiting
from dmx.writing import write_whole

RESULT = "result.json"


def train_worker(run: str | Path, *, local: tuple[int, int] | None = None) -> None:
    """Train the run in folder `run` from its latest checkpoint, or its start, to its end.

    Args:
        run: a folder with `config.yaml`, reachable by every process.
        local: (local rank, processes on this host) where the environment does not tell.
    """
    folder = Path(run)
    origin = str(folder / CONFIG)
    config = dmx.config.from_tree((origin, dmx.config.read_yaml(folder / CONFIG)))
    with (
        determinism(config.deterministic),
        world(config.timeout_s, local) as place,
        listening(progress_bar),
    ):
        use_cores(place)
        if not place.leads:
            silence()
        # The first process decides where to go on, or a checkpoint written meanwhile would part the others.
        found = share(place, str(recover(folder) or "") if place.leads else "")
        try:
            with waiting("the start of the run"):
                checkpoint = read_checkpoint(Path(found)) if found else None
                trainer = build_trainer(config, folder, place, checkpoint)
            with trainer:
                loop.run_epochs(trainer)
            if trainer.log is not None:
                trainer.log.require_writer()
                _write_result(trainer, config)
        finally:
            forget_process_group()


def _write_result(trainer: Trainer, config: Config) -> None:
    """Mark the run as finished. Its result is the last epoch's; the published code takes the best one's."""
    best = trainer.progress.best_epoch() if config.compat == "official" else None
    reported = best or trainer.progress.epochs[-1]
    result = {
        "epochs": config.schedule.epochs,
        "steps": trainer.progress.global_step,
        "epoch": reported["epoch"],
        "chosen_on_tests": best is not None,
        "tests": reported.get("tests", {}),
        "clusters": reported.get("clusters"),
    }
    write_whole(trainer.run / RESULT, json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Entry for a process without a launcher."""
    parser = argparse.ArgumentParser(description="Train the run in a folder that `dmx train` prepared.")
    parser.add_argument("run", help="run folder with config.yaml")
    arguments = parser.parse_args()
    try:
        with stopping.listening(lambda: "error"):
            stopping.say_at_the_end()
            train_worker(arguments.run)
    except stopping.Stopped:
        sys.stderr.write(f"{stopping.last_words()}\n")
        stopping.end(stopping.status())
    except DmxError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
