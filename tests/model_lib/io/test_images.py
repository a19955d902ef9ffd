"""Images of every kind become upright RGB or one clear error, and the model sees what CLIP would
see."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil

from model_lib.ingest.transcode import reduced
from model_lib.io.images import ImageError, decode_image
from model_lib.io.metadata import GDAL_NODATA
from model_lib.io.pixels import Preprocessing
from model_lib.model.vision import normalise
from tests.helpers.hostile_images import chunk, segment

BROKEN = {
    "broken.png": "unreadable",
    "broken_data_stream.png": "unreadable",
    "decompression_bomb.gif": "too_large",
    "made_truncated_coco397133.jpg": "truncated",
    "truncated_image.png": "truncated",
    "truncated_jpeg.jpg": "truncated",
}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_every_odd_image_opens_or_gives_its_reason(odd_images: Path) -> None:
    reasons = {}
    for file in sorted(odd_images.iterdir()):
        try:
            image = decode_image(file.read_bytes())
            assert image.mode == "RGB" and min(image.size) > 0
        except ImageError as error:
            reasons[file.name] = error.reason
    assert reasons == BROKEN


def quarter() -> Image.Image:
    """Return a white image with a red left quarter."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 10, 20))
    return image


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def is_red_above(image: Image.Image) -> bool:
    """Return whether `quarter` was turned clockwise by a quarter."""
    red, green, _ = image.getpixel((10, 3))
    return image.size == (20, 40) and red > 200 and green < 60


def test_exif_rotation_is_applied() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        assert is_red_above(decode_image(encoded(quarter(), kind, exif=turned(6)))), kind
    for orientation in range(1, 9):
        content = encoded(quarter(), "PNG", exif=turned(orientation))
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert (np.asarray(decode_image(content)) == np.asarray(expected)).all()


def test_a_heic_file_is_told_by_its_bytes_and_turned_as_its_boxes_say(odd_images: Path) -> None:
    content = (odd_images / "photo_empty_icc.heic").read_bytes()
    image = np.asarray(decode_image(content)).astype(int)
    assert image.shape == (900, 1025, 3)
    for brand in (b"heix", b"mif1", b"hevc"):
        named = np.asarray(decode_image(content.replace(b"ftypheic", b"ftyp" + brand, 1)))
        assert (named == image).all()
    # Its colour profile becomes a rotation to the left, once.
    rotated = np.asarray(decode_image(content.replace(b"colrprof", b"irot\1rof")))
    assert rotated.shape == (1025, 900, 3)
    assert np.abs(rotated.astype(int) - np.rot90(image)).mean() < 0.1


def test_an_avif_file_under_the_brand_of_any_image_is_read() -> None:
    content = encoded(quarter(), "AVIF", exif=turned(6))
    assert is_red_above(decode_image(content.replace(b"ftypavif", b"ftypmif1", 1)))


@pytest.mark.parametrize(
    ("name", "unknown", "remedy"),
    [
        ("heic", "", "HEIF, which needs pip install pi-heif"),
        ("avif", "Image.OPEN.pop('AVIF')", "AVIF, which needs pip install --upgrade pillow"),
    ],
)
def test_a_format_that_is_not_installed_names_the_command(
    name: str, unknown: str, remedy: str, odd_images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "image.jpg"
    heic = (odd_images / "photo_empty_icc.heic").read_bytes()
    file.write_bytes(heic if name == "heic" else encoded(quarter(), "AVIF"))
    code = f"""
import sys
sys.modules["pi_heif"] = None
from PIL import Image
from model_lib.io.images import ImageError, decode_image
Image.init()
{unknown}
try:
    decode_image(open(sys.argv[1], "rb").read())
except ImageError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(file)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == f"unreadable: {remedy}\n"


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert decode_image(encoded(image)).getpixel((4, 4)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped_and_dark_ones_stay_dark() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    values = np.asarray(decode_image(encoded(Image.fromarray(ramp))))[..., 0].ravel()
    assert np.abs(values.astype(int) - np.arange(256)).max() <= 1
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    assert decode_image(encoded(dark)).getpixel((1, 1)) == (1, 1, 1)


FLOAT_MAX = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("value", "no_data"),
    [
        (np.nan, None),
        (np.inf, None),
        (-np.inf, None),
        (FLOAT_MAX, None),
        (-FLOAT_MAX, "-3.4028234663852886e+38"),
        (32767, "32767"),
        (np.nan, "nan"),
        (-9999, "-9999"),
        (np.inf, "no number"),
    ],
)
def test_a_pixel_without_a_value_does_not_touch_the_others(
    value: float, no_data: str | None
) -> None:
    options = {} if no_data is None else {"tiffinfo": {GDAL_NODATA: no_data}}
    for brightest in (1, 300):
        ramp = np.linspace(0, brightest, 256, dtype=np.float32)
        ramp[128] = value
        content = encoded(Image.fromarray(ramp.reshape(16, 16)), "TIFF", **options)
        expected = np.arange(256)
        expected[128] = 0
        assert (np.asarray(decode_image(content))[..., 0].ravel() == expected).all()


def test_no_data_of_integers_is_black_and_does_not_touch_the_others() -> None:
    heights = np.arange(0, 1024, 4, dtype=np.int32).reshape(16, 16) * 256
    heights[8, 0] = 2**31 - 1
    content = encoded(Image.fromarray(heights), "TIFF", tiffinfo={GDAL_NODATA: str(2**31 - 1)})
    values = np.asarray(decode_image(content))[..., 0].ravel().astype(int)
    values[128] += 128
    assert (values == np.arange(256)).all()


@pytest.mark.parametrize("value", [np.nan, FLOAT_MAX, -9999])
def test_an_image_without_any_value_is_unreadable(value: float) -> None:
    image = Image.fromarray(np.full((4, 4), value, np.float32))
    with pytest.raises(ImageError, match="unreadable: none of its pixels has a value"):
        decode_image(encoded(image, "TIFF", tiffinfo={GDAL_NODATA: "-9999"}))


LARGE = zlib.compress(b"x" * 2**21)
NOTES = {
    "text": chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
    "colour profile": chunk(b"iCCP", b"profile\0\0" + LARGE),
    "many texts": chunk(b"tEXt", b"Comment\0" + b"x" * 2**20) * 65,
    "unknown compression": chunk(b"zTXt", b"Comment\0\7"),
    "wrong checksum": chunk(b"tEXt", b"Comment\0x")[:-1] + b"x",
    "cut resolution": chunk(b"pHYs", b""),
    "cut gamma": chunk(b"gAMA", b"1"),
    "animation that begins late": chunk(b"fcTL", struct.pack(">I22x", 5)),
}
SEGMENTS = {
    "cut JFIF": segment(0xE0, b"JFIF"),
    "cut Adobe": segment(0xEE, b"Adobe"),
    "cut Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    "cut colour profile": segment(0xE2, b"ICC_PROFILE\0"),
    "cut index of images": segment(0xE2, b"MPF\0MM\0*\0\0\0\10\0\2"),
}


@pytest.mark.parametrize("kind", NOTES)
@pytest.mark.parametrize("place", [slice(33, None), slice(-12, None)], ids=["before", "after"])
def test_a_png_is_read_whatever_its_notes_are(kind: str, place: slice) -> None:
    content = encoded(quarter(), exif=turned(6))
    before = content[: place.start]
    assert is_red_above(decode_image(before + NOTES[kind] + content[place]))


@pytest.mark.parametrize("kind", SEGMENTS)
def test_a_jpeg_is_read_whatever_its_notes_are(kind: str) -> None:
    content = encoded(quarter(), "JPEG", exif=turned(6))
    assert is_red_above(decode_image(content[:2] + SEGMENTS[kind] + content[2:]))


def test_a_tiff_is_read_whatever_its_tags_are() -> None:
    tags = {270: "description", 274: 6, 305: "software", 700: b"XMP" * 9}
    for compression in (None, "tiff_lzw"):
        content = encoded(quarter(), "TIFF", tiffinfo=tags, compression=compression)
        (start,) = struct.unpack_from("<I", content, 4)
        (count,) = struct.unpack_from("<H", content, start)
        entries = range(start + 2, start + 2 + 12 * count, 12)
        notes = [
            at for at in entries if struct.unpack_from("<H", content, at)[0] in (270, 305, 700)
        ]
        assert len(notes) == 3
        for at in notes:
            damaged = bytearray(content)
            damaged[at + 2 : at + 12] = b"\7\0" + b"\xff" * 8
            assert is_red_above(decode_image(bytes(damaged)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_is_none_turns_nothing(kind: str) -> None:
    content = encoded(quarter(), kind, exif=b"Exif\0\0no EXIF")
    assert decode_image(content).size == (40, 20)


def test_an_avif_is_read_whatever_its_exif_is() -> None:
    exif = turned(6)
    exif[270] = "description"
    content = encoded(quarter(), "AVIF", exif=exif)
    damaged = content.replace(b"MM\0*", b"junk").replace(b"II*\0", b"junk")
    assert damaged != content and is_red_above(decode_image(damaged))


def test_exif_that_points_outside_still_turns() -> None:
    entries = struct.pack(">HHIHxx", 0x0112, 3, 1, 6) + struct.pack(">HHII", 0x8769, 4, 1, 2**31)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    assert is_red_above(decode_image(encoded(quarter(), "JPEG", exif=exif)))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    animation = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert decode_image(animation).getpixel((1, 1))[0] > 200


def test_pixels_are_what_clip_sees_bit_for_bit(coco: Path) -> None:
    """Originals in RGB or grey; what differs on purpose in other modes has tests of its own
    above."""
    processor = CLIPImageProcessorPil()
    files = sorted(coco.glob("*2017/*.jpg"))
    assert len(files) == 85
    for file in files:
        for content in (file.read_bytes(), encoded(Image.open(file).convert("L"))):
            image = Image.open(io.BytesIO(content))
            expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
            pixels = torch.from_numpy(Preprocessing(224)(decode_image(content)))
            ours = normalise(pixels, processor.image_mean, processor.image_std)
            assert ours.dtype == expected.dtype and torch.equal(ours, expected), file


def test_a_long_strip_is_seen_by_its_middle_without_filling_the_memory() -> None:
    strip = Image.new("RGB", (2, 30_000), "blue")
    strip.paste("red", (0, 14_990, 2, 15_010))
    for image in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        pixels = Preprocessing(64)(image)
        assert pixels.shape == (3, 64, 64) and pixels[0].mean() > 250 and pixels[2].mean() < 5


def test_small_images_are_not_enlarged_for_storing() -> None:
    for size, expected in (((100, 300), (100, 300)), ((600, 300), (512, 256))):
        stored = reduced(encoded(Image.new("RGB", size)), 256, 95)
        assert decode_image(stored.content).size == (stored.width, stored.height) == expected


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"no image", "unreadable")])
def test_what_is_no_image_has_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(content)


@pytest.mark.parametrize("kind", ["DDS", "EPS", "PCX", "ICO", "TGA", "SGI", "PDF", "XBM", "IM"])
def test_formats_that_nobody_photographs_in_are_not_tried(kind: str) -> None:
    content = encoded(Image.new("1" if kind == "XBM" else "RGB", (8, 8)), kind)
    with pytest.raises(ImageError, match="not an image in a format known here"):
        decode_image(content)


def test_an_image_of_more_pixels_than_half_a_gigabyte_holds_is_refused_by_its_header() -> None:
    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = struct.pack(">II", 15_000, 10_000)  # fewer than Pillow itself calls a bomb
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(ImageError, match="too_large: 15000x10000 pixels"):
        decode_image(bytes(content))


def test_whatever_a_decoder_raises_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's reader of DDS raises NotImplementedError for a kind that it does not know."""
    numbers = [124, 0x1007, 8, 8, 0, 0, 0, 32, 4, b"DX10", 0x1000, 0, 0, 0, 0]
    header = struct.pack("<4s7I44x2I4s20x5I", b"DDS ", *numbers)
    monkeypatch.setattr("model_lib.io.images.FORMATS", ("DDS",))
    with pytest.raises(ImageError, match="unreadable"):
        decode_image(header + struct.pack("<5I", 9999, 3, 0, 1, 0))
