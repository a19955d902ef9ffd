"""Views of a training image that its captions stay true of."""

import re
from collections.abc import Iterable

import numpy as np
from PIL import Image

SMALLEST_CROP = 0.85
"""Side of the smallest crop, as a share of the shorter side: what a caption names stays in
sight."""
SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)
"""Words that are wrong of a mirrored image."""


def augmented(
    image: Image.Image, size: int, captions: Iterable[str], rng: np.random.Generator
) -> np.ndarray:
    """Return a view of an image that its captions stay true of: a large crop, mirrored half of the
    time.

    An image is not mirrored if a caption says left or right. Colours stay as they are, since
    captions name them.

    Args:
        image: RGB, any size.
        size: side of the result in pixels.
        captions: of the image.
        rng: decides; the same state gives the same view.

    Returns:
        uint8 [3, size, size].
    """
    side = min(image.size) * rng.uniform(SMALLEST_CROP, 1)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    view = image.resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    pixels = np.asarray(view).transpose(2, 0, 1)
    if rng.random() < 0.5 and not any(SIDED.search(caption) for caption in captions):
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)
