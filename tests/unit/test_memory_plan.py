"""Passes over rows: as few as fit, and an error with the number where none does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmx.kernels.memory import NotEnoughMemory, Plan, require, split


@given(
    rows=st.integers(1, 10_000), fixed=st.integers(0, 10_000), each=st.integers(1, 100),
    free=st.integers(1, 2_000_000), least=st.sampled_from([1, 16, 256]),
    most=st.one_of(st.none(), st.integers(256, 20_000)),
)  # fmt: skip
def test_plans_fit_and_cover_all_rows(
    rows: int, fixed: int, each: int, free: int, least: int, most: int | None
) -> None:
    try:
        plan = split("test", rows, fixed, each, free, least, most)
    except NotEnoughMemory:
        assert fixed + min(least, rows) * each > int(0.9 * free)
        return
    assert plan.peak_bytes <= 0.9 * free
    assert plan.pass_bytes == plan.rows_per_pass * each
    assert (plan.passes - 1) * plan.rows_per_pass < rows <= plan.passes * plan.rows_per_pass
    assert plan.passes == 1 or plan.rows_per_pass % least == 0
    assert most is None or plan.rows_per_pass <= max(most, least)


def test_one_pass_where_memory_is_no_matter() -> None:
    assert split("test", 1000, 5, 3, None, 256) == Plan(5, 3000, 1000, 1)


def test_passes_are_of_equal_size() -> None:
    assert split("test", 1000, 0, 1, 700, 1) == Plan(0, 500, 500, 2)


def test_the_error_says_how_much() -> None:
    said = r"join: wanted 3\.00 GiB of free .* \(16 of 1000 rows\), found 2\.00 GiB; free some.*cpu"
    with pytest.raises(NotEnoughMemory, match=said):
        split("join", 1000, int(2.5 * 2**30), int(0.2 * 2**30) // 16, 2**31, 16)
    assert issubclass(NotEnoughMemory, MemoryError)


def test_what_is_required_fits_or_is_named() -> None:
    require("join", 9 * 2**28, None)
    require("join", 9 * 2**28, 5 * 2**29)
    with pytest.raises(NotEnoughMemory, match=r"join: wanted 2\.50 GiB .* found 2\.00 GiB; free some"):
        require("join", 9 * 2**28, 2**31)
