"""Where pictures and lists of them lie: a folder, an address, or a zip archive that is read without unpacking it."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from model_lib import storage
from model_lib.errors import UserError
from model_lib.pictures import PictureError


class Folder:
    """Pictures of a folder, bucket or web server.

    Args:
        root: path or URI that names are appended to.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.local = Path(storage.filesystem(root)[1]) if storage.is_local(root) else None

    def uri(self, name: str) -> str:
        return storage.join(self.root, name)

    def read(self, name: str) -> bytes:
        """Return a picture's bytes; `UserError` if it is missing."""
        uri = self.uri(name)
        if self.local is not None:
            with contextlib.suppress(OSError):  # the other way says what is wrong
                return (self.local / name).read_bytes()
        return storage.patiently(uri, lambda: storage.read_bytes(uri))


class Archive:
    """Pictures of a zip archive, by their names in it, or in the folder that it is named after.

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
        """Return a picture's bytes, checked against the archive's CRC; `UserError` if it is missing."""
        try:
            return self.zip.read(self._member(name))
        except KeyError as error:
            raise UserError(f"{self.root}: has no {name}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise PictureError("unreadable", f"damaged in the archive: {error}") from error

    def _member(self, name: str) -> str:
        inside = f"{self.top}/{name}"
        return inside if name not in self.zip.NameToInfo and inside in self.zip.NameToInfo else name


Place = Folder | Archive


def open_zip(uri: str) -> zipfile.ZipFile:
    """Open a zip archive for several threads; `UserError` if it is missing or damaged."""
    if not storage.exists(uri):
        raise UserError(f"{uri}: no such file")
    fs, path = storage.filesystem(uri)
    try:
        return zipfile.ZipFile(path if storage.is_local(uri) else fs.open(path, "rb"))
    except (zipfile.BadZipFile, IsADirectoryError) as error:
        raise UserError(f"{uri}: is not a whole zip archive ({error}); fetch it anew") from error


def pictures_at(uri: str) -> Place:
    """Return the pictures at a folder, address or zip archive; `UserError` if it is not there."""
    if uri.lower().endswith(".zip"):
        return Archive(uri)
    if not uri.startswith(("http://", "https://")) and not storage.is_folder(uri):  # the web knows no folders
        raise UserError(f"{uri}: no such folder of pictures")
    return Folder(uri)


@contextlib.contextmanager
def opened(uri: str) -> Iterator[IO[bytes]]:
    """Yield the file at `uri`, which may be `zip://member::archive`, for reading from start to end."""
    if uri.startswith("zip://"):
        member, _, archive = uri.removeprefix("zip://").partition("::")
        with open_zip(archive) as zipped, zipped.open(member) as file:
            yield file
    else:
        with storage.local_file(uri) as path, path.open("rb") as file:
            yield file
