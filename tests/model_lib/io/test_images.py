"""Images of every kind become upright RGB or one clear error, and the model sees what CLIP would
see."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from model_lib.ingest.transcode import reduced
from model_lib.io.images import ImageError, decode_image
from model_lib.io.pixels import Preprocessing
from model_lib.model.captioner import normalise

BROKEN = {
    "broken.png": "unreadable",
    "broken_data_stream.png": "unreadable",
    "decompression_bomb.gif": "too_large",
    "made_truncated_coco397133.jpg": "truncated",
    "photo_empty_icc.heic": "unreadable",
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


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    turned = decode_image(encoded(image, "JPEG", exif=exif))
    assert turned.size == (20, 40)
    assert turned.getpixel((10, 3))[0] > 200 and turned.getpixel((10, 3))[1] < 60


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert decode_image(encoded(image)).getpixel((4, 4)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped_and_dark_ones_stay_dark() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    values = np.asarray(decode_image(encoded(Image.fromarray(ramp))))[..., 0].ravel()
    assert np.abs(values.astype(int) - np.arange(256)).max() <= 1
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    assert decode_image(encoded(dark)).getpixel((1, 1)) == (1, 1, 1)


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
