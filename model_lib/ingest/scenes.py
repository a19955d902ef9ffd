"""Generated scenes: a small COCO-format data set on which a tiny model learns to see.

Coloured shapes, large or small, one to three of a kind or two in a spatial relation, on varied
backgrounds, with five differently worded captions each. Some combinations of size, colour and shape
occur only in the validation images: a model that names them has not memorised training images.
"""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from model_lib.ingest.config import ScenesConfig
from model_lib.ingest.hard_scenes import draw_hard_scene, render_hard
from model_lib.ingest.shapes import BACKGROUNDS, COLOURS, Thing, paint
from model_lib.io import storage

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADIUS = {"small": 0.13, "large": 0.22}
"""Radius as a share of the image's side."""
JITTER = 0.03
"""Largest distance of an object from the middle of its quarter, as a share of the side."""
HELD_OUT = {
    (size, colour, shape)
    for s, size in enumerate(RADIUS)
    for c, colour in enumerate(COLOURS)
    for n, shape in enumerate(SHAPES)
    if (3 * s + c + n) % len(SHAPES) == 0
}
"""Combinations that training never shows: of each colour, one shape in small and another in
large."""
NUMBERS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Scene:
    """An image's content: `count` of `first`, or `first` in `relation` to `second`."""

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
                f"{first.full} {self.relation} {second.full}",
                f"{second.full} is {inverse} {first.full}",
                f"there is {first.plain} {self.relation} {second.plain} on {ground}",
                f"a {ground} background with {first.plain} and {second.plain}",
                f"a picture of {first.full} and {second.full}",
            ]
        full, plain, verb = first.full, first.plain, "is"
        if self.count > 1:
            number, ending = NUMBERS[self.count], "es" if first.shape.endswith("s") else "s"
            full = f"{number} {first.size} {first.colour} {first.shape}{ending}"
            plain = f"{number} {first.colour} {first.shape}{ending}"
            verb = "are"
        return [
            f"{full} on a {ground} background",
            f"{plain} on {ground}",
            f"there {verb} {full}",
            f"a {ground} background with {plain}",
            f"a picture of {full}",
        ]


def draw_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Draw a scene's content; `held_out`: with a combination that training never shows."""
    background = rng.choice(list(BACKGROUNDS))
    first = _draw_thing(rng, held_out)
    if rng.random() < 0.5:
        return Scene(background, first, rng.randint(1, 3))
    second = _draw_thing(rng, False)
    while (second.colour, second.shape) == (first.colour, first.shape):
        second = _draw_thing(rng, False)
    if rng.random() >= 0.5:
        first, second = second, first
    return Scene(background, first, second=second, relation=rng.choice(("left of", "above")))


def _draw_thing(rng: random.Random, held_out: bool) -> Thing:
    while True:
        kind = rng.choice(list(RADIUS)), rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if (kind in HELD_OUT) == held_out:
            return Thing(*kind)


def _centres(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """Return the objects' centres, as shares of the side: near the middles of quarters."""
    if scene.second is None:
        quarters = rng.sample([(0, 0), (1, 0), (0, 1), (1, 1)], scene.count)
    else:
        line = rng.randrange(2)
        quarters = [(0, line), (1, line)] if scene.relation == "left of" else [(line, 0), (line, 1)]

    def near(quarter: int) -> float:
        return 0.25 + 0.5 * quarter + rng.uniform(-JITTER, JITTER)

    return [(near(x), near(y)) for x, y in quarters]


def render(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """Draw a scene as an RGB image of `size` x `size` pixels, on a slightly varied background."""
    side = 2 * size  # drawn larger and reduced, for smooth edges
    shade = rng.randint(-10, 10)
    red, green, blue = (value + shade for value in BACKGROUNDS[scene.background])
    ground = (red, green, blue)
    image = Image.new("RGB", (side, side), ground)
    canvas = ImageDraw.Draw(image)
    things = [scene.first, scene.second] if scene.second else [scene.first] * scene.count
    for thing, (x, y) in zip(things, _centres(scene, rng), strict=True):
        radius = RADIUS[thing.size] * rng.uniform(0.93, 1.07)
        paint(canvas, thing, x * side, y * side, radius * side, ground)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _make(
    config: ScenesConfig, rng: random.Random, held_out: bool
) -> tuple[Image.Image, Sequence[str]]:
    """Return a scene's image and captions."""
    if config.hard:
        hard = draw_hard_scene(rng, held_out=held_out)
        return render_hard(hard, config.size, rng), hard.captions
    scene = draw_scene(rng, held_out=held_out)
    return render(scene, config.size, rng), scene.captions()


def make_scenes(config: ScenesConfig) -> None:
    """Write the data set in COCO's layout; the same configuration writes the same bytes."""
    storage.require_writable(config.output)
    for split, count, held_out in (("train", config.train, False), ("val", config.val, True)):
        rng = random.Random(f"{config.seed}/{split}")
        folder = storage.join(config.output, f"{split}2017")
        storage.remove(folder)  # with images of an earlier, larger set
        images: list[dict] = []
        annotations: list[dict] = []
        for number in range(1, count + 1):
            image, captions = _make(config, rng, held_out)
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=92)
            name = f"{number:012d}.jpg"
            storage.write_bytes(storage.join(folder, name), encoded.getvalue())
            width, height = image.size
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            for caption in captions:
                note = {"id": len(annotations) + 1, "image_id": number, "caption": caption}
                annotations.append(note)
        info = {"description": "generated scenes"}
        document = {"info": info, "images": images, "annotations": annotations}
        uri = storage.join(config.output, "annotations", f"captions_{split}2017.json")
        storage.write_json(uri, document)
