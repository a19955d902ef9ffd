"""Files wherever they live: a thin layer over fsspec that speaks URIs and raises one-line errors.

A plain path is a local file; `gs://`, `s3://`, `memory://` and the like go to their fsspec driver.
Files are written whole or not at all: a local one is renamed into place, object stores are atomic.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from model_lib.errors import UserError
from model_lib.io.errors import store_errors
from model_lib.io.retries import retry

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of what it raises
logging.getLogger("google.auth").setLevel(logging.ERROR)  # and this, each right that it tried
CHUNK = 2**20
"""Bytes of a web page that are read at once."""
PART = ".part-"
"""Beginning of the names of local files that are being written."""
T = TypeVar("T")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of `uri` and the path on it.

    Raises:
        UserError: its driver is missing or unknown.
    """
    if "://" not in str(uri):  # else fsspec takes a folder called a::b for a chain of two
        local = fsspec.filesystem("file")
        return local, str(local._strip_protocol(str(uri)))
    try:
        fs, path = fsspec.core.url_to_fs(str(uri))
    except ImportError as error:
        message = f"{uri}: cannot be opened here: {error}; install that driver with pip"
        raise UserError(message) from error
    except ValueError as error:
        message = f"{uri}: {error}; use a path or a URI such as gs://bucket/folder"
        raise UserError(message) from error
    return fs, path


def access(
    uri: str, action: Callable[[], T], retry_seconds: float | None = None, doing: str = "read"
) -> T:
    """Return what `action` does with the store of `uri`, retried while a remote one fails.

    Args:
        uri: path or URI.
        action: the call.
        retry_seconds: time for which it is retried; None: as long as `retry` does.
        doing: what cannot be done if it fails, for the message.

    Raises:
        UserError, WorkError: see `store_errors`.
    """
    with store_errors(str(uri), doing):
        return action() if is_local(uri) else retry(str(uri), action, retry_seconds)


def is_local(uri: str) -> bool:
    """Return whether `uri` names a file of this machine."""
    return "://" not in str(uri) or str(uri).startswith("file://")


def encodable(path: str) -> str:
    """Return a path as Parquet and JSON can hold it: on Linux, a file's name may be any bytes."""
    return path.encode("utf-8", "backslashreplace").decode()


def absolute(uri: str) -> str:
    """Return `uri` independent of the working directory."""
    return str(Path(filesystem(uri)[1]).absolute()) if is_local(uri) else str(uri).rstrip("/")


def join(base: str, *parts: str) -> str:
    """Join `parts` to `base`, a path or a URI."""
    return "/".join([str(base).rstrip("/") or "/", *parts])


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return access(uri, lambda: bool(fs.exists(path)))


def is_folder(uri: str) -> bool:
    fs, path = filesystem(uri)
    return access(uri, lambda: bool(fs.isdir(path)))


def file_size(uri: str) -> int:
    """Return the size of a file in bytes."""
    fs, path = filesystem(uri)
    return access(uri, lambda: int(fs.size(path)))


def find_files(uri: str, depth: int | None = None) -> dict[str, dict[str, Any]]:
    """Return the files in and below the folder `uri`, each path on its file system with its info.

    Links are followed, and a folder that several lead to is listed once.

    Args:
        uri: path or URI.
        depth: how many folders deep; None: all.

    Raises:
        UserError: a part of it may not be listed.
        WorkError: a part of it cannot be listed; fsspec would leave that out without a word.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        return access(uri, lambda: _walk(path, depth), doing="listed")
    options = {"maxdepth": depth, "detail": True, "on_error": "raise"}
    if depth is None and "s3" in fs.protocol:
        del options["on_error"]  # s3fs does not know it here, and raises
    return access(uri, lambda: dict(fs.find(path, **options)), doing="listed")


def _walk(root: str, depth: int | None) -> dict[str, dict[str, Any]]:
    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # removed since the folder above was listed
            raise error

    files: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        level = 1 + len(Path(folder).relative_to(root).parts)
        folders[:] = [] if level == depth else sorted(folders)
        for name in sorted(names):
            file = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(file) if os.path.exists(file) else os.lstat(file)
                files[file] = {"size": status.st_size, "mtime": status.st_mtime}
    return files


def list_names(uri: str) -> list[str]:
    """Return the sorted names directly inside the folder `uri`, without hidden ones; [] if none."""
    fs, path = filesystem(uri)
    if not is_folder(uri):
        return []
    entries = access(uri, lambda: fs.ls(path, detail=False, refresh=True), doing="listed")
    names = (Path(entry).name for entry in entries)
    return sorted(name for name in names if not name.startswith("."))


def version(info: Mapping[str, Any]) -> list[str]:
    """Return what tells two contents of a file apart, from its info: stores name it differently."""
    keys = ("etag", "ETag", "generation", "mtime", "LastModified")
    return [str(info[key]) for key in keys if key in info]


def read_bytes(
    uri: str, limit: int | None = None, retry_seconds: float | None = None, redirects: bool = True
) -> bytes:
    """Return the content of `uri`, or the start of a longer one.

    Args:
        uri: path or URI.
        limit: bytes beyond which only one more is read, whatever a store says of the size.
        retry_seconds: see `access`.
        redirects: whether a web server may send us to another address.

    Raises:
        UserError: it is missing, a folder, a device or not readable.
        WorkError: its store or server failed.
    """
    fs, path = filesystem(uri)
    if "http" in fs.protocol:
        return access(uri, lambda: _read_web(fs, path, limit, redirects), retry_seconds)
    if limit is None:
        return access(uri, lambda: bytes(fs.cat_file(path)), retry_seconds)
    if is_local(uri):
        return access(uri, lambda: _read_local(uri, path, limit))
    return access(uri, lambda: _read_start(fs, path, limit + 1), retry_seconds)


def _read_local(uri: str, path: str, limit: int) -> bytes:
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{uri}: is not a file")  # others may never end, or never begin
    with Path(path).open("rb") as file:
        return file.read(limit + 1)


def _read_start(fs: fsspec.AbstractFileSystem, path: str, end: int) -> bytes:
    try:
        return bytes(fs.cat_file(path, start=0, end=end))  # by name: drivers differ in the order
    except FileNotFoundError:
        raise
    except Exception:
        if fs.size(path) == 0:  # stores refuse a range of an empty file
            return b""
        raise


def _read_web(fs: fsspec.AbstractFileSystem, url: str, limit: int | None, redirects: bool) -> bytes:
    """Read a stream without asking for its size first: a server may know no ranges, or lie."""
    content = bytearray()
    with fs.open(url, "rb", block_size=0, size=1, allow_redirects=redirects) as stream:
        while part := stream.read(CHUNK if limit is None else min(CHUNK, limit + 1 - len(content))):
            content += part
    return bytes(content)


def read_json(uri: str) -> Any:
    """Return the parsed JSON document at `uri`; `UserError` if it is missing or not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri}: is not JSON: {error}") from error


class _RemoteFile(io.RawIOBase):
    """A remote file that is read by ranges, each retried on its own; errors are one line."""

    def __init__(self, uri: str) -> None:
        self.uri, (self.fs, self.path) = uri, filesystem(uri)
        self.size, self.position = file_size(uri), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = start + offset
        if self.position < 0:
            raise ValueError(f"{self.uri}: position {self.position} lies before the start")
        return self.position

    def readinto(self, buffer: Any) -> int:
        start, end = self.position, min(self.position + len(buffer), self.size)
        if start >= end:
            return 0
        read = lambda: self.fs.cat_file(self.path, start=start, end=end)  # noqa: E731
        content = access(self.uri, read)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def open_file(uri: str, buffer: int = 0) -> IO[bytes]:
    """Open a file for reading at any place, from several threads if they take turns.

    What goes wrong while a remote one is read is a `UserError` or `WorkError`; other exceptions in
    a parser are about the content.

    Args:
        uri: path or URI.
        buffer: bytes that are read ahead at least; 0: what is asked for alone.
    """
    if is_local(uri):
        return access(uri, lambda: Path(filesystem(uri)[1]).open("rb"))
    file = _RemoteFile(uri)
    return io.BufferedReader(file, buffer) if buffer else file  # type: ignore[return-value]


@contextlib.contextmanager
def atomic_file(uri: str) -> Iterator[str]:
    """Yield a local path to write to, which becomes `uri` at the end, unless the body raises.

    Raises:
        UserError, WorkError: it cannot be written.
    """
    fs, path = filesystem(uri)
    local = is_local(uri)
    folder = str(Path(path).parent) if local else tempfile.gettempdir()
    part = Path(folder, f"{PART}{uuid.uuid4().hex}")
    try:
        with store_errors(uri, "written"):
            os.makedirs(folder, exist_ok=True)
            part.touch(0o666 if local else 0o600)  # mkstemp makes files that nobody else can read
            yield str(part)
            if local:
                with part.open("rb") as file:
                    os.fsync(file.fileno())  # else a power cut leaves an empty file of that name
                part.replace(path)
        if not local:
            access(uri, lambda: fs.put_file(str(part), path), doing="written")
    finally:
        part.unlink(missing_ok=True)


def write_bytes(uri: str, content: bytes) -> None:
    """Write `content` to `uri`, whole or not at all."""
    with atomic_file(uri) as part:
        Path(part).write_bytes(content)


def write_json(uri: str, document: Any) -> None:
    write_bytes(uri, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def require_writable(folder: str) -> None:
    """Raise now if files cannot be written under `folder`, rather than after an hour of work.

    Raises:
        UserError: they cannot.
        WorkError: its store fails, which may pass.
    """
    if encodable(absolute(folder)) != absolute(folder):
        raise UserError(f"{encodable(absolute(folder))}: is not UTF-8; choose another output")
    probe = join(folder, f"{PART}{os.getpid()}-test")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except UserError as error:  # names the probe, and of a missing bucket says only that
        reason = getattr(error.__cause__, "strerror", None) or error.__cause__
        message = f"{folder}: cannot be written to: {reason}; choose another output"
        raise UserError(message) from error


def require_room(folder: str, need: int, what: str) -> None:
    """Raise `UserError` if a local `folder` has no room for `need` more bytes of `what`."""
    if not is_local(folder):
        return
    free = shutil.disk_usage(filesystem(folder)[1]).free
    if need > free:
        raise UserError(
            f"{folder}: needs {need / 1e9:.2f} GB more for {what}, and {free / 1e9:.2f} GB are "
            "free; make room there, or choose another folder"
        )


def remove(uri: str) -> None:
    """Delete the file or folder `uri` if it is there."""
    fs, path = filesystem(uri)

    def delete() -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    access(uri, delete, doing="removed")


def upload_folder(local: str, uri: str) -> None:
    """Copy the files of the local folder `local` to `uri`, a path or a URI."""
    for file in sorted(Path(local).rglob("*")):
        if file.is_file():
            with atomic_file(join(uri, *file.relative_to(local).parts)) as part:
                shutil.copyfile(file, part)
