"""Lines of Markdown tables, and the numbers in them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable


def line(*cells: object) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*titles: str, texts: int = 0) -> list[str]:
    """The first lines of a table: titles, and columns of text before those of numbers."""
    return [line(*titles), f"|{'---|' * texts}{'---:|' * (len(titles) - texts)}"]


def spread(shares: Iterable[float], form: str = ".1f") -> str:
    """Mean and sample standard deviation, in percent; of one number no deviation."""
    found = [100 * share for share in shares]
    deviation = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):{form}}{deviation}"
