"""A picture's bytes to those that are stored: decoded, upright, reduced, and JPEG again.

Photographs come as JPEG, and libjpeg-turbo and the resizing below work on threads, outside the interpreter's lock.
Whatever is unusual about a file is left to `open_picture`, which alone decides what is a picture.
"""

import importlib.util
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from model_lib.errors import WorkError
from model_lib.pictures import MAX_PIXELS, PictureError, open_picture, reduced_size

ORIENTATION = 0x0112
"""EXIF's tag; 1 is upright."""


@dataclass(frozen=True)
class Stored:
    """What is kept of a picture; width and height are those of the upright picture."""

    content: bytes
    width: int
    height: int


def original(content: bytes) -> Stored:
    """Return a picture's bytes as they are; `PictureError` if they are none."""
    height, width, _ = _pixels(content).shape
    return Stored(content, width, height)


def reduced(content: bytes, shortest_side: int, quality: int) -> Stored:
    """Return a picture as JPEG, its shorter side reduced to `shortest_side` pixels, bicubic as Pillow's.

    Raises:
        PictureError: it cannot be decoded, or is too long for JPEG.
    """
    simplejpeg = _codec()
    pixels = _shrunk(_pixels(content), shortest_side)
    height, width, _ = pixels.shape
    try:
        # Colours at half the resolution, the usual, would lie further from the picture than everything else here.
        return Stored(simplejpeg.encode_jpeg(pixels, quality, "RGB", "444"), width, height)
    except ValueError as error:  # JPEG ends at 65,500 pixels a side
        raise PictureError("not_storable", f"{width}x{height} as JPEG: {error}") from error


def _pixels(content: bytes) -> np.ndarray:
    """Return an upright picture's pixels, uint8 [height, width, 3]; `PictureError` if it cannot be decoded."""
    if importlib.util.find_spec("simplejpeg") and _plain(content):
        try:
            return _codec().decode_jpeg(content, "RGB")
        except ValueError:  # damaged, and perhaps beyond use
            pass
    return np.asarray(open_picture(content))


def _codec() -> Any:
    """Return libjpeg-turbo's own interface; without it pictures can be kept as they are, and not be reduced."""
    try:
        import simplejpeg
    except ImportError as error:
        raise WorkError(
            f"reducing pictures needs {error.name}: pip install {error.name}, or --store original"
        ) from error
    return simplejpeg


def _plain(content: bytes) -> bool:
    """Whether the bytes are an upright JPEG in colour, as far as its header says."""
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG"])
        large = image.width * image.height > MAX_PIXELS
        return image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1 and not large
    except Exception:  # the decoder says what is wrong
        return False


def _shrunk(pixels: np.ndarray, shortest_side: int) -> np.ndarray:
    from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer

    height, width, _ = pixels.shape
    if min(width, height) <= shortest_side:
        return np.ascontiguousarray(pixels)
    columns, rows = reduced_size(width, height, shortest_side)
    small = ImageData(columns, rows, PixelType.U8x3)
    bicubic = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.catmull_rom))
    Resizer().resize(ImageData(width, height, PixelType.U8x3, pixels.tobytes()), small, bicubic)
    return np.frombuffer(small.get_buffer(), np.uint8).reshape(rows, columns, 3)
