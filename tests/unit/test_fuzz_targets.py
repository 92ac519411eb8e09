"""The readers that are fuzzed take their seeds, and refuse what a fuzzer makes of them, for a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import targets

DAMAGED = 60
NAMES = ["images", "shards", "manifests", "features", "recipes", "zips", "tars", "keys", "weights", "indices"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, targets.Target]:
    return targets.make(tmp_path_factory.mktemp("targets"))


def test_all_are_named(made: dict[str, targets.Target]) -> None:
    assert list(made) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_target(made: dict[str, targets.Target], name: str) -> None:
    """`python benchmarks/fuzz.py` does so for longer, and looks where it gets."""
    target, rng = made[name], np.random.default_rng(0)
    for seed in target.seeds:
        target.read(seed)
        for _ in range(DAMAGED // len(target.seeds)):
            changed = bytearray(seed)
            for place in rng.integers(0, len(seed), rng.integers(1, 6)):
                changed[place] = int(rng.integers(0, 256))
            target.read(bytes(changed[: rng.integers(0, len(seed))] if rng.random() < 0.3 else changed))


def test_a_target_notices_what_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a reader to let another error out, this is how it would show."""

    def broken(path: object) -> object:
        raise IndexError("of a reader that does not look")

    monkeypatch.setattr(targets, "load_keys", broken)
    with pytest.raises(IndexError):
        targets.make(tmp_path)["keys"].read(b"x")
