"""Damaged and hostile zip archives: refused in one line, or their images quarantined, in bounded
memory, with nothing unpacked."""

import io
import stat
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from model_lib.errors import UserError
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.datasets import read_listing
from model_lib.io.archives import open_archive
from model_lib.io.images import ImageError
from tests.helpers import samples
from tests.helpers.coco_files import write_captions
from tests.helpers.ingests import ingested
from tests.helpers.invalid_files import fingerprint, refused

MEGABYTE = 2**20


@contextmanager
def memory(limit: int) -> Iterator[None]:
    """Fail if the body needs more than so many bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def list_member(name: str, archive: Path) -> None:
    """Read a member of an archive as COCO captions."""
    options = {"annotations": f"zip://{name}::{archive}", "images": str(archive)}
    read_listing(IngestConfig(**options, output="unused"))


def packed(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of 3 MB with 300 MB of zeros as an image, and of letters as a list."""
    path = tmp_path_factory.mktemp("large") / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped:
        for name, start, byte in (("large.jpg", b"", b"\0"), ("large.json", b'{"a": "', b"x")):
            with zipped.open(name, "w", force_zip64=True) as file:
                file.write(start)
                for _ in range(300):
                    file.write(byte * MEGABYTE)
    return path


def with_false_size(content: bytes, real: int, false: int) -> bytes:
    """Return an archive of one member whose headers give another size than it has."""
    # The member's own header, and the directory's.
    assert content.count(struct.pack("<I", real)) == 2
    return content.replace(struct.pack("<I", real), struct.pack("<I", false))


def test_a_bomb_is_not_inflated(bomb: Path) -> None:
    assert bomb.stat().st_size < 10 * MEGABYTE
    with memory(20 * MEGABYTE):
        with pytest.raises(ImageError, match="too_large"):
            open_archive(str(bomb)).read("large.jpg")
        message = refused(partial(list_member, "large.json", bomb), bomb.parent)
        assert "a value of more than" in message


@pytest.mark.parametrize("false", [10, 2**27])
def test_a_bomb_that_lies_about_its_size_is_not_inflated_further(
    tmp_path: Path, false: int
) -> None:
    real = 200 * MEGABYTE + 12_345
    file = packed(tmp_path / "a.zip", {"a.jpg": b"\0" * real})
    file.write_bytes(with_false_size(file.read_bytes(), real, false))
    with memory(3 * false + 8 * MEGABYTE), pytest.raises(ImageError, match="unreadable"):
        open_archive(str(file)).read("a.jpg")


def test_members_are_read_or_quarantined_and_never_unpacked(tmp_path: Path) -> None:
    images = tmp_path / "in" / "images.zip"
    images.parent.mkdir()
    names = ["link.jpg", "whole.jpg", "secret.jpg", "unknown.jpg", "damaged.jpg"]
    outside = ["../outside.jpg", str(tmp_path / "absolute.jpg")]
    link = zipfile.ZipInfo("link.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(images, "w") as zipped:
        zipped.writestr(link, "/etc/passwd")
        for name in (*outside, *names[1:]):
            zipped.writestr(name, samples.JPEG)
        # As the directory says: encrypted, and compressed by an unknown method.
        zipped.getinfo("secret.jpg").flag_bits |= 1
        zipped.getinfo("unknown.jpg").compress_type = 77
        zipped.getinfo("damaged.jpg").CRC ^= 1
    file = write_captions(images.parent / "captions.json", list(enumerate(names)))
    before = fingerprint(images.parent)
    options = {"annotations": file, "images": images, "split": "train"}
    manifest = ingested(tmp_path / "out", **options)
    assert manifest.counts == {"train": 1} and manifest.quarantined == {"unreadable": 4}
    assert fingerprint(images.parent) == before
    for name in outside:
        write_captions(file, [(0, name)])
        message = refused(partial(ingested, tmp_path / "out", **options), tmp_path)
        assert f"outside: 1); the first: leaves {images}" in message
    assert {file.name for file in tmp_path.iterdir()} == {"in", "out"}


def test_encrypted_and_missing_lists_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("a.json", "{}")
        zipped.getinfo("a.json").flag_bits |= 1
    for member in ("a.json", "b.json", "../a.json", "/a.json"):
        refused(partial(list_member, member, file), tmp_path)


@pytest.mark.parametrize("compression", samples.COMPRESSIONS)
def test_archives_that_are_damaged_anywhere_are_refused_or_read(
    tmp_path: Path, compression: int
) -> None:
    file, whole = tmp_path / "a.zip", samples.archive(compression)
    readers = (
        lambda: open_archive(str(file)).read("a/0.jpg"),
        partial(list_member, "captions.json", file),
    )
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x81
        file.write_bytes(damaged)
        for read in readers:
            try:
                read()
            except (UserError, ImageError) as error:
                assert "\n" not in str(error)
        file.write_bytes(whole[:position])
        refused(lambda: open_archive(str(file)), tmp_path)


def test_overlapping_members_are_each_measured_alone(tmp_path: Path) -> None:
    """A thousand names of one member's bytes, as in bombs without nested archives."""
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = b"\0" * (300 * MEGABYTE)
    deflated = body.compress(content) + body.flush()
    crc, file = zlib.crc32(content), io.BytesIO()
    sizes = struct.pack("<III", crc, len(deflated), len(content))
    file.write(b"PK\3\4" + struct.pack("<HHHHH", 20, 0, 8, 0, 0) + sizes)
    file.write(struct.pack("<HH", 4, 0) + b"0000" + deflated)
    start = file.tell()
    for n in range(1000):
        name = f"{n:04}".encode()
        file.write(b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0) + sizes)
        file.write(struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name)
    size = file.tell() - start
    file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1000, 1000, size, start, 0))
    path = tmp_path / "a.zip"
    path.write_bytes(file.getvalue())
    del content
    with memory(20 * MEGABYTE):
        archive = open_archive(str(path))
        for n in range(1000):
            with pytest.raises(ImageError):
                archive.read(f"{n:04}")


def test_very_many_members_cost_what_their_directory_does(tmp_path: Path) -> None:
    names = {f"{n}.jpg": b"" for n in range(10_000)}
    path = packed(tmp_path / "a.zip", {**names, "whole.jpg": samples.JPEG}, zipfile.ZIP_STORED)
    with memory(30 * path.stat().st_size):
        assert open_archive(str(path)).read("whole.jpg") == samples.JPEG
