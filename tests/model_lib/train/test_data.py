"""Random views of training images: their captions stay true."""

import numpy as np
from PIL import Image

from model_lib.io.pixels import Preprocessing
from model_lib.train.data import augment


def sides(image: Image.Image, captions: list[str]) -> set[str]:
    """Return on which sides the red half of an image was seen in forty views of it."""
    seen = set()
    for seed in range(40):
        pixels = augment(image, Preprocessing(32), captions, np.random.default_rng(seed))
        assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8
        seen.add("left" if pixels[0, :, 0].mean() > pixels[0, :, -1].mean() else "right")
    return seen


def test_an_image_is_mirrored_only_if_its_captions_stay_true() -> None:
    image = Image.new("RGB", (80, 60), "black")
    image.paste("red", (0, 0, 40, 60))
    assert sides(image, ["a red half", "a bright leftover"]) == {"left", "right"}
    assert sides(image, ["an image", "Red on the LEFT, black elsewhere"]) == {"left"}
    assert sides(image, ["the right-hand side is black"]) == {"left"}


def test_views_keep_most_of_the_image_and_its_colours() -> None:
    image = Image.new("RGB", (60, 60), (10, 200, 30))
    image.paste("white", (20, 20, 40, 40))
    for seed in range(40):
        pixels = augment(image, Preprocessing(32), [], np.random.default_rng(seed))
        assert pixels[:, 16, 16].min() > 240 and pixels[:, 0, 0].tolist() == [10, 200, 30]
        again = augment(image, Preprocessing(32), [], np.random.default_rng(seed))
        assert np.array_equal(pixels, again)


def test_a_view_for_a_tower_that_stretches_images_is_stretched() -> None:
    image = Image.new("RGB", (300, 60), "white")
    image.paste("red", (0, 0, 150, 60))
    for seed in range(40):
        view = augment(
            image, Preprocessing(32, stretch=True), ["left"], np.random.default_rng(seed)
        )
        assert view[1, 16, 0] == 0 and view[1, 16, -1] == 255
