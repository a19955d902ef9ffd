"""From an RGB image to the pixels that a vision tower takes, as its image processor makes them."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from model_lib.io.images import reduced_size


@dataclass(frozen=True)
class Preprocessing:
    """An image processor's geometry, bit for bit that of transformers' `CLIPImageProcessorPil` and
    `SiglipImageProcessorPil`: resize, then cut out the centre. `Captioner.encode` normalises.
    """

    size: int
    """Side of the result in pixels."""
    resize: int | None = None
    """Pixels to which the shorter side is resized before the centre is cut out; None: `size`."""
    stretch: bool = False
    """Resize both sides to `resize`, whatever the image's shape, as SigLIP does."""
    resample: int = Image.Resampling.BICUBIC
    """Pillow's number of the filter."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return the pixels, uint8 [3, size, size], of an RGB image of any size."""
        resize = self.resize or self.size
        if self.stretch:
            width, height = resize, resize
        else:
            image = _cut_strip(image)
            width, height = reduced_size(*image.size, resize)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = image.resize((width, height), Image.Resampling(self.resample))
        pixels = np.asarray(resized.crop((left, top, left + self.size, top + self.size)))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def seen_part(self, width: int, height: int) -> tuple[float, float]:
        """Return the part of an image's width and height about its centre that the result shows, in
        percent."""
        part = 100 * self.size / (self.resize or self.size)
        side = min(width, height)
        return (part, part) if self.stretch else (part * side / width, part * side / height)


def _cut_strip(image: Image.Image) -> Image.Image:
    """Cut a long strip to its middle: resized whole, it would fill the memory."""
    shorter, longer = sorted(image.size)
    if longer <= 32 * shorter:
        return image
    start, end = (longer - 4 * shorter) // 2, (longer + 4 * shorter + 1) // 2
    if image.height == longer:
        return image.crop((0, start, shorter, end))
    return image.crop((start, 0, end, shorter))
