"""Where a model computes, by its name."""

from __future__ import annotations

import torch

from dmx.errors import DmxError


def chosen_device(name: str, option: str) -> str:
    """A device that can be used.

    Args:
        name: cpu, cuda, cuda:1 ...; auto is cuda where there is one, else cpu.
        option: where it was given, for the error.

    Raises:
        DmxError: torch cannot use it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise DmxError(f"{option}: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    return name
