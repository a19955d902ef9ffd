"""Generated scenes: a small COCO-format data set from which a tiny model can really learn to look.

Coloured shapes, large or small, one to three of a kind or two in a spatial relation, on varied backgrounds, with
five differently worded captions each. Some combinations of size, colour and shape occur only in the validation
pictures: a model that names them has learned to see each apart, and no picture by heart.
"""

import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from model_lib import storage
from model_lib.config import ScenesConfig

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
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = {"white": (245, 245, 245), "gray": (150, 150, 150), "black": (25, 25, 25)}
RADIUS = {"small": 0.14, "large": 0.22}
"""Radius as a share of the picture's side."""
HELD_OUT = {
    (size, colour, shape)
    for s, size in enumerate(RADIUS)
    for c, colour in enumerate(COLOURS)
    for n, shape in enumerate(SHAPES)
    if (3 * s + c + n) % len(SHAPES) == 0
}
"""Combinations that training never shows: of each colour, one shape in small and another in large."""
NUMBERS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Thing:
    """One drawn kind of object."""

    size: str
    colour: str
    shape: str

    @property
    def one(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"

    @property
    def plain(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `count` of `first`, or `first` beside `second` in `relation` to it."""

    background: str
    first: Thing
    count: int = 1
    second: Thing | None = None
    relation: str = ""

    def captions(self) -> list[str]:
        """Return five descriptions in different words."""
        first, second, ground = self.first, self.second, self.background
        if second is not None:
            inverse = {"left of": "right of", "above": "below"}[self.relation]
            return [
                f"{first.one} {self.relation} {second.one}",
                f"{second.one} is {inverse} {first.one}",
                f"there is {first.plain} {self.relation} {second.plain} on {ground}",
                f"a {ground} background with {first.plain} and {second.plain}",
                f"a picture of {first.one} and {second.one}",
            ]
        if self.count > 1:
            number = NUMBERS[self.count]
            kind = f"{first.colour} {first.shape}{'es' if first.shape.endswith('s') else 's'}"
            return [
                f"{number} {first.size} {kind} on a {ground} background",
                f"{number} {kind} on {ground}",
                f"there are {number} {first.size} {kind}",
                f"a {ground} background with {number} {kind}",
                f"a picture of {number} {first.size} {kind}",
            ]
        return [
            f"{first.one} on a {ground} background",
            f"{first.plain} on {ground}",
            f"there is {first.one}",
            f"a {ground} background with {first.plain}",
            f"a picture of {first.one}",
        ]


def draw_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Draw a scene's content; with `held_out` its first thing is a combination that training never sees."""

    def thing(from_held_out: bool) -> Thing:
        while True:
            made = rng.choice(list(RADIUS)), rng.choice(list(COLOURS)), rng.choice(SHAPES)
            if (made in HELD_OUT) == from_held_out:
                return Thing(*made)

    background, first = rng.choice(list(BACKGROUNDS)), thing(held_out)
    if rng.random() < 0.5:
        return Scene(background, first, rng.randint(1, 3))
    second = thing(False)
    while (second.colour, second.shape) == (first.colour, first.shape):
        second = thing(False)
    pair = (first, second) if rng.random() < 0.5 else (second, first)
    return Scene(background, pair[0], second=pair[1], relation=rng.choice(("left of", "above")))


def _outline(points: int, inner: float, turn: float) -> Callable[[float, float, float], list[tuple[float, float]]]:
    """Return a maker of star-like polygons: corners at the radius and, between them, at `inner` of it."""

    def corners(x: float, y: float, radius: float) -> list[tuple[float, float]]:
        ring = []
        for corner in range(2 * points):
            angle = turn + math.pi * corner / points
            reach = radius * (inner if corner % 2 else 1)
            ring.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
        return ring

    return corners


_POLYGONS = {
    "square": _outline(4, math.sqrt(0.5), math.pi / 4),
    "triangle": _outline(3, 0.5, 0),
    "star": _outline(5, 0.4, 0),
}


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float) -> None:
    fill = COLOURS[thing.colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape in _POLYGONS:
        canvas.polygon(_POLYGONS[thing.shape](x, y, radius * 1.15), fill=fill)
    elif thing.shape == "cross":
        arm = radius * 0.36
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    elif thing.shape == "ring":
        canvas.ellipse(box, outline=fill, width=max(2, round(radius * 0.42)))
    else:
        canvas.ellipse(box, fill=fill)


def _places(scene: Scene, rng: random.Random) -> list[tuple[Thing, float, float]]:
    """Return each object with the centre of its place, as shares of the side."""

    def jitter() -> float:
        return rng.uniform(-0.04, 0.04)

    if scene.second is not None:
        across = rng.uniform(0.3, 0.7)
        near, far = 0.26 + jitter(), 0.74 + jitter()
        if scene.relation == "left of":
            return [(scene.first, near, across), (scene.second, far, across + jitter())]
        return [(scene.first, across, near), (scene.second, across + jitter(), far)]
    corners = [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]
    if scene.count == 1:
        corners = [(rng.uniform(0.26, 0.74), rng.uniform(0.26, 0.74))]
    chosen = rng.sample(corners, scene.count)
    return [(scene.first, x + jitter(), y + jitter()) for x, y in chosen]


def render(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels, on a slightly varied background."""
    scale = 2  # drawn larger and reduced, for smooth edges
    shade = rng.randint(-18, 18)
    ground = tuple(max(0, min(255, value + shade)) for value in BACKGROUNDS[scene.background])
    image = Image.new("RGB", (size * scale, size * scale), ground)
    canvas = ImageDraw.Draw(image)
    for thing, x, y in _places(scene, rng):
        radius = RADIUS[thing.size] * rng.uniform(0.9, 1.1)
        _draw_thing(canvas, thing, *(value * size * scale for value in (x, y, radius)))
    return image.resize((size, size), Image.Resampling.LANCZOS)


def make_scenes(config: ScenesConfig) -> None:
    """Write the data set in COCO's layout under `config.output`; the same configuration writes the same bytes."""
    storage.require_writable(config.output)
    for split, count, held_out in (("train", config.train, False), ("val", config.val, True)):
        rng = random.Random(f"{config.seed}/{split}")
        images: list[dict] = []
        annotations: list[dict] = []
        for number in range(1, count + 1):
            scene = draw_scene(rng, held_out=held_out)
            encoded = io.BytesIO()
            render(scene, config.size, rng).save(encoded, "JPEG", quality=92)
            name = f"{number:012d}.jpg"
            storage.write_bytes(storage.join(config.output, f"{split}2017", name), encoded.getvalue())
            images.append({"id": number, "file_name": name, "width": config.size, "height": config.size})
            for caption in scene.captions():
                annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": caption})
        document = {"info": {"description": "generated scenes"}, "images": images, "annotations": annotations}
        storage.write_json(storage.join(config.output, "annotations", f"captions_{split}2017.json"), document)
