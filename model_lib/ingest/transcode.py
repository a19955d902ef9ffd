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


SPARE = 3
"""A photograph is decoded at half its size, in half the time, if that is so many times the stored
size: photographs are then 0.3 to 0.7 of 255 from the truth, on average over their pixels."""


class Stored(NamedTuple):
    """An image as it is stored; width and height are those of the upright image."""

    content: bytes
    width: int
    height: int


class Decoded(NamedTuple):
    """An upright image; width and height are its own, also where the pixels are fewer."""

    pixels: np.ndarray
    """uint8 [rows, columns, 3]"""
    width: int
    height: int


def reduced(content: bytes, shortest_side: int, quality: int) -> Stored:
    """Return an image as JPEG, its shorter side reduced to `shortest_side` pixels; `ImageError` if
    it cannot be decoded, or is too long for JPEG."""
    pixels = _shrunk(_decoded(content, shortest_side), shortest_side)
    height, width, _ = pixels.shape
    try:
        # Colours at half the resolution, the usual, would lose more than all other steps.
        return Stored(simplejpeg.encode_jpeg(pixels, quality, "RGB", "444"), width, height)
    except ValueError as error:  # JPEG ends at 65,500 pixels a side
        raise ImageError("not_storable", f"{width}x{height} as JPEG: {error}") from error


def _decoded(content: bytes, shortest_side: int) -> Decoded:
    """Decode an image that will be reduced to `shortest_side`."""
    size = _plain_jpeg_size(content)
    if size is not None:
        width, height = size
        factor = 2 if min(size) >= 2 * SPARE * shortest_side else 1
        scaled = {"min_width": -(-width // factor), "min_height": -(-height // factor)}
        with contextlib.suppress(ValueError):  # damaged; Pillow may still show it
            pixels = simplejpeg.decode_jpeg(content, "RGB", min_factor=factor, **scaled)
            return Decoded(pixels, width, height)
    pixels = np.asarray(decode_image(content))
    return Decoded(pixels, pixels.shape[1], pixels.shape[0])


def _plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return width and height from the header of an upright JPEG in colour, of a usual size; None:
    it is something else."""
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG"])
        is_plain = (
            image.format == "JPEG"  # not MPO, which Pillow's reader finds too
            and image.mode == "RGB"
            and orientation(image) == 1
            and image.width * image.height <= MAX_PIXELS
        )
    except Exception:  # `decode_image` raises it
        return None
    return image.size if is_plain else None


def _shrunk(image: Decoded, shortest_side: int) -> np.ndarray:
    pixels, width, height = image
    if min(width, height) <= shortest_side:
        return np.ascontiguousarray(pixels)
    columns, rows = reduced_size(width, height, shortest_side)
    small = ImageData(columns, rows, PixelType.U8x3)
    large = ImageData(pixels.shape[1], pixels.shape[0], PixelType.U8x3, pixels.tobytes())
    Resizer().resize(large, small, ResizeOptions(resize_alg=ResizeAlg.convolution(BICUBIC)))
    return np.frombuffer(small.get_buffer(), np.uint8).reshape(rows, columns, 3)
