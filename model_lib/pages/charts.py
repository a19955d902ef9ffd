"""Line charts: their layout. The template `chart.svg` draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

WIDTH, HEIGHT = 520, 270
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 40
"""Margins around the plot, for the axes' texts."""
MOST_POINTS = 150
"""Points of a line; longer ones are thinned evenly."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    colour: int
    """Number of the colour, the same for all curves of a model."""
    faint: bool
    points: Sequence[tuple[Any, ...]]
    """x and y; of a curve in a `Chart` the position on the drawing, and the title."""


@dataclass(frozen=True)
class Chart:
    """A drawing of `WIDTH` by `HEIGHT`; a tick is a position on its axis and a text."""

    title: str
    horizontal: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Series]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(title: str, horizontal: str, series: Sequence[Series]) -> Chart | None:
    """Lay out a chart; None if no curve has a finite point. Points that are not finite are left
    out.

    The horizontal axis starts at 0, the vertical one at the lowest value.
    """
    finite = [[p for p in curve.points if all(map(math.isfinite, p))] for curve in series]
    curves = [(c, thinned(points)) for c, points in zip(series, finite, strict=True) if points]
    if not curves:
        return None
    every = [point for _, points in curves for point in points]
    x_low, x_high, x_ticks = _axis([0, *(x for x, _ in every)], 6, whole=True)
    y_low, y_high, y_ticks = _axis([y for _, y in every], 5, whole=False)

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for curve, points in curves:
        titles = (f"{curve.label}: {y:.4g} at {horizontal} {x:,.0f}" for x, y in points)
        drawn = [(across(x), down(y), text) for (x, y), text in zip(points, titles, strict=True)]
        lines.append(replace(curve, points=drawn))
    across_ticks = [(across(x), f"{x:,.0f}") for x in x_ticks]
    return Chart(title, horizontal, across_ticks, [(down(y), f"{y:.10g}") for y in y_ticks], lines)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST_POINTS` of the points, spread evenly, with the first and the last."""
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
    """Return an axis' ends and ticks; it ends at the values if they are `whole` numbers, else at
    round numbers."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):  # one point, or a flat line
        low, high = low - 0.5, high + 0.5
    marks = ticks(low, high, most)
    if whole:
        return low, high, [mark for mark in marks if low <= mark <= high and mark == round(mark)]
    return marks[0], marks[-1], marks
