"""From an image file's bytes to an upright RGB image, and to the model's pixels.

An unusable image is an `ImageError` with a reason from a short list, to be counted and reported
while the others go on.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from model_lib.io.metadata import GDAL_NODATA, without_metadata

# fmt: off
EXTENSIONS = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc",
    ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".avifs", ".heic", ".heif", ".hif",
}
# fmt: on
"""Endings of the files that count as images when a folder is searched, whatever is in them."""
FORMATS = (
    "JPEG",
    "MPO",
    "JPEG2000",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "AVIF",
    "HEIF",
    "PPM",
)
"""Pillow's names of the formats that are read, whatever a file's ending says. AVIF is before HEIF,
whose reader takes files of both by their name `mif1`, and fails on AVIF."""
CODECS = {
    "AVIF": (b"avif avis", "pip install --upgrade pillow"),
    "HEIF": (b"heic heix heim heis hevc hevx hevm hevs mif1 msf1", "pip install pi-heif"),
}
"""Formats that may not be installed: their brands, by which a file's first box names its format,
and the remedy."""
WEAK = ("PPM", "BMP", "DIB")
"""Those whose files begin with so few fixed bytes that a text or a table may begin so."""
MAX_PIXELS = 128 * 1024 * 1024
"""Images with more pixels are refused: decoding one would need more than half a gigabyte."""
LARGEST_FILE = 256 * 2**20
"""Bytes of a file from which it is not read, nor inflated from an archive."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation. Pillow's own turning writes the EXIF anew, which fails on odd tags."""


class ImageError(Exception):
    """An image that cannot be used: `reason` is a word that is counted, and `detail` says more.

    The reasons are unreadable, truncated, too_large and empty; not_storable as JPEG; and changed
    since it was listed.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def require_readable(size: int) -> None:
    """Raise `ImageError` if a file of `size` bytes is too large to be read as an image."""
    if size > LARGEST_FILE:
        raise ImageError("too_large", f"a file of more than {LARGEST_FILE:,} bytes")


def decode_image(content: bytes) -> Image.Image:
    """Decode an image to upright RGB.

    The first frame of an animation is taken, EXIF rotation applied, transparency laid on white,
    CMYK and palettes converted, and 16-bit values scaled rather than clipped.

    Raises:
        ImageError: the bytes are no whole image, or one of more than `MAX_PIXELS`.
    """
    if not content:
        raise ImageError("empty", "the file has no bytes")
    with _image_errors():
        try:
            return _upright_rgb(_open(content))
        except (Image.DecompressionBombError, ImageError, MemoryError):
            raise
        except Exception:  # Pillow also raises all kinds on metadata
            stripped = without_metadata(content)
            if stripped is None:
                raise
            return _upright_rgb(_open(stripped))


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a Pillow image as `decode_image` returns its file, without changing it."""
    with _image_errors():
        return _upright_rgb(image, copy=True)


def _open(content: bytes) -> Image.Image:
    formats = _formats()
    try:
        return Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError:
        if content[4:8] != b"ftyp":
            raise
        brands = content[8 : min(int.from_bytes(content[:4]), 256)]
        named = {brands[at : at + 4] for at in range(0, len(brands), 4)}
        for name, (known, remedy) in CODECS.items():
            if name not in formats and named & set(known.split()):
                raise ImageError("unreadable", f"{name}, which needs {remedy}") from None
        raise


def _upright_rgb(image: Image.Image, copy: bool = False) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height} pixels"
        raise ImageError("too_large", f"{size}, more than {MAX_PIXELS:,}")
    no_data = _no_data(image)
    if copy:
        image = image.copy()
    image.load()
    turn = TURNS.get(orientation(image))
    return _to_rgb(image if turn is None else image.transpose(turn), no_data)


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation of a Pillow image, 1 to 8; 1, upright, if it cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if value in TURNS else 1
    except Exception:  # Pillow's readers raise all kinds
        return 1


def _no_data(image: Image.Image) -> float:
    """Return the value that a TIFF of GDAL's names for pixels that have none; NaN: it names
    none."""
    try:
        return float(getattr(image, "tag_v2", {}).get(GDAL_NODATA, "nan").rstrip("\0 "))
    except (AttributeError, ValueError):
        return float("nan")


@contextlib.contextmanager
def _image_errors() -> Iterator[None]:
    """Raise Pillow's errors as `ImageError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb is refused by its size
            yield
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError("unreadable", "not an image in a format known here") from error
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise all kinds on damaged files
        reason = "truncated" if "truncated" in str(error) else "unreadable"
        raise ImageError(reason, str(error) or type(error).__name__) from error


@functools.cache
def _register_formats() -> None:
    Image.init()
    with contextlib.suppress(ImportError):
        import pi_heif

        pi_heif.register_heif_opener()


def _formats() -> list[str]:
    """Return the formats that are read and installed; Pillow alone would try every one it knows."""
    _register_formats()
    return [name for name in FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image, no_data: float) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_as_bytes(image, no_data))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(background, rgba).convert("RGB")
    # Converting copies: HEIF's reader alone reads its file again once the image is made smaller.
    is_plain = image.mode == "RGB" and image.format != "HEIF"
    return image if is_plain else image.convert("RGB")


def _as_bytes(image: Image.Image, no_data: float) -> np.ndarray:
    """Return wide integers or floats as uint8 [height, width]; pixels without a value are black."""
    values = np.array(image, dtype=np.float32)
    with np.errstate(over="ignore"):  # of a double's lowest number
        empty = values == np.float32(no_data)
    empty |= ~np.isfinite(values)
    if image.mode == "F":
        empty |= values == np.finfo(np.float32).max
    if empty.all():
        raise ImageError("unreadable", "none of its pixels has a value")
    values[empty] = 0
    # Integers wider than a byte are 16-bit grey; a format without a fixed range is scaled by its
    # own maximum.
    white = 1.0 if image.mode == "F" else 65535.0
    brightest = max(float(values.max()), white)
    return (values * (255 / brightest)).clip(0, 255).round().astype(np.uint8)


def reduced_size(width: int, height: int, shortest_side: int) -> tuple[int, int]:
    """Return width and height of an image whose shorter side has `shortest_side` pixels."""
    if width <= height:
        return shortest_side, int(shortest_side * height / width)
    return int(shortest_side * width / height), shortest_side


def is_image(content: bytes) -> bool:
    """Return whether bytes begin as an image in a format that is read; the rest may be damaged."""
    try:
        _open(content)
    except (Image.DecompressionBombError, MemoryError):
        return True  # which is for `decode_image` to refuse
    except Exception:  # Pillow's readers raise all kinds
        return False
    return True


def begins_as_image(start: bytes) -> bool:
    """Return whether the first 512 bytes of a file are those of an image in a format that is read,
    or would be if it were installed."""
    prefix = start[:16].ljust(16, b"\0")
    for name in _formats():
        accept = Image.OPEN[name][1]
        if accept is not None and accept(prefix) is True:
            return name not in WEAK or is_image(start)
    brands = [brand for known, _ in CODECS.values() for brand in known.split()]
    return prefix[4:8] == b"ftyp" and prefix[8:12] in brands
