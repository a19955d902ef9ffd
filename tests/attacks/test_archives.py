"""Zip archives that lie: refused in one line, or their images quarantined, in bounded memory,
nothing unpacked."""

import io
import json
import stat
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_lib.errors import UserError
from model_lib.ingest.annotations import read_captions
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.image_source import Archive, open_zip
from model_lib.ingest.ingesting import ingest
from model_lib.io.images import ImageError
from tests.helpers import samples
from tests.helpers.lies import fingerprint, refused

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


def packed(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of 1 MB with 1 GB of zeros as an image, and of spaces as a list."""
    path = tmp_path_factory.mktemp("large") / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped:
        for name, byte in (("large.jpg", b"\0"), ("large.json", b" ")):
            with zipped.open(name, "w", force_zip64=True) as file:
                for _ in range(1024 if byte == b"\0" else 300):
                    file.write(byte * MEGABYTE)
        zipped.writestr("whole.jpg", samples.JPEG)
    return path


def lying_size(content: bytes, real: int, said: int) -> bytes:
    """Return an archive of one member whose headers give another size than it has."""
    assert (
        content.count(struct.pack("<I", real)) == 2
    )  # the member's own header, and the directory's
    return content.replace(struct.pack("<I", real), struct.pack("<I", said))


def test_a_bomb_is_not_inflated(bomb: Path) -> None:
    assert bomb.stat().st_size < 10 * MEGABYTE
    with memory(20 * MEGABYTE):
        with pytest.raises(ImageError, match="too_large"):
            Archive(str(bomb)).read("large.jpg")
        assert "a zip bomb" in refused(
            lambda: read_captions(f"zip://large.json::{bomb}"), bomb.parent
        )


@pytest.mark.parametrize("said", [10, 2**27])
def test_a_bomb_that_lies_about_its_size_is_not_inflated_further(tmp_path: Path, said: int) -> None:
    real = 200 * MEGABYTE + 12_345
    file = packed(tmp_path / "a.zip", {"a.jpg": b"\0" * real})
    file.write_bytes(lying_size(file.read_bytes(), real, said))
    with memory(3 * said + 8 * MEGABYTE), pytest.raises(ImageError, match="unreadable"):
        Archive(str(file)).read("a.jpg")


def test_what_archives_hold_is_quarantined_and_never_unpacked(bomb: Path, tmp_path: Path) -> None:
    images = tmp_path / "in" / "images.zip"
    images.parent.mkdir()
    link = zipfile.ZipInfo("link.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(images, "w") as zipped:
        zipped.writestr(link, "/etc/passwd")
        for name in ("../outside.jpg", str(tmp_path / "absolute.jpg"), "whole.jpg"):
            zipped.writestr(name, samples.JPEG)
        zipped.writestr("secret.jpg", samples.JPEG)
        zipped.writestr("unknown.jpg", samples.JPEG)
        zipped.writestr("damaged.jpg", samples.JPEG)
        for name, flag, method in (
            ("secret.jpg", 1, 0),
            ("unknown.jpg", 0, 77),
        ):  # as the directory says
            zipped.getinfo(name).flag_bits |= flag
            zipped.getinfo(name).compress_type = method
        zipped.getinfo("damaged.jpg").CRC ^= 1
    names = ["link.jpg", "whole.jpg", "secret.jpg", "unknown.jpg", "damaged.jpg"]
    document = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"id": n, "image_id": n, "caption": "an image"} for n in range(len(names))],
    }
    (images.parent / "captions.json").write_text(json.dumps(document))
    before = fingerprint(images.parent)
    options = {
        "annotations": str(images.parent / "captions.json"),
        "images": str(images),
        "split": "train",
    }
    manifest = ingest(IngestConfig(**options, output=str(tmp_path / "out")))
    assert manifest.counts == {"train": 1} and manifest.quarantined == {"unreadable": 4}
    assert fingerprint(images.parent) == before
    for name in ("../outside.jpg", str(tmp_path / "absolute.jpg")):
        document["images"][0]["file_name"] = name
        (images.parent / "captions.json").write_text(json.dumps(document))
        said = refused(
            lambda: ingest(IngestConfig(**options, output=str(tmp_path / "out"))), tmp_path
        )
        assert f"file_name {name!r} of image 0 leaves the image folder" in said
    assert {file.name for file in tmp_path.iterdir()} == {"in", "out"}


def test_encrypted_and_missing_lists_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("a.json", "{}")
        zipped.getinfo("a.json").flag_bits |= 1
    for member in ("a.json", "b.json", "../a.json", "/a.json"):
        refused(lambda member=member: read_captions(f"zip://{member}::{file}"), tmp_path)  # type: ignore[misc]


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_archives_that_are_damaged_anywhere_are_refused_or_read(
    tmp_path: Path, compression: int
) -> None:
    file, whole = tmp_path / "a.zip", samples.archive(compression)
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
        try:
            Archive(str(file)).read("a/0.jpg")
        except (UserError, ImageError) as error:
            assert "\n" not in str(error)
        try:
            read_captions(f"zip://captions.json::{file}")
        except UserError as error:
            assert "\n" not in str(error)
        file.write_bytes(whole[:place])
        refused(lambda: open_zip(str(file)), tmp_path)


def test_overlapping_members_are_each_measured_alone(tmp_path: Path) -> None:
    """A thousand names of one member's bytes, as bombs without lists in lists are made."""
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = b"\0" * (300 * MEGABYTE)
    deflated = body.compress(content) + body.flush()
    crc, file = zlib.crc32(content), io.BytesIO()
    sizes = struct.pack("<III", crc, len(deflated), len(content))
    file.write(
        b"PK\3\4"
        + struct.pack("<HHHHH", 20, 0, 8, 0, 0)
        + sizes
        + struct.pack("<HH", 4, 0)
        + b"0000"
        + deflated
    )
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
        archive = Archive(str(path))
        for n in range(1000):
            with pytest.raises(ImageError):
                archive.read(f"{n:04}")


def test_very_many_members_cost_what_their_directory_does(tmp_path: Path) -> None:
    names = {f"{n}.jpg": b"" for n in range(10_000)}
    path = packed(tmp_path / "a.zip", {**names, "whole.jpg": samples.JPEG}, zipfile.ZIP_STORED)
    with memory(30 * path.stat().st_size):
        assert Archive(str(path)).read("whole.jpg") == samples.JPEG
