"""Checking a data set against the counts that its authors published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dmx.data.layouts import Expected
from dmx.data.manifest import SplitCounts

WHAT = {
    "images": "images",
    "labelled": "images of known identity",
    "identities": "identities",
    "cameras": "cameras",
}


def count_warnings(
    layout: str, expected: Iterable[Expected], splits: Mapping[str, SplitCounts], skipped: int
) -> list[str]:
    """One sentence for every published count that this copy of the data set does not have.

    Args:
        layout: name of the layout.
        expected: its published counts.
        splits: what was found.
        skipped: how many images were left out because they are broken or have no place in the layout.
    """
    warnings = []
    for item in expected:
        counts = splits.get(item.split)
        found = 0 if counts is None else int(getattr(counts, item.field))
        if abs(found - item.count) <= item.tolerance * item.count:
            continue
        about = "about " if item.tolerance else ""
        skips = f" ({skipped} broken or misplaced ones left out of all splits)" if skipped else ""
        warnings.append(
            f"{layout}, {item.split}: {about}{item.count:,} {WHAT[item.field]} are published, {found:,} found"
            f"{skips}; results will not compare with published ones: check that the download is complete, "
            "unpacked fully and not a part or a variant of the set"
        )
    return warnings
