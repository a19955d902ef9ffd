"""Image files without their metadata, as readers refuse whole files for a broken note in them."""

import re
import struct
import zlib

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
PNG_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of texts that may say how an image is turned; larger ones than `LARGEST_TEXT` do not."""
LARGEST_TEXT = 2**16
TIFF = {b"II*\0": "<", b"MM\0*": ">"}
"""The order of bytes in numbers."""
TIFF_NOTES = {269, 270, 271, 272, 285, 305, 306, 315, 316, 330, 333, 337}
"""Texts, and other images, among the tags of TIFF 6.0, which end at `TIFF_END`."""
TIFF_END = 600
GDAL_NODATA = 42113
AVIF = (b"ftypavif", b"ftypavis")
EXIF_ITEM = re.compile(rb"(infe\x02.{7})Exif", re.DOTALL)
"""How an AVIF lists its EXIF, which says nothing that its boxes do not say: these turn it."""


def without_metadata(content: bytes) -> bytes | None:
    """Return a PNG, JPEG, TIFF or AVIF file with little but its pixels and its orientation; None:
    it has no more, or is of another format."""
    if content.startswith(PNG):
        stripped = _png(content)
    elif content.startswith(JPEG):
        stripped = _jpeg(content)
    elif content[:4] in TIFF:
        stripped = _tiff(content)
    elif content[4:12] in AVIF:
        stripped = EXIF_ITEM.sub(rb"\1free", content, 1)
    else:
        return None
    return stripped if stripped != content else None


def _png(content: bytes) -> bytes:
    """Keep the chunks of the (first) image; what is left out of an animation are its frames."""
    parts, start = [PNG], len(PNG)
    while start + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, start)
        chunk = content[start : start + length + 12]
        start += len(chunk)
        is_whole = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        is_text = name in (b"tEXt", b"zTXt", b"iTXt") and length <= LARGEST_TEXT
        is_exif = name == b"eXIf" or (is_text and chunk[8:].startswith(PNG_TEXTS))
        if name in PNG_PIXELS or (is_exif and is_whole):
            parts.append(chunk)
        if name == b"IEND":
            break
    return b"".join(parts)


def _jpeg(content: bytes) -> bytes:
    """Keep the segments, but of the notes only those that say how colours are stored, and EXIF."""
    parts, start = [JPEG], len(JPEG)
    while start + 4 <= len(content) and content[start] == 0xFF:
        marker, length = content[start + 1], int.from_bytes(content[start + 2 : start + 4])
        if marker == 0xDA or not 0xC0 <= marker <= 0xFE:  # the scan, or none of a header
            break
        segment = content[start : start + 2 + length]
        start += len(segment)
        is_note = 0xE0 <= marker <= 0xEF or marker == 0xFE
        is_colour = len(segment) >= 16 and segment[4:9] in (b"JFIF\0", b"Adobe")
        if not is_note or is_colour or segment[4:10] == b"Exif\0\0":
            parts.append(segment)
    return b"".join([*parts, content[start:]])


def _tiff(content: bytes) -> bytes:
    """Keep, of the first image's directory, the entries that describe pixels."""
    order = TIFF[content[:4]]
    try:
        (start,) = struct.unpack_from(order + "I", content, 4)
        (count,) = struct.unpack_from(order + "H", content, start)
    except struct.error:
        return content
    entries = [content[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    kept = []
    for entry in entries:
        tag = int.from_bytes(entry[:2], "little" if order == "<" else "big")
        if (tag < TIFF_END and tag not in TIFF_NOTES) or tag == GDAL_NODATA:
            kept.append(entry)
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)  # it is the last
    return content[:start] + directory + content[start + len(directory) :]
