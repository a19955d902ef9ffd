"""From an image's bytes to the bytes that are stored: decoded, upright, reduced, JPEG again.

Photographs come as JPEG, and libjpeg-turbo and the resizing below work on threads, outside the
interpreter's lock. Every unusual file goes to `decode_image`, which alone decides what is an image.
"""

import contextlib
import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image

from model_lib.io.images import MAX_PIXELS, ImageError, decode_image, orientation, reduced_size

BICUBIC = FilterType.catmull_rom
"""Pillow's bicubic filter."""


class Stored(NamedTuple):
    """An image as it is stored; width and height are those of the upright image."""

    content: bytes
    width: int
    height: int


def original(content: bytes) -> Stored:
    """Return an image's bytes as they are; `ImageError` if they cannot be decoded."""
    height, width, _ = _pixels(content).shape
    return Stored(content, width, height)


def reduced(content: bytes, shortest_side: int, quality: int) -> Stored:
    """Return an image as JPEG, its shorter side reduced to `shortest_side` pixels; `ImageError` if
    it cannot be decoded, or is too long for JPEG."""
    pixels = _shrunk(_pixels(content), shortest_side)
    height, width, _ = pixels.shape
    try:
        # Colours at half the resolution, the usual, would lose more than all other steps.
        return Stored(simplejpeg.encode_jpeg(pixels, quality, "RGB", "444"), width, height)
    except ValueError as error:  # JPEG ends at 65,500 pixels a side
        raise ImageError("not_storable", f"{width}x{height} as JPEG: {error}") from error


def _pixels(content: bytes) -> np.ndarray:
    """Return an upright image's pixels, uint8 [height, width, 3]."""
    with contextlib.suppress(ValueError):  # damaged; Pillow may still show it
        if _is_plain_jpeg(content):
            return simplejpeg.decode_jpeg(content, "RGB")
    return np.asarray(decode_image(content))


def _is_plain_jpeg(content: bytes) -> bool:
    """Return whether the header is that of an upright JPEG in colour, of a usual size."""
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG"])
        return (
            image.format == "JPEG"  # not MPO, which Pillow's reader finds too
            and image.mode == "RGB"
            and orientation(image) == 1
            and image.width * image.height <= MAX_PIXELS
        )
    except Exception:  # `decode_image` raises it
        return False


def _shrunk(pixels: np.ndarray, shortest_side: int) -> np.ndarray:
    height, width, _ = pixels.shape
    if min(width, height) <= shortest_side:
        return np.ascontiguousarray(pixels)
    columns, rows = reduced_size(width, height, shortest_side)
    small = ImageData(columns, rows, PixelType.U8x3)
    options = ResizeOptions(resize_alg=ResizeAlg.convolution(BICUBIC))
    Resizer().resize(ImageData(width, height, PixelType.U8x3, pixels.tobytes()), small, options)
    return np.frombuffer(small.get_buffer(), np.uint8).reshape(rows, columns, 3)
