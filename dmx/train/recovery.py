"""Which checkpoint a run goes on from: its latest, or where that is damaged the last whole one before it."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from dmx.checksums import damage
from dmx.errors import DmxError
from dmx.progress import say
from dmx.train.checkpoint import BEST, CONFIG_FILE, FOLDER, LATEST, STATE_FILE, latest, point, pointed

# Enough to know what a run is, without reading gigabytes.
DESCRIPTION = (STATE_FILE, CONFIG_FILE)
SET_ASIDE = "damaged-"


def recover(run: Path, names: Container[str] | None = None) -> Path | None:
    """The checkpoint to go on from. A damaged one is named on stderr and set aside. One process calls this.

    Args:
        run: the run folder.
        names: which of a checkpoint's files to look at; None looks at all.

    Returns:
        The latest whole checkpoint; None where the run has none yet.

    Raises:
        DmxError: there are only damaged ones; names them.
    """
    named = latest(run)
    if named is None:
        return None
    if pointed(run) != named:
        say(f"warning: {run / FOLDER / LATEST} names no checkpoint: going on from {named.name}, the newest")
        point(run, LATEST, named.name)
    found = sorted(path for path in (run / FOLDER).glob("step-*") if path.name <= named.name)
    faults: dict[Path, str] = {}
    for path in dict.fromkeys([named, *reversed(found)]):
        fault = damage(path, names)
        if fault is None:
            _set_aside(run, path, faults)
            return path
        faults[path] = fault
    raise DmxError(
        f"{run / FOLDER}: wanted a whole checkpoint to go on from, found only damaged ones: "
        + "; ".join(faults.values())
        + ". Put their files back from a copy, or train again with another --run"
    )


def _set_aside(run: Path, whole: Path, faults: dict[Path, str]) -> None:
    """Go on from `whole`, and keep damaged checkpoints under names that nothing takes for checkpoints."""
    if not faults:
        return
    for fault in faults.values():
        say(f"warning: damaged checkpoint: {fault}")
    say(f"warning: going on from {whole.name}, the last whole one")
    best = latest(run, BEST)
    point(run, LATEST, whole.name)
    for path in faults:
        if path == best:
            (run / FOLDER / BEST).unlink()
        if path.exists():
            path.rename(path.with_name(_free_name(path)))


def _free_name(path: Path) -> str:
    name, again = SET_ASIDE + path.name, 0
    while path.with_name(name).exists():
        again += 1
        name = f"{SET_ASIDE}{path.name}-{again}"
    return name
