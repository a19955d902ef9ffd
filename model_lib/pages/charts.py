"""Line charts for web pages: where on the drawing everything lies. The template `chart.svg` draws
them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 270
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 40
"""Margins around the plot, where the axes' texts stand."""
MOST_POINTS = 150
"""Of a line; of more, some are left out, spread evenly."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    colour: int
    """Number of the colour, the same for all curves of a model."""
    faint: bool
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn."""

    label: str
    colour: int
    faint: bool
    corners: list[tuple[float, float, str]]
    """Place on the drawing and what is said of it."""


@dataclass(frozen=True)
class Chart:
    """A drawing of `WIDTH` by `HEIGHT`; ticks are a place on their axis and a text."""

    title: str
    horizontal: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(title: str, horizontal: str, series: Sequence[Series]) -> Chart | None:
    """Lay out a chart; None if no curve has a finite point. Points that are not finite are left
    out.

    The horizontal axis starts at 0, the vertical one where the values do.
    """
    kept = [
        (one, thinned([point for point in one.points if all(map(math.isfinite, point))]))
        for one in series
    ]
    kept = [(one, points) for one, points in kept if points]
    if not kept:
        return None
    everything = [point for _, points in kept for point in points]
    x_low, x_high, x_ticks = _axis([0, *(x for x, _ in everything)], 6, whole=True)
    y_low, y_high, y_ticks = _axis([y for _, y in everything], 5, whole=False)

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = [
        Line(
            one.label,
            one.colour,
            one.faint,
            [
                (across(x), down(y), f"{one.label}: {y:.4g} at {horizontal} {x:,.0f}")
                for x, y in points
            ],
        )
        for one, points in kept
    ]
    return Chart(
        title,
        horizontal,
        [(across(x), f"{x:,.0f}") for x in x_ticks],
        [(down(y), f"{y:.10g}") for y in y_ticks],
        lines,
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS` of the points, spread evenly, among them the first and the
    last."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[round(n * (len(points) - 1) / (MOST_POINTS - 1))] for n in range(MOST_POINTS)]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` + 2 round numbers, evenly spaced, that enclose `low` and `high`."""
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _axis(values: Sequence[float], most: int, *, whole: bool) -> tuple[float, float, list[float]]:
    """Return an axis' ends and ticks: ends at the values themselves for `whole` numbers, else at
    round ones."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):  # one point, or a flat line
        low, high = low - 0.5, high + 0.5
    marks = ticks(low, high, most)
    if whole:
        return low, high, [mark for mark in marks if low <= mark <= high and mark == round(mark)]
    return marks[0], marks[-1], marks
