"""Where images and lists of them lie: a folder, an address, or a zip archive that is read without
unpacking it."""

import contextlib
import errno
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from model_lib.errors import UserError, first_line
from model_lib.io import storage
from model_lib.io.images import ImageError, read_image, require_readable
from model_lib.io.remote_cache import local_file

CHUNK = 2**16
"""Bytes of an archive in a bucket that are read at once at least."""
BOMB_SIZE, BOMB_RATIO = 2**28, 100
"""A list of images is refused that is larger than this when inflated, and so many times its size in
the archive."""


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Raise as `BadZipFile` whatever Python's reader of zip archives raises on what is none, or
    damaged."""
    try:
        yield
    except zipfile.BadZipFile:
        raise
    except (
        zlib.error,
        lzma.LZMAError,
        struct.error,
        EOFError,
        RuntimeError,
        ValueError,
        OverflowError,
    ) as error:
        raise zipfile.BadZipFile(
            first_line(error)
        ) from error  # RuntimeError: encrypted, or packed in an unknown way
    except OSError as error:
        if (
            error.errno != errno.EINVAL and str(error) != "Invalid data stream"
        ):  # an offset before the start; bz2's
            raise
        raise zipfile.BadZipFile(first_line(error)) from error


class Folder:
    """Images of a folder, bucket or web server.

    Args:
        root: path or URI that names are appended to.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.local = Path(storage.filesystem(root)[1]) if storage.is_local(root) else None

    def uri(self, name: str) -> str:
        on_the_web = self.root.startswith(("http://", "https://"))
        return storage.join(self.root, quote(name) if on_the_web else name)

    def read(self, name: str) -> bytes:
        """Return an image's bytes; `UserError` if it is missing."""
        return read_image(
            self.uri(name) if self.local is None else str(self.local / name), retry_seconds=None
        )


class Archive:
    """Images of a zip archive, by their names in it, or in the folder that it is named after.

    Args:
        root: path or URI of the archive.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.zip = open_zip(root)
        self.top = Path(root).stem

    def uri(self, name: str) -> str:
        """Return the address that fsspec understands."""
        return f"zip://{self._member(name)}::{self.root}"

    def read(self, name: str) -> bytes:
        """Return an image's bytes, checked against the archive's CRC; `UserError` if it is
        missing."""
        try:
            info = self.zip.getinfo(self._member(name))
        except KeyError as error:
            raise UserError(f"{self.root}: has no {name}") from error
        require_readable(info.file_size)
        try:
            with _damage(), self.zip.open(info) as file:
                return file.read(info.file_size + 1)  # a member may be larger than it says
        except zipfile.BadZipFile as error:
            detail = f"damaged in the archive: {first_line(error)}"
            raise ImageError("unreadable", detail) from error

    def _member(self, name: str) -> str:
        inside = f"{self.top}/{name}"
        return inside if name not in self.zip.NameToInfo and inside in self.zip.NameToInfo else name


Place = Folder | Archive


def open_zip(uri: str) -> zipfile.ZipFile:
    """Open a zip archive for several threads; `UserError` if it is missing or damaged."""
    return _directory(uri, storage.open_file(uri, CHUNK))


def _directory(uri: str, file: Path | IO[bytes]) -> zipfile.ZipFile:
    """Read the directory of the archive at `uri`, from this file; `UserError` if it is damaged."""
    try:
        with _damage():
            return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, IsADirectoryError) as error:
        raise UserError(
            f"{uri}: is not a whole zip archive ({first_line(error)}); fetch it anew"
        ) from error


def open_image_source(uri: str) -> Place:
    """Return the images at a folder, address or zip archive; `UserError` if it is not there."""
    if uri.lower().endswith(".zip"):
        return Archive(uri)
    if not uri.startswith(("http://", "https://")) and not storage.is_folder(
        uri
    ):  # the web knows no folders
        raise UserError(f"{uri}: no such folder of images")
    return Folder(uri)


class _Member(io.RawIOBase):
    """A member of an archive; damage is a `UserError` where it is read."""

    def __init__(self, file: IO[bytes], uri: str) -> None:
        self.file, self.uri = file, uri

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            with _damage():
                content = self.file.read(len(buffer))
        except zipfile.BadZipFile as error:
            raise UserError(
                f"{self.uri}: is damaged in the archive ({first_line(error)}); fetch it anew"
            ) from error
        buffer[: len(content)] = content
        return len(content)


@contextlib.contextmanager
def opened(uri: str) -> Iterator[IO[bytes]]:
    """Yield the file at `uri`, which may be `zip://member::archive`, for reading from start to
    end."""
    if uri.startswith("zip://"):
        member, _, archive = uri.removeprefix("zip://").partition("::")
        with local_file(archive) as path, _directory(archive, path) as zipped:
            try:
                info = zipped.getinfo(member)
                if info.file_size > max(BOMB_SIZE, BOMB_RATIO * info.compress_size):
                    raise zipfile.BadZipFile(
                        f"{info.compress_size:,} bytes that say they are {info.file_size:,}: a "
                        "zip bomb"
                    )
                with _damage():
                    file = zipped.open(info)
            except (KeyError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{archive}: {member} cannot be read ({first_line(error)})"
                ) from error
            with file:
                yield io.BufferedReader(_Member(file, uri))
    else:
        with local_file(uri) as path, path.open("rb") as file:
            yield file
