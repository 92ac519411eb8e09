"""Charts as SVG inside the page: they follow its colours, light or dark, and its width, and stay small.

matplotlib was the other choice: its SVG fixes colours and the size of its text, and draws letters. Here
the drawing stretches with the page, while lines keep their width and labels, which are HTML, their size.
Every series has a colour of its own, another dash and its name beside it, so that no colour has to be seen.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dmx.page import text

# Points of a line: more than a screen shows apart.
POINTS = 240
# Least distance of the names beside lines, in percent of the chart's height.
NAME_GAP = 11.0
TICKS = 4


@dataclass(frozen=True)
class Series:
    """A line: its name, and where it goes, x ascending."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Attributes:
        low, high: its ends.
        label: what it counts, with its unit.
        is_share: whether numbers are written in percent.
    """

    low: float
    high: float
    label: str
    is_share: bool = False

    def place(self, values: ArrayLike) -> NDArray[np.float64]:
        """Where values lie on it, from 0 to 1."""
        places: NDArray[np.float64] = np.asarray(values, np.float64) - self.low
        return places / ((self.high - self.low) or 1)

    def ticks(self) -> list[float]:
        """Round numbers along it."""
        step = nice_step((self.high - self.low) / TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def told(self, value: float) -> str:
        """A number as it is written on it."""
        return f"{100 * value:.3g} %" if self.is_share else short(value)


@dataclass(frozen=True)
class Mark:
    """A line across the chart with a name: at a height, or (`is_upright`) at a place along it."""

    at: float
    name: str
    is_upright: bool = False


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def short(value: float) -> str:
    """A number in few characters: thousands with commas, less than a thousandth as 2.5e-4."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.3g}"


def fitted(values: Sequence[NDArray[np.float64]], label: str, *, is_share: bool = False, zero: bool) -> Axis:
    """An axis of round ends around all values.

    Args:
        values: of all series, some of them finite.
        label: of the axis; is_share: as of `Axis`.
        zero: whether it starts at 0.
    """
    joined = np.concatenate([np.asarray(v, np.float64) for v in values])
    joined = joined[np.isfinite(joined)]
    low, high = (0.0 if zero else float(joined.min())), float(joined.max())
    if high <= low:
        high = low + (abs(low) or 1) * 0.1
    step = nice_step((high - low) / TICKS)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(low, min(high, 1.0) if is_share else high, label, is_share)


def thinned(series: Series) -> Series:
    """A series of at most POINTS points, each the mean of as many steps."""
    count = len(series.x)
    if count <= POINTS:
        return series
    starts = np.arange(POINTS) * count // POINTS
    sizes = np.diff([*starts, count])
    x, y = (np.add.reduceat(values, starts) / sizes for values in (series.x, series.y))
    return Series(series.name, x, y)


def line_chart(
    title: str, lines: Sequence[Series], x: Axis, y: Axis, *, marks: Sequence[Mark] = (), note: str = ""
) -> str:
    """A chart of lines, their names at their ends, what they are at the page's pointer told by its script.

    Args:
        title: above it.
        lines: at least one, each with a point at least.
        x, y: the axes.
        marks: lines across it.
        note: a sentence below it.
    """
    lines = [thinned(line) for line in lines]
    drawn = "".join(_line(i, x.place(line.x), y.place(line.y)) for i, line in enumerate(lines))
    ends = [float(y.place(line.y[-1:])[0]) for line in lines]
    return _chart(
        title, drawn, x, y, marks, _names([line.name for line in lines], ends), note, _data(lines, x, y)
    )


def area_chart(
    title: str, lines: Sequence[Series], x: Axis, y: Axis, *, marks: Sequence[Mark] = (), note: str = ""
) -> str:
    """The same with the area below each line filled, for distributions; a legend names them."""
    drawn = ""
    for i, line in enumerate(lines):
        across, up = x.place(line.x), y.place(line.y)
        area = f"M{_points(across, up)} L{_point(across[-1], 0)} L{_point(across[0], 0)}z"
        drawn += f'<path class="a{i}" d="{area}"/>{_line(i, across, up)}'
    return _chart(title, drawn, x, y, marks, "", note, _data(lines, x, y), legend=_legend(lines))


def stacked_chart(title: str, parts: Sequence[Series], x: Axis, y: Axis, *, note: str = "") -> str:
    """Columns, one for each place, of parts on top of each other; a legend names the parts.

    Args:
        title: above it.
        parts: all with the same x, numbers of epochs; the first lies at the bottom.
        x: from half a column before the first to half a column behind the last.
        y: the axis.
        note: a sentence below it.
    """
    width = 0.8 / (x.high - x.low)
    below = np.zeros(len(parts[0].x))
    drawn = ""
    for i, part in enumerate(parts):
        up, rise = y.place(below), y.place(below + part.y) - y.place(below)
        for place, bottom, height in zip(x.place(part.x) - width / 2, up, rise, strict=True):
            if height > 0:
                drawn += (
                    f'<rect class="b{i}" x="{1000 * place:.1f}" y="{1000 * (1 - bottom - height):.1f}" '
                    f'width="{1000 * width:.1f}" height="{1000 * height:.1f}"/>'
                )
        below = below + part.y
    return _chart(title, drawn, x, y, (), "", note, _data(parts, x, y), legend=_legend(parts))


def _legend(parts: Sequence[Series]) -> str:
    names = "".join(f'<span class="k{i}">{text(part.name)}</span>' for i, part in enumerate(parts))
    return f'<p class="parts">{names}</p>'


def _chart(
    title: str, drawn: str, x: Axis, y: Axis, marks: Sequence[Mark], names: str, note: str, data: str,
    *, legend: str = "",
) -> str:  # fmt: skip
    """Title, drawing, axes, and the room beside it for names."""
    grid = "".join(
        f'<line class="grid" x1="0" x2="1000" y1="{_up(at)}" y2="{_up(at)}"/>' for at in y.place(y.ticks())
    )
    labels = "".join(
        f'<span class="tick y" style="bottom:{100 * at:.1f}%">{text(y.told(tick))}</span>'
        for tick, at in zip(y.ticks(), y.place(y.ticks()), strict=True)
    ) + "".join(
        f'<span class="tick x" style="left:{100 * at:.1f}%">{text(x.told(tick))}</span>'
        for tick, at in zip(x.ticks(), x.place(x.ticks()), strict=True)
    )
    crossing = "".join(_mark(mark, x if mark.is_upright else y) for mark in marks)
    below = f'<p class="note">{text(note)}</p>' if note else ""
    room = " beside" if names else ""
    return (
        f'<figure class="chart"><figcaption>{text(title)} <small>{text(y.label)}</small></figcaption>{legend}'
        f'<div class="plot{room}" data-chart="{text(data)}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{text(title)}">'
        f"{grid}{drawn}</svg>{crossing}{labels}{names}</div>"
        f'<p class="axis">{text(x.label)}</p>{below}</figure>\n'
    )


def _line(number: int, across: NDArray[np.float64], up: NDArray[np.float64]) -> str:
    if len(across) == 1:  # a point: a stroke of no length with round ends
        across, up = np.repeat(across, 2), np.repeat(up, 2)
    return f'<path class="l{number}" d="M{_points(across, up)}"/>'


def _points(across: NDArray[np.float64], up: NDArray[np.float64]) -> str:
    return " ".join(_point(a, b) for a, b in zip(across, up, strict=True) if math.isfinite(b))


def _point(across: float, up: float) -> str:
    return f"{1000 * across:.1f},{_up(up)}"


def _up(at: float) -> str:
    return f"{1000 * (1 - at):.1f}"


def _names(names: Sequence[str], ends: Sequence[float]) -> str:
    """Names at the ends of lines, moved apart where they would lie on each other; one line needs none."""
    if len(names) < 2:
        return ""
    heights = apart([100 * end for end in ends], NAME_GAP)
    return "".join(
        f'<span class="name c{i}" style="bottom:{height:.1f}%">{text(name)}</span>'
        for i, (name, height) in enumerate(zip(names, heights, strict=True))
    )


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in percent, moved so that each is `gap` above the next lower one, none above 100 if it fits."""
    order = np.argsort(heights, kind="stable")
    found = np.array(heights, np.float64)
    for lower, upper in itertools.pairwise(order):
        found[upper] = max(found[upper], found[lower] + gap)
    ceiling = 100.0
    for place in order[::-1]:
        found[place] = min(found[place], ceiling)
        ceiling = found[place] - gap
    return [float(value) for value in found]


def _mark(mark: Mark, axis: Axis) -> str:
    at = 100 * float(axis.place(np.array([mark.at]))[0])
    if not 0 <= at <= 100:
        return ""
    kind, side = ("upright", "left") if mark.is_upright else ("level", "bottom")
    late = " late" if mark.is_upright and at > 80 else ""
    return f'<span class="mark {kind}{late}" style="{side}:{at:.1f}%"><i>{text(mark.name)}</i></span>'


def _data(lines: Sequence[Series], x: Axis, y: Axis) -> str:
    """What the script tells at the pointer."""
    return json.dumps(
        {
            "x": [x.low, x.high],
            "unit": x.label,
            "lines": [
                {
                    "name": line.name,
                    "x": [float(f"{value:.4g}") for value in line.x],
                    "y": [y.told(value) for value in line.y],
                }
                for line in lines
            ],
        },
        separators=(",", ":"),
    )
