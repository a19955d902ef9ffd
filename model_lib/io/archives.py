"""Images' files: of folders, buckets and web servers, and of zip and tar archives, in place.

A member of an archive has the address that fsspec understands: `zip://name::archive` or
`tar://name::archive`. Nothing is unpacked, so a name that leaves the archive (`../a.jpg`) is no
more than a name; and nothing stays open, so several threads read at once, each by its own request.
"""

import contextlib
import io
import struct
import tarfile
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from posixpath import dirname, join, normpath

from model_lib.errors import UserError, WorkError, first_line
from model_lib.io import images, storage
from model_lib.io.errors import input_errors, store_errors
from model_lib.io.images import ImageError, require_readable

SCHEMES = ("zip://", "tar://")
OTHERS = {
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"(\xb5/\xfd": "compressed by zstd",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
}
"""How files begin whose members cannot be read alone."""
BLOCK = 512
"""Bytes of a tar archive's header."""
HEADER = 30
"""Bytes of a zip member's header, which its name and further fields follow."""
UTF_8 = 0x800
"""Flag of a zip member whose name is UTF-8, not of code page 437."""
READ_AHEAD = 2**20
"""Bytes of a remote archive that are read at once at least while its members are listed."""
OPENED = 16
"""Archives whose members are remembered."""


@dataclass(frozen=True, slots=True)
class _TarMember:
    start: int
    size: int


@dataclass(frozen=True)
class Archive:
    """A zip or tar archive whose members are listed."""

    root: str
    """Path or URI."""
    kind: str
    """zip or tar."""
    size: int
    version: str
    """Changes with the content, as far as its store says."""
    sizes: dict[str, int]
    """Bytes of each file in it, by name, in the archive's order. Of several with one name the last
    counts, as for the programs that unpack it."""
    damage: str
    """What of it is left out because it cannot be listed, in words; empty: nothing."""
    _members: Mapping[str, zipfile.ZipInfo | _TarMember]

    def uri(self, name: str) -> str:
        """Return a member's address."""
        return f"{self.kind}://{name}::{self.root}"

    def read(self, name: str) -> bytes:
        """Return a member's content.

        Raises:
            UserError: the archive has no such member, or is gone.
            WorkError: its store failed.
            ImageError: it is damaged, encrypted or too large to be an image.
        """
        if name not in self._members:
            raise UserError(f"{self.root}: has no {name}")
        require_readable(self.sizes[name])
        member = self._members[name]
        if isinstance(member, _TarMember):
            content = self._range(member.start, member.size)
            if len(content) < member.size:
                raise ImageError("truncated", "the archive ends in it")
            return content
        require_readable(member.compress_size)
        # In one request: further fields have less than a kilobyte, or a second request follows.
        length = HEADER + len(member.orig_filename.encode()) + 2**10 + member.compress_size
        content = b"" if member.header_offset < 0 else self._range(member.header_offset, length)
        if not content.startswith(b"PK\3\4") or len(content) < HEADER:
            raise ImageError("unreadable", "has no header where the archive's directory says")
        start = HEADER + sum(struct.unpack("<HH", content[HEADER - 4 : HEADER]))
        packed = content[start : start + member.compress_size]
        if len(packed) < member.compress_size:
            packed = self._range(member.header_offset + start, member.compress_size)
        return _unpack(packed, member)

    def _range(self, start: int, length: int) -> bytes:
        length = min(length, max(0, self.size - start))
        with store_errors(self.root), storage.open_file(self.root, length, self.size) as file:
            file.seek(start)
            return file.read(length)


def _unpack(packed: bytes, member: zipfile.ZipInfo) -> bytes:
    if member.flag_bits & 1:
        raise ImageError("unreadable", "is encrypted")
    try:
        with zipfile.ZipExtFile(io.BytesIO(packed), "r", member, None, False) as file:
            return file.read(member.file_size + 1)
    except Exception as error:  # the codecs raise all kinds on what is damaged
        raise ImageError("unreadable", first_line(error)) from error


def archive_kind(uri: str) -> str | None:
    """Return "zip" or "tar" if the file `uri` is such an archive by its content, else None.

    Raises:
        UserError: it is missing, or an archive that cannot be read in place.
        WorkError: its store failed.
    """
    start = storage.read_bytes(uri, BLOCK - 1)
    for signature, name in OTHERS.items():
        if start.startswith(signature):
            raise UserError(f"{uri}: is {name}, and cannot be read in place; unpack it first")
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if start == bytes(BLOCK):  # without members
        return "tar"
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return "tar"


def open_archive(uri: str) -> Archive:
    """Return the archive at `uri`, with its members listed.

    Raises:
        UserError: it is missing, damaged, or no archive that can be read in place.
        WorkError: its store failed.
    """
    kind = archive_kind(uri)
    if kind is None:
        raise UserError(f"{uri}: is neither a zip nor a tar archive")
    size, version = _size_and_version(uri)
    members: dict[str, zipfile.ZipInfo] | dict[str, _TarMember]
    if kind == "zip":
        members, damage = _list_zip(uri, size), ""
        sizes = {name: member.file_size for name, member in members.items()}
    else:
        members, damage = _list_tar(uri, size)
        sizes = {name: member.size for name, member in members.items()}
    archive = Archive(uri, kind, size, version, sizes, damage, members)
    with _opening:
        _archives.pop(uri, None)
        _archives[uri] = archive
        for oldest in list(_archives)[:-OPENED]:
            del _archives[oldest]
    return archive


def _list_zip(uri: str, size: int) -> dict[str, zipfile.ZipInfo]:
    what = "a whole zip archive; fetch it anew"
    file = storage.open_file(uri, READ_AHEAD, size)
    with file, store_errors(uri), input_errors(uri, what), zipfile.ZipFile(file) as zipped:
        infos = zipped.infolist()
    return {_zip_name(info): info for info in infos if not info.is_dir()}


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name; that of macOS and Info-ZIP is UTF-8 without the flag that says so."""
    if not info.flag_bits & UTF_8:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode()
    return info.filename


def _list_tar(uri: str, size: int) -> tuple[dict[str, _TarMember], str]:
    """Return a tar archive's files, and what cannot be listed. A link is the file it leads to."""
    members: dict[str, _TarMember] = {}
    hard: dict[str, str] = {}
    soft: dict[str, str] = {}
    end, is_whole = 0, False
    with store_errors(uri), storage.open_file(uri, READ_AHEAD, size) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    end, name = tar.offset, storage.encodable(member.name)
                    if member.isreg():
                        members[name] = _TarMember(member.offset_data, member.size)
                    elif member.islnk():
                        hard[name] = storage.encodable(member.linkname)
                    elif member.issym():
                        soft[name] = _target(member)
            file.seek(end)
            is_whole = not file.read(READ_AHEAD).strip(b"\0")  # else tarfile stops without a word
        except (UserError, WorkError):
            raise
        except Exception as error:  # it raises all kinds on what is damaged
            if isinstance(error, OSError) and error.errno is not None:
                raise
    if not members and not is_whole:
        raise UserError(f"{uri}: is not a whole tar archive; fetch it anew")
    links = [*hard.items(), *soft.items()]  # a hard link leads to a file before it
    for name, target in links:
        if target in members:
            members[name] = members[target]
    lost = sum(target not in members for _, target in links)
    damage = [f"{lost:,} links that lead to no file in it"] if lost else []
    if not is_whole:
        damage.append(f"what follows its byte {end:,}, which is damaged or cut off")
    return members, " and ".join(damage)


def _target(link: tarfile.TarInfo) -> str:
    """Return the name of the member that a symbolic link leads to."""
    start = "./" if link.name.startswith("./") else ""
    return storage.encodable(start + normpath(join(dirname(link.name), link.linkname)))


def read_image(uri: str, retry_seconds: float | None = 0.0, redirects: bool = True) -> bytes:
    """Return the bytes of an image's file, or of an archive's member, as `storage.read_bytes`.

    Raises:
        UserError: it is missing, or no file.
        WorkError: its store or server failed.
        ImageError: it is too large to be an image, or damaged in its archive.
    """
    if uri.startswith(SCHEMES):
        name, archive = split_uri(uri)
        return _opened(archive).read(name)
    content = storage.read_bytes(uri, images.LARGEST_FILE, retry_seconds, redirects)
    require_readable(len(content))
    return content


def split_uri(uri: str) -> tuple[str, str]:
    """Return the name and the archive of a member's address."""
    name, separator, archive = uri.partition("://")[2].rpartition("::")
    if not separator:
        example = f"{uri.partition('://')[0]}://name::archive"
        raise UserError(f"{uri}: names no archive; write it as {example}")
    return name, archive


def _opened(uri: str) -> Archive:
    """Return an archive that was opened before, by a reader of one of its members for all.

    A local file is opened anew once it has changed; of a store, this would need a request for each
    member.
    """
    with _opening:  # else each thread would list the members
        archive = _archives.get(uri)
        if archive is None or (
            storage.is_local(uri) and _size_and_version(uri)[1] != archive.version
        ):
            archive = open_archive(uri)
        return archive


def _size_and_version(uri: str) -> tuple[int, str]:
    fs, path = storage.filesystem(uri)
    info = storage.access(uri, lambda: fs.info(path))
    return int(info["size"]), "/".join(storage.version(info))


_archives: dict[str, Archive] = {}
"""The archives that were opened last, by their URI."""
_opening = threading.RLock()
