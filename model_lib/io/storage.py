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
from model_lib.io.errors import input_errors, store_errors
from model_lib.io.retries import retry

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of what it raises
logging.getLogger("google.auth").setLevel(logging.ERROR)  # and this, each right that it tried
PART = ".part-"
"""Beginning of the names of local files that are being written."""
T = TypeVar("T")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of `uri` and the path on it; `UserError` if it has no driver."""
    if "://" not in uri:  # else fsspec takes a folder called a::b for a chain of two
        local = fsspec.filesystem("file")
        return local, str(local._strip_protocol(uri))
    try:
        return fsspec.core.url_to_fs(uri)
    except ImportError as error:
        message = f"cannot be opened here: {error}; install that driver with pip"
        raise UserError(f"{uri}: {message}") from error
    except ValueError as error:
        remedy = "use a path or a URI such as gs://bucket/folder"
        raise UserError(f"{uri}: {error}; {remedy}") from error


def access(
    uri: str, action: Callable[[], T], retry_seconds: float | None = None, doing: str = "read"
) -> T:
    """Return the result of `action` on the store of `uri`, retried while a remote one fails.

    Args:
        uri: path or URI.
        action: the call.
        retry_seconds: see `retry`.
        doing: see `store_errors`, whose errors are raised.
    """
    with store_errors(uri, doing):
        return action() if is_local(uri) else retry(uri, action, retry_seconds)


def is_local(uri: str) -> bool:
    """Return whether `uri` names a file of this machine."""
    return "://" not in uri or uri.startswith("file://")


def encodable(path: str) -> str:
    """Return a path as Parquet and JSON can hold it: on Linux, a file's name may be any bytes."""
    return path.encode("utf-8", "backslashreplace").decode()


def absolute(uri: str) -> str:
    """Return `uri` independent of the working directory."""
    return str(Path(filesystem(uri)[1]).absolute()) if is_local(uri) else uri.rstrip("/")


def join(base: str, *parts: str) -> str:
    """Join `parts` to `base`, a path or a URI."""
    return "/".join([base.rstrip("/") or "/", *parts])


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


def list_names(uri: str) -> list[str]:
    """Return the sorted names directly inside the folder `uri`, without hidden ones; [] if none."""
    fs, path = filesystem(uri)
    if not is_folder(uri):
        return []
    entries = access(uri, lambda: fs.ls(path, detail=False, refresh=True), doing="listed")
    names = (Path(entry).name for entry in entries)
    return sorted(name for name in names if not name.startswith("."))


def version(info: Mapping[str, Any]) -> list[str]:
    """Return the parts of a file's info that change with its content, under any store's names."""
    keys = ("etag", "ETag", "generation", "mtime", "LastModified")
    return [str(info[key]) for key in keys if key in info]


def read_bytes(
    uri: str, limit: int | None = None, retry_seconds: float | None = None, redirects: bool = True
) -> bytes:
    """Return the content of `uri`, or the start of a longer one.

    Args:
        uri: path or URI.
        limit: bytes beyond which only one more is read, whatever a store says of the size.
        retry_seconds: see `retry`.
        redirects: whether a web server may send us to another address.
    """
    fs, path = filesystem(uri)
    end = None if limit is None else limit + 1

    def read() -> bytes:
        if is_local(uri):
            if Path(path).exists() and not Path(path).is_file():
                raise UserError(f"{uri}: is not a file")  # others may never end, or never begin
            with Path(path).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if end is None or size >= end:
                    return file.read(end)
                # Python would clear a buffer of `end` bytes for each file.
                content = file.read(size + 1)
                return content + file.read(end - len(content)) if len(content) > size else content
        if "http" in fs.protocol:
            return _read_web(fs, path, end, redirects)
        if end is None:
            return bytes(fs.cat_file(path))
        try:
            return bytes(fs.cat_file(path, start=0, end=end))  # by name: drivers differ in order
        except Exception:
            if fs.size(path) == 0:  # stores refuse a range of an empty file
                return b""
            raise

    return access(uri, read, retry_seconds)


def _read_web(fs: fsspec.AbstractFileSystem, url: str, end: int | None, redirects: bool) -> bytes:
    """Read a stream without its size, as a server may know no ranges, or send another size."""
    content = bytearray()
    with fs.open(url, "rb", block_size=0, size=1, allow_redirects=redirects) as stream:
        while part := stream.read(-1 if end is None else end - len(content)):
            content += part
    return bytes(content)


def read_json(uri: str) -> Any:
    """Return the parsed JSON document at `uri`; `UserError` if it is missing or not JSON."""
    content = read_bytes(uri)
    with input_errors(uri, "JSON"):
        return json.loads(content)


class _RemoteFile(io.RawIOBase):
    """A remote file that is read by ranges, each retried on its own."""

    def __init__(self, uri: str, size: int | None) -> None:
        self.uri, (self.fs, self.path) = uri, filesystem(uri)
        self.size, self.position = file_size(uri) if size is None else size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        if self.position < 0:
            raise ValueError(f"{self.uri}: position {self.position} is before the start")
        return self.position

    def readinto(self, buffer: Any) -> int:
        start, end = self.position, min(self.position + len(buffer), self.size)
        if start >= end:
            return 0
        content = access(self.uri, lambda: self.fs.cat_file(self.path, start=start, end=end))
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def open_file(uri: str, buffer: int = 0, size: int | None = None) -> IO[bytes]:
    """Open a file for random access; a remote one is read in parts of at least `buffer` bytes.

    A remote store is asked for its `size` unless that is known. A store's failures are raised as
    `UserError` and `WorkError` while it is read.
    """
    if is_local(uri):
        return access(uri, lambda: Path(filesystem(uri)[1]).open("rb"))
    file = _RemoteFile(uri, size)
    return io.BufferedReader(file, buffer) if buffer else file  # type: ignore[return-value]


@contextlib.contextmanager
def atomic_file(uri: str) -> Iterator[str]:
    """Yield a local path to write to, which becomes `uri` at the end, unless the body raises."""
    fs, path = filesystem(uri)
    local = is_local(uri)
    folder = str(Path(path).parent) if local else tempfile.gettempdir()
    part = Path(folder, f"{PART}{uuid.uuid4().hex}")
    with store_errors(uri, "written"):
        os.makedirs(folder, exist_ok=True)
        part.touch(0o666 if local else 0o600)  # mkstemp makes files that nobody else can read
        try:
            yield str(part)
            if local:
                with part.open("rb") as file:
                    os.fsync(file.fileno())  # else a power cut leaves an empty file of that name
                part.replace(path)
            else:
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
    """Raise now if files cannot be written under `folder`, rather than after an hour of work."""
    if encodable(absolute(folder)) != absolute(folder):
        raise UserError(f"{folder}: is not UTF-8; choose another output")
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
        problem = f"needs {need / 1e9:.2f} GB more for {what}, and {free / 1e9:.2f} GB are free"
        raise UserError(f"{folder}: {problem}; make room there, or choose another folder")


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
            upload_file(str(file), join(uri, *file.relative_to(local).parts))


def upload_file(local: str, uri: str) -> None:
    """Copy the local file `local` to `uri`, whole or not at all."""
    with atomic_file(uri) as part:
        shutil.copyfile(local, part)
