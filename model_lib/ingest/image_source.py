"""Where the images of a list are: a folder, bucket or web server, archives, or Parquet files."""

import contextlib
import posixpath
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Protocol
from urllib.parse import quote

from model_lib.errors import UserError, WorkError
from model_lib.io import storage
from model_lib.io.archives import Archive, open_archive, read_image, split_uri
from model_lib.io.errors import input_errors, is_transient
from model_lib.io.images import ImageError
from model_lib.io.remote_cache import local_file
from model_lib.io.url_policy import require_allowed, store_of

LIST_BUFFER = 2**23
"""Bytes of a remote archive that are read at once for a list in it."""
WEB = ("http://", "https://")
WEB_SECONDS = 5.0
"""Seconds for which an address in a list is tried again: in a long list, some servers are gone."""


class ImageSource(Protocol):
    """Images by their names."""

    @property
    def root(self) -> str:
        """Path or URI of the whole."""

    @property
    def takes_any_name(self) -> bool:
        """Whether a name may be absolute, or lead out of the root."""

    def uri(self, name: str) -> str:
        """Return an image's address."""

    def read(self, name: str) -> bytes:
        """Return an image's bytes.

        Raises:
            UserError: it is missing.
            WorkError: its store or server failed.
            ImageError: it is damaged, or too large to be an image.
        """


@dataclass(frozen=True)
class Folder:
    """Images of a folder, bucket or web server.

    A name that is not there may be written otherwise than the file's: with backslashes, in another
    case or another form of Unicode, or without its ending. The only such file is taken.
    """

    root: str
    """Path or URI that names are appended to."""
    list_uri: str = ""
    """The list in this folder whose names are read; they may also be absolute, or addresses; if it
    is remote, of its own bucket or server alone. Empty: names stay in the folder."""
    retry_seconds: float | None = None
    """See `retries.retry`."""
    _names: dict[str, Mapping[str, str]] = field(default_factory=dict, compare=False, repr=False)
    _uris: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def takes_any_name(self) -> bool:
        return bool(self.list_uri)

    def uri(self, name: str) -> str:
        if name in self._uris:
            return self._uris[name]
        if self.list_uri and ("://" in name or name.startswith("/")):
            return name
        return storage.join(self.root, quote(name) if self.root.startswith(WEB) else name)

    def read(self, name: str) -> bytes:
        uri = self.uri(name)
        is_remote_list = bool(self.list_uri) and not storage.is_local(self.list_uri)
        if is_remote_list:
            require_allowed(uri, store_of(self.list_uri))
        is_address = name.startswith(WEB)
        seconds = WEB_SECONDS if is_address else self.retry_seconds
        try:
            return read_image(uri, seconds, redirects=not is_remote_list)
        except UserError as error:
            is_missing = isinstance(error.__cause__, FileNotFoundError)
            if not is_missing or uri.startswith(WEB) or uri == name:
                raise
            similar = self._find_similar(name)
            if similar is None:
                raise
            self._uris[name] = similar
            return read_image(similar, self.retry_seconds)
        except WorkError as error:
            if is_address and is_transient(error):
                raise ImageError("unreachable", str(error)) from error
            raise

    def _find_similar(self, name: str) -> str | None:
        uri = self.root
        for part in PurePosixPath(name.replace("\\", "/")).parts:
            similar = self._list(uri).get(_folded(part))
            if not similar:
                return None
            uri = storage.join(uri, similar)
        return uri

    def _list(self, folder: str) -> Mapping[str, str]:
        if folder not in self._names:
            self._names[folder] = _index(storage.list_names(folder))
        return self._names[folder]


def _index(names: Sequence[str]) -> dict[str, str]:
    """Return names by other ways of writing them; "" where these are several names'."""
    index: dict[str, str] = {}
    stems: dict[str, str] = {}
    for name in names:
        folded = _folded(name)
        index[folded] = "" if folded in index else name
        stem = folded.rpartition(".")[0]
        stems[stem] = "" if stem in stems else name
    return stems | index


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class Archived:
    """Images of a zip or tar archive, by their names in it or below its only folder; like those of
    a `Folder`, names may be written otherwise."""

    takes_any_name = False

    def __init__(self, uri: str) -> None:
        self.root = uri
        self.archive = open_archive(uri)
        names = [name for name in self.archive.sizes if not name.startswith("__MACOSX/")]
        folders = {name.partition("/")[0] for name in names}
        only = f"{folders.pop()}/" if len(folders) == 1 else ""
        self._members = _index([name.removeprefix(only) for name in names])
        self._members = {key: name and only + name for key, name in self._members.items()}

    def uri(self, name: str) -> str:
        return self.archive.uri(self._member(name))

    def read(self, name: str) -> bytes:
        return self.archive.read(self._member(name))

    def _member(self, name: str) -> str:
        if name in self.archive.sizes:
            return name
        return self._members.get(_folded(posixpath.normpath(name.replace("\\", "/")))) or name


class Archives:
    """Images of several archives."""

    takes_any_name = True

    def __init__(self, root: str) -> None:
        self.root = root
        self.members: dict[str, tuple[Archive, str]] = {}
        """Each image's archive and name in there."""

    def uri(self, name: str) -> str:
        archive, member = self.members[name]
        return archive.uri(member)

    def read(self, name: str) -> bytes:
        archive, member = self.members[name]
        return archive.read(member)


def open_image_source(uri: str) -> ImageSource:
    """Return the images at a folder, address or archive; `UserError` if it is not there."""
    if uri.startswith(WEB) or storage.is_folder(uri):  # the web knows no folders
        return Folder(uri)
    if not storage.exists(uri):
        raise UserError(f"{uri}: no such folder or archive of images")
    return Archived(uri)


@contextlib.contextmanager
def open_list(uri: str) -> Iterator[IO[bytes]]:
    """Yield the file at `uri`, which may be `zip://member::archive`, to be read from its start."""
    if not uri.startswith("zip://"):
        with local_file(uri) as path, path.open("rb") as file:
            yield file
        return
    member, archive = split_uri(uri)
    what = "a whole zip archive; fetch it anew"
    with storage.open_file(archive, LIST_BUFFER) as packed, contextlib.ExitStack() as stack:
        with input_errors(archive, what):
            zipped = stack.enter_context(zipfile.ZipFile(packed))
            content = stack.enter_context(zipped.open(member))
        yield content


def read_head(uri: str, size: int) -> bytes:
    """Return the first `size` bytes of a list."""
    if not uri.startswith("zip://"):
        return storage.read_bytes(uri, size)
    with open_list(uri) as file, input_errors(uri, "whole"):
        return file.read(size)
