"""Harder generated scenes, on which there is room to be better: several of a kind, up to five;
three objects in two relations; colours by position; objects at the edges of 4:3 images. Their
captions are written as COCO's are, most with a capital and a final stop.

Of the combinations of colour and shape, a fifth occurs only in the validation images.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from model_lib.ingest.shapes import BACKGROUNDS, COLOURS, Thing, paint

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "moon")
COLUMNS, ROWS = 4, 3
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four", 5: "five"}
CORNERS = {
    "top left": (0, 0),
    "top right": (COLUMNS - 1, 0),
    "bottom left": (0, ROWS - 1),
    "bottom right": (COLUMNS - 1, ROWS - 1),
}
HELD_OUT = {
    (colour, shape)
    for c, colour in enumerate(COLOURS)
    for s, shape in enumerate(SHAPES)
    if (2 * c + s) % 5 == 0
}
"""Colours and shapes that training never shows together."""
RADIUS, JITTER = 0.11, 0.02
"""Of an object, and the largest distance from the middle of its cell, as shares of the height."""


@dataclass(frozen=True)
class HardScene:
    """An image's content."""

    background: str
    objects: tuple[tuple[Thing, int, int], ...]
    """Each with its column and row in a grid of 4 x 3."""
    captions: tuple[str, ...]


def draw_hard_scene(rng: random.Random, *, held_out: bool) -> HardScene:
    """Draw a scene's content; `held_out`: with a combination that training never shows."""
    things = [_draw_thing(rng, held_out)]
    while len(things) < 3:
        thing = _draw_thing(rng, False)
        if thing.shape not in [other.shape for other in things]:
            things.append(thing)
    if rng.random() < 0.5:
        things[:2] = things[1::-1]
    ground = rng.choice(list(BACKGROUNDS))
    draw = rng.choice((_several, _chain, _corners))
    objects, captions = draw(rng, things, ground)
    written = tuple(_as_people_write(rng, caption) for caption in captions)
    return HardScene(ground, tuple(objects), written)


def _as_people_write(rng: random.Random, caption: str) -> str:
    """Return a caption as COCO's are written: mostly with a capital and a final stop."""
    if rng.random() < 0.9:
        caption = caption[0].upper() + caption[1:]
    return caption + "." * (rng.random() < 0.7)


def _draw_thing(rng: random.Random, held_out: bool) -> Thing:
    while True:
        kind = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if (kind in HELD_OUT) == held_out:
            return Thing("small", *kind)


Drawn = tuple[list[tuple[Thing, int, int]], list[str]]


def _several(rng: random.Random, things: list[Thing], ground: str) -> Drawn:
    """One to five of a kind, and one of another."""
    first, second, _ = things
    count = rng.randint(1, 5)
    cells = rng.sample([(x, y) for x in range(COLUMNS) for y in range(ROWS)], count + 1)
    objects = [(first, x, y) for x, y in cells[:-1]] + [(second, *cells[-1])]
    ending = "" if count == 1 else "es" if first.shape.endswith("s") else "s"
    several = f"{NUMBERS[count]} {first.colour} {first.shape}{ending}"
    shapes = f"{NUMBERS[count]} {first.shape}{ending}"
    return objects, [
        f"{several} and {second.plain} on {ground}",
        f"{second.plain} and {several}",
        f"{several} with one {second.shape} that is {second.colour}",
        f"a {ground} background with {several} and {second.plain}",
        f"{shapes} and a {second.shape}, {first.colour} and {second.colour}",
    ]


def _chain(rng: random.Random, things: list[Thing], ground: str) -> Drawn:
    """Three in a row or a column."""
    a, b, c = things = rng.sample(things, 3)
    last = f"{c.shape} {c.colour}"
    if rng.random() < 0.5:
        row, columns = rng.randrange(ROWS), sorted(rng.sample(range(COLUMNS), 3))
        objects = [(thing, x, row) for thing, x in zip(things, columns, strict=True)]
        relation, inverse, order = "left of", "right of", "from left to right"
    else:
        column = rng.randrange(COLUMNS)
        objects = [(thing, column, y) for y, thing in enumerate(things)]
        relation, inverse, order = "above", "below", "from top to bottom"
    return objects, [
        f"{a.plain} {relation} {b.plain} {relation} {c.plain}",
        f"{c.plain} {inverse} {b.plain} {inverse} {a.plain}",
        f"{order} {a.plain}, {b.plain} and {c.plain} on {ground}",
        f"{b.plain} between {a.plain} and {c.plain}",
        f"{order} the {a.shape} is {a.colour}, the {b.shape} {b.colour} and the {last}",
    ]


def _corners(rng: random.Random, things: list[Thing], ground: str) -> Drawn:
    """Two in named corners of the image."""
    first, second, _ = things
    (one, other) = rng.sample(list(CORNERS), 2)
    objects = [(first, *CORNERS[one]), (second, *CORNERS[other])]
    return objects, [
        f"{first.plain} in the {one} and {second.plain} in the {other}",
        f"{second.plain} in the {other} corner, {first.plain} in the {one} corner",
        f"the {one} corner is {first.colour} and the {other} corner {second.colour}",
        f"{first.plain} and {second.plain} in two corners of {ground}",
        f"a {first.shape} in the {one} corner and a {second.shape} in the {other} corner",
    ]


def render_hard(scene: HardScene, size: int, rng: random.Random) -> Image.Image:
    """Draw a scene as an RGB image of 4:3, `size` pixels high."""
    height = 2 * size  # drawn larger and reduced, for smooth edges
    width = height * COLUMNS // ROWS
    red, green, blue = BACKGROUNDS[scene.background]
    shade = rng.randint(-10, 10)
    ground = (red + shade, green + shade, blue + shade)
    image = Image.new("RGB", (width, height), ground)
    canvas, cell = ImageDraw.Draw(image), height / ROWS
    for thing, column, row in scene.objects:
        x, y = (
            (index + 0.5) * cell + rng.uniform(-JITTER, JITTER) * height for index in (column, row)
        )
        paint(canvas, thing, x, y, RADIUS * height * rng.uniform(0.9, 1.1), ground)
    return image.resize((size * COLUMNS // ROWS, size), Image.Resampling.LANCZOS)
