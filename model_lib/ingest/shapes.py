"""The coloured shapes of generated scenes, and how they are drawn."""

import math
from dataclasses import dataclass

from PIL import ImageDraw

Colour = tuple[int, int, int]


COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (35, 85, 205),
    "yellow": (248, 214, 40),
    "purple": (130, 50, 165),
    "orange": (245, 130, 30),
    "pink": (250, 150, 190),
    "brown": (120, 75, 40),
}
BACKGROUNDS = {"white": (244, 244, 244), "gray": (188, 188, 188), "beige": (232, 214, 178)}
OUTLINE = (20, 20, 20)
"""Every shape has the same dark line, so that its form shows whatever its colour and ground."""


@dataclass(frozen=True)
class Thing:
    """A kind of object."""

    size: str
    colour: str
    shape: str

    @property
    def full(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"

    @property
    def plain(self) -> str:
        return f"a {self.colour} {self.shape}"


def _star(points: int, inner: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """Return a polygon's corners in the unit circle, alternately at radius 1 and at `inner`."""
    corners = []
    for corner in range(2 * points):
        angle = turn + math.pi * corner / points
        radius = inner if corner % 2 else 1.0
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


def _plus(arm: float) -> list[tuple[float, float]]:
    """Return the corners of a cross in the unit square, its arms `arm` wide to each side."""
    corners = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    for _ in range(3):
        corners += [(-y, x) for x, y in corners[-3:]]  # a quarter turn
    return corners


def _heart() -> list[tuple[float, float]]:
    """Return corners of a heart in the unit square."""
    angles = [2 * math.pi * corner / 40 for corner in range(40)]
    waves = [
        13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        for a in angles
    ]
    return [(math.sin(a) ** 3, -wave / 17) for a, wave in zip(angles, waves, strict=True)]


def _moon() -> list[tuple[float, float]]:
    """Return corners of a crescent in the unit circle, open to the right."""
    outer = [math.pi * (0.25 + 1.5 * corner / 20) for corner in range(21)]
    corners = [(math.cos(a), -math.sin(a)) for a in outer]
    tip = math.sqrt(0.5)
    inner = [math.pi * (1.5 - corner / 12) for corner in range(1, 12)]
    return corners + [(tip + tip * math.cos(a), -tip * math.sin(a)) for a in inner]


POLYGONS = {
    "square": _star(4, math.sqrt(0.5), math.pi / 4),
    "triangle": _star(3, 0.5),
    "star": _star(5, 0.42),
    "cross": _plus(0.36),
    "heart": _heart(),
    "diamond": [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)],
    "moon": _moon(),
}
"""Corners about the centre, in units of the radius; the other shapes are round."""


def paint(
    canvas: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float, ground: Colour
) -> None:
    """Draw an object about x, y, in pixels."""
    fill, line = COLOURS[thing.colour], max(2, round(radius * 0.11))
    if thing.shape in POLYGONS:
        corners = [(x + radius * a, y + radius * b) for a, b in POLYGONS[thing.shape]]
        canvas.polygon(corners, fill=fill, outline=OUTLINE, width=line)
        return
    canvas.circle((x, y), radius, fill=fill, outline=OUTLINE, width=line)
    if thing.shape == "ring":
        canvas.circle((x, y), radius * 0.5, fill=ground, outline=OUTLINE, width=line)
