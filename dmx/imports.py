"""Importing a package without another one, which it would import wherever that is installed.

timm and DeepSpeed import wandb. That takes time at every start, and makes two temporary folders, which a
process that is killed leaves behind. `log.trackers` imports it by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(name: str) -> Iterator[None]:
    """Importing a package within fails as if it were not installed, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # as the import system documents it
    try:
        yield
    finally:
        del sys.modules[name]
