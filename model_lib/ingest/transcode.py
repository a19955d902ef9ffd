"""An image's bytes to those that are stored: decoded, upright, reduced, and JPEG again.

Photographs come as JPEG, and libjpeg-turbo and the resizing below work on threads, outside the
interpreter's lock. Whatever is unusual about a file is left to `decode_image`, which alone decides
what is an image.
"""

import importlib.util
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from model_lib.errors import WorkError
from model_lib.io.images import MAX_PIXELS, ImageError, decode_image, reduced_size

ORIENTATION = 0x0112
"""EXIF's tag; 1 is upright."""


@dataclass(frozen=True)
class Stored:
    """What is kept of an image; width and height are those of the upright image."""

    content: bytes
    width: int
    height: int


def original(content: bytes) -> Stored:
    """Return an image's bytes as they are; `ImageError` if they are none."""
    height, width, _ = _pixels(content).shape
    return Stored(content, width, height)


def reduced(content: bytes, shortest_side: int, quality: int) -> Stored:
    """Return an image as JPEG, its shorter side reduced to `shortest_side` pixels, bicubic as
    Pillow's.

    Raises:
        ImageError: it cannot be decoded, or is too long for JPEG.
    """
    simplejpeg = _codec()
    pixels = _shrunk(_pixels(content), shortest_side)
    height, width, _ = pixels.shape
    try:
        # Colours at half the resolution, the usual, would lie further from the image than
        # everything else here.
        return Stored(simplejpeg.encode_jpeg(pixels, quality, "RGB", "444"), width, height)
    except ValueError as error:  # JPEG ends at 65,500 pixels a side
        raise ImageError("not_storable", f"{width}x{height} as JPEG: {error}") from error


def _pixels(content: bytes) -> np.ndarray:
    """Return an upright image's pixels, uint8 [height, width, 3]; `ImageError` if it cannot be
    decoded."""
    if importlib.util.find_spec("simplejpeg") and _plain(content):
        try:
            return _codec().decode_jpeg(content, "RGB")
        except ValueError:  # damaged, and perhaps beyond use
            pass
    return np.asarray(decode_image(content))


def _codec() -> Any:
    """Return libjpeg-turbo's own interface; without it images can be kept as they are, and not be
    reduced."""
    try:
        import simplejpeg
    except ImportError as error:
        raise WorkError(
            f"reducing images needs {error.name}: pip install {error.name}, or --store original"
        ) from error
    return simplejpeg


def _plain(content: bytes) -> bool:
    """Whether the bytes are an upright JPEG in colour, as far as its header says."""
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG"])
        large = image.width * image.height > MAX_PIXELS
        return (
            image.format == "JPEG"
            and image.mode == "RGB"
            and image.getexif().get(ORIENTATION, 1) == 1
            and not large
        )
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
