"""Image files that are cut, damaged or decompression bombs, made from a seed and named for it."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
MEGABYTE = 2**20


def image(rng: np.random.Generator, width: int = 160, height: int = 120) -> Image.Image:
    """Return an image with some structure and some noise."""
    image = Image.fromarray(rng.integers(0, 60, (height, width, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        draw.ellipse((x, y, x + 40, y + 30), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, FORMATS[kind], **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG, its checksum right."""
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png_of_size(width: int, height: int, rows: bytes, before: bytes = b"") -> bytes:
    """Return a PNG that says it is so large, whatever its rows hold."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def segment(marker: int, content: bytes) -> bytes:
    """Return a JPEG segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def _with_size(jpeg: bytes, width: int, height: int) -> bytes:
    start = jpeg.index(b"\xff\xc0")  # of its frame
    return jpeg[: start + 5] + struct.pack(">HH", height, width) + jpeg[start + 9 :]


def _many_scans(jpeg: bytes, times: int) -> bytes:
    """Repeat a progressive JPEG's last scan, each of which costs a pass over the whole image."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * times + b"\xff\xd9"


def _bombs(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    small = image(rng)
    jpeg, rows = encoded(small, "jpg"), b"\0" * 1000
    for side in (20_000, 65_000, 2**31 - 1):
        yield f"bomb-pixels-{side}.png", png_of_size(side, side, rows)
    yield "bomb-pixels-real.png", encoded(Image.new("1", (30_000, 30_000)), "png")
    yield "bomb-pixels-real.gif", encoded(Image.new("P", (16_000, 16_000)), "gif")
    for width, height in ((65_500, 65_500), (65_535, 1), (0, 0), (0, 100), (1, 65_535)):
        yield f"false-size-{width}x{height}.jpg", _with_size(jpeg, width, height)
        yield f"false-size-{width}x{height}.png", png_of_size(width, height, rows)
    zeros = zlib.compress(b"\0" * (300 * MEGABYTE))
    chunks = {"zTXt": b"Comment\0\0", "iTXt": b"Comment\0\1\0\0\0", "iCCP": b"profile\0\0"}
    before = {name: chunk(name.encode(), start + zeros) for name, start in chunks.items()}
    before["many-texts"] = chunk(b"tEXt", b"a\0" + b"b" * 500) * 20_000
    for name, content in before.items():
        yield f"bomb-{name}.png", png_of_size(8, 8, b"\0" * 200, content)
    many = b"".join(segment(0xE1, b"Exif\0\0" + bytes(65_000)) for _ in range(300))
    yield "enormous-exif.jpg", jpeg[:2] + many + jpeg[2:]
    parts = [b"ICC_PROFILE\0" + bytes([n, 255]) + bytes(65_000) for n in range(1, 256)]
    profile = b"".join(segment(0xE2, part) for part in parts)
    yield "enormous-icc.jpg", jpeg[:2] + profile + jpeg[2:]
    yield "enormous-comment.jpg", jpeg[:2] + segment(0xFE, b"x" * 65_000) * 300 + jpeg[2:]
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * (5 * MEGABYTE))
    yield "enormous-text.png", encoded(small, "png", pnginfo=info)
    progressive = encoded(image(rng, 1600, 1200), "jpg", progressive=True)
    yield "many-scans.jpg", _many_scans(progressive, 100)
    first, *frames = [Image.new("P", (200, 200), n % 256) for n in range(500)]
    options = {"save_all": True, "append_images": frames}
    for kind in ("gif", "png", "webp"):
        yield f"deep-animation.{kind}", encoded(first.convert("RGB"), kind, **options)


def corpus(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield at least `count` file names and contents."""
    rng = np.random.default_rng(seed)
    bombs = list(_bombs(rng))
    yield from bombs
    mutations: list[Callable[[bytes], bytes]] = [
        lambda content: content[: int(rng.integers(1, len(content)))],
        lambda content: _flipped(content, rng, 1),
        lambda content: _flipped(content, rng, 30),
        lambda content: _flipped(content[:64], rng, 4) + content[64:],
        lambda content: content + rng.bytes(5000),
        lambda content: content[:1000] + rng.bytes(200) + content[1000:],
        lambda content: rng.bytes(len(content)),
        lambda content: content[:20] + content[-20:],
        lambda content: b"",
        lambda content: content,
    ]
    kinds = list(FORMATS)
    for number in range(len(bombs), count):
        kind, mutation = kinds[number % len(kinds)], number // len(kinds) % len(mutations)
        content = mutations[mutation](encoded(image(rng), kind))
        # A wrong ending now and then.
        named = kinds[int(rng.integers(len(kinds)))] if number % 5 == 0 else kind
        yield f"{number:04}-{mutation}-{kind}.{named}", content


def _flipped(content: bytes, rng: np.random.Generator, count: int) -> bytes:
    changed = bytearray(content)
    for position in rng.integers(0, len(content), count):
        changed[position] ^= int(rng.integers(1, 256))
    return bytes(changed)
