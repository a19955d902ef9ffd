"""Files wherever they live: a thin layer over fsspec that speaks URIs and raises one-line errors.

A plain path is a local file; `gs://`, `s3://`, `memory://` and the like go to their fsspec driver.
Writes are whole or absent: a local file is written beside its place and renamed, object stores are
atomic by nature.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from model_lib.errors import UserError, WorkError, first_line
from model_lib.io.retries import is_transient_status, retry
from model_lib.io.url_policy import web_session

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of what it raises
logging.getLogger("google.auth").setLevel(
    logging.ERROR
)  # and this, which rights it tried before it found some
OF_THE_FILE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)
"""What is wrong with one file here, and not with the machine."""
CHUNK = 2**20
"""Bytes of a web page that are asked for at once."""
_ANSWER = TypeVar("_ANSWER")
fsspec.config.conf.setdefault("http", {})["get_client"] = web_session


MISTAKES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "ProfileNotFound",
    "NoRegionError",
}
"""Exceptions of botocore for what is not set up, or cannot be a bucket's name."""


def retry_remote(
    uri: str, action: Callable[[], _ANSWER], retry_seconds: float | None = None
) -> _ANSWER:
    """Return what `action` does with the store of `uri`, asked again after growing pauses while the
    store fails.

    What will not pass (a missing file, a full disk, a right that is not given) is raised at once.
    Without `retry_seconds` it is asked for as long as `retry` does.
    """
    if is_local(uri):
        return action()
    try:
        return retry(uri, action, is_transient, retry_seconds)
    except (OSError, ValueError, UserError, WorkError):
        raise
    except Exception as error:  # each driver has exceptions of its own
        if type(error).__name__ in MISTAKES:
            raise UserError(f"{uri}: {first_line(error)}") from error
        raise WorkError(
            f"{uri}: its store fails: {type(error).__name__}: {first_line(error)}"
        ) from error


def is_transient(error: Exception) -> bool:
    """Return whether a remote store's failure may pass: too many requests, an error of its own, a
    lost connection."""
    if isinstance(error, WorkError):
        return isinstance(error.__cause__, Exception) and is_transient(error.__cause__)
    final = (
        FileNotFoundError,
        FileExistsError,
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
    )
    if isinstance(error, final):
        return False
    if isinstance(error, TimeoutError):  # S3's answer to it is 400
        return True
    status = _http_status(error)
    if status is not None:
        return is_transient_status(status)
    if isinstance(error, OSError):
        here = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EINVAL)
        return error.errno not in here and not str(error).startswith("Forbidden")  # gcsfs's 403
    if type(error).__name__ in MISTAKES:
        return False
    return type(error).__module__.split(".")[0] in (
        "aiohttp",
        "asyncio",
        "botocore",
        "gcsfs",
        "requests",
        "urllib3",
    )


def _http_status(error: BaseException | None) -> int | None:
    """Return the HTTP status with which a store answered, of a driver's exception or of the one
    that caused it."""
    while error is not None:
        response = getattr(
            error, "response", None
        )  # botocore's, which s3fs turns into an OSError, or that of requests
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = (
                getattr(error, "code", None),
                getattr(error, "status", None),
                getattr(response, "status_code", None),
            )
            status = next((value for value in found if value), None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of `uri` and the path on it; `UserError` if its driver is missing or
    unknown."""
    if "://" not in str(uri):  # else fsspec takes a folder called a::b for a chain of two
        local = fsspec.filesystem("file")
        return local, str(local._strip_protocol(str(uri)))
    try:
        fs, path = fsspec.core.url_to_fs(str(uri))
    except ImportError as error:
        raise UserError(
            f"{uri}: cannot be opened here: {error}; install that driver with pip"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{uri}: {error}; use a path or a URI such as gs://bucket/folder"
        ) from error
    return fs, path


def encodable(path: str) -> str:
    """Return a path as Parquet and JSON can hold it: on Linux, names of files may be any bytes but
    those are text."""
    return path.encode("utf-8", "backslashreplace").decode()


def is_local(uri: str) -> bool:
    """Whether `uri` names a file of this machine."""
    return "://" not in str(uri) or str(uri).startswith("file://")


def absolute(uri: str) -> str:
    """Return `uri` independent of the working directory."""
    return str(Path(filesystem(uri)[1]).absolute()) if is_local(uri) else str(uri).rstrip("/")


def join(base: str, *parts: str) -> str:
    """Join `parts` to `base`, a path or a URI."""
    return "/".join([str(base).rstrip("/") or "/", *parts])


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return retry_remote(uri, lambda: bool(fs.exists(path)))


def is_folder(uri: str) -> bool:
    fs, path = filesystem(uri)
    return retry_remote(uri, lambda: bool(fs.isdir(path)))


def read_bytes(uri: str, most: int | None = None, retry_seconds: float | None = None) -> bytes:
    """Return the content of `uri`, or the start of a longer one.

    Args:
        uri: path or URI.
        most: bytes beyond which no more than one is read, whatever a store says of the size.
        retry_seconds: seconds for which a store that fails is asked again; by default those of
            `retry`.

    Raises:
        UserError: it is missing, a folder, a device or not readable.
        WorkError: its store or server failed.
    """
    fs, path = filesystem(uri)

    def read() -> bytes:
        with reading(uri):
            return bytes(fs.cat_file(path)) if most is None else _start(fs, path, most + 1)

    return retry_remote(uri, read, retry_seconds)


def _start(fs: fsspec.AbstractFileSystem, path: str, most: int) -> bytes:
    """Return at most so many bytes of a file."""
    if "file" in fs.protocol:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path}: is not a file")  # others may never end, or never begin
        with Path(path).open("rb") as file:
            return file.read(most)
    if "http" not in fs.protocol:
        try:
            return bytes(
                fs.cat_file(path, start=0, end=most)
            )  # drivers disagree on the order of what is not named
        except FileNotFoundError:
            raise
        except Exception:
            if fs.size(path) == 0:  # of which there is no range to ask for
                return b""
            raise
    content = bytearray()
    # A stream, and no question for the size before it: a web server may know no ranges, and answer
    # what it likes.
    with fs.open(path, "rb", block_size=0, size=1) as stream:
        while len(content) < most and (part := stream.read(min(CHUNK, most - len(content)))):
            content += part
    return bytes(content)


@contextlib.contextmanager
def reading(uri: str) -> Iterator[None]:
    """Raise what goes wrong while `uri` is read as a `UserError` or a `WorkError`."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{uri}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # each driver has exceptions of its own
        if type(error).__name__ in MISTAKES:
            raise UserError(f"{uri}: cannot be read: {first_line(error)}") from error
        if is_local(uri) and (
            isinstance(error, ValueError) or getattr(error, "errno", 0) in OF_THE_FILE
        ):
            raise UserError(f"{encodable(uri)}: cannot be read: {first_line(error)}") from error
        raise WorkError(
            f"{uri}: cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error


def read_json(uri: str) -> Any:
    """Return the parsed JSON document at `uri`; `UserError` if it is missing or not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (
        ValueError,
        RecursionError,
    ) as error:  # also for a number of 5000 digits, and lists in lists
        raise UserError(f"{uri}: is not JSON: {error}") from error


@contextlib.contextmanager
def atomic_file(uri: str) -> Any:
    """Yield a local path to write to; what is there at the end becomes `uri`, or nothing does if
    the body raises."""
    fs, path = filesystem(uri)
    folder = str(Path(path).parent) if is_local(uri) else None
    if folder:
        os.makedirs(folder, exist_ok=True)
    part = str(Path(folder or tempfile.gettempdir(), f".part-{uuid.uuid4().hex}"))
    Path(part).touch(
        0o666 if folder else 0o600, exist_ok=False
    )  # mkstemp makes files that nobody else can read
    try:
        yield part
        if folder:
            with Path(part).open("rb") as written:
                os.fsync(
                    written.fileno()
                )  # or a machine that loses its power leaves an empty file under the name
            os.replace(part, path)
        else:
            retry_remote(uri, lambda: fs.put_file(part, path))
    except Exception as error:
        if not disk_is_full(error):
            raise
        place = uri if folder else f"{part}, on the way to {uri}"
        raise WorkError(
            f"{place}: cannot be written: the disk is full; make room there and start again"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error says so, or the one that it stands for; safetensors puts it into words."""
    if error is None:
        return False
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "os error 28" in str(error) or disk_is_full(error.__cause__)


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
        raise UserError(
            f"{encodable(absolute(folder))}: is not UTF-8, and JSON cannot hold it; choose "
            "another output"
        )
    probe = join(
        folder, f".part-{os.getpid()}-test"
    )  # where a kill leaves it, the next run removes it as any other
    try:
        write_bytes(probe, b"")
        remove(probe)
    except OSError as error:
        if not is_local(folder) and is_transient(error):
            raise WorkError(
                f"{folder}: cannot be written to now: {error.strerror or error}; start again"
            ) from error
        raise UserError(
            f"{folder}: cannot be written to: {error.strerror or error}; choose another output"
        ) from error


def require_room(folder: str, need: int, what: str) -> None:
    """Raise `UserError` if a local `folder` has no room for `need` more bytes of `what`; other
    stores are not asked."""
    if not is_local(folder):
        return
    free = shutil.disk_usage(filesystem(folder)[1]).free
    if need > free:
        raise UserError(
            f"{folder}: needs {need / 1e9:.2f} GB more for {what}, and {free / 1e9:.2f} GB are "
            "free; make room there, "
            "or choose another folder"
        )


def remove(uri: str) -> None:
    """Delete the file or folder `uri` if it is there."""
    fs, path = filesystem(uri)

    def act() -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)

    retry_remote(uri, act)


def list_names(uri: str) -> list[str]:
    """Return the sorted names directly inside the folder `uri`, without hidden ones; empty if there
    is none."""
    fs, path = filesystem(uri)
    if not is_folder(uri):
        return []
    names = (
        Path(entry).name
        for entry in retry_remote(uri, lambda: fs.ls(path, detail=False, refresh=True))
    )
    return sorted(name for name in names if not name.startswith("."))


def upload_folder(local: str, uri: str) -> None:
    """Copy the files of the local folder `local` to `uri`, a path or a URI."""
    for file in sorted(Path(local).rglob("*")):
        if file.is_file():
            with atomic_file(join(uri, *file.relative_to(local).parts)) as part:
                shutil.copyfile(file, part)


def version(info: Mapping[str, Any]) -> list[str]:
    """Return what tells two contents of one file apart, from its `info`: each kind of store names
    it otherwise."""
    return [
        str(info[key])
        for key in ("etag", "ETag", "generation", "mtime", "LastModified")
        if key in info
    ]
