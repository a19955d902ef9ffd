"""Images of a folder, bucket or web server, or of a zip archive that is read in place."""

import contextlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.archives import read_image
from model_lib.io.errors import input_errors
from model_lib.io.images import ImageError, require_readable
from model_lib.io.remote_cache import local_file

IMAGE_BUFFER, LIST_BUFFER = 2**16, 2**23
"""Bytes of a remote archive that are read at once at least, for an image and for a list."""
WHOLE_ARCHIVE = "a whole zip archive; fetch it anew"
WEB = ("http://", "https://")


@dataclass(frozen=True)
class Folder:
    """Images of a folder, bucket or web server."""

    root: str
    """Path or URI that names are appended to."""

    def uri(self, name: str) -> str:
        return storage.join(self.root, quote(name) if self.root.startswith(WEB) else name)

    def read(self, name: str) -> bytes:
        """Return an image's bytes, as `read_image`."""
        return read_image(self.uri(name), retry_seconds=None)


class Archive:
    """Images of the zip archive `root`, by their names in it, or in the folder of its name."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.zip = open_zip(root)
        self.top = Path(root).stem

    def uri(self, name: str) -> str:
        """Return the address that fsspec understands."""
        return f"zip://{self._member(name)}::{self.root}"

    def read(self, name: str) -> bytes:
        """Return an image's bytes; `UserError` if it is missing, `ImageError` if it is damaged."""
        member = self._member(name)
        if member not in self.zip.NameToInfo:
            raise UserError(f"{self.root}: has no {name}")
        size = self.zip.NameToInfo[member].file_size
        require_readable(size)
        try:
            with input_errors(self.uri(name), "whole"), self.zip.open(member) as file:
                return file.read(size + 1)  # a member may be larger than its size says
        except UserError as error:
            raise ImageError("unreadable", str(error)) from error

    def _member(self, name: str) -> str:
        inside = f"{self.top}/{name}"
        return inside if name not in self.zip.NameToInfo and inside in self.zip.NameToInfo else name


ImageSource = Folder | Archive


def open_zip(uri: str, buffer: int = IMAGE_BUFFER) -> zipfile.ZipFile:
    """Open a zip archive for several threads; `UserError` if it is missing or damaged."""
    file = storage.open_file(uri, buffer)
    with input_errors(uri, WHOLE_ARCHIVE):
        return zipfile.ZipFile(file)


def open_image_source(uri: str) -> ImageSource:
    """Return the images at a folder, address or zip archive; `UserError` if it is not there."""
    if uri.lower().endswith(".zip"):
        return Archive(uri)
    if not uri.startswith(WEB) and not storage.is_folder(uri):  # the web knows no folders
        raise UserError(f"{uri}: no such folder of images")
    return Folder(uri)


@contextlib.contextmanager
def open_list(uri: str) -> Iterator[IO[bytes]]:
    """Yield the file at `uri`, which may be `zip://member::archive`, to be read from its start."""
    if not uri.startswith("zip://"):
        with local_file(uri) as path, path.open("rb") as file:
            yield file
        return
    member, _, archive = uri.removeprefix("zip://").partition("::")
    with open_zip(archive, LIST_BUFFER) as zipped:
        with input_errors(archive, WHOLE_ARCHIVE):
            content = zipped.open(member)
        yield content
