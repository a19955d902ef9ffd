"""What goes wrong with files, buckets and servers: one line for the user, and whether it may pass.

`store_errors` is for reading and writing a file, `input_errors` for what is in it.
"""

import contextlib
import csv
import errno
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from model_lib.errors import UserError, WorkError, first_line, printable

FINAL = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
FULL = "the disk is full; make room there and start again"
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EINVAL)
"""What a full or read-only disk of this machine says, and a call that no store would take."""
ONE_FILE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)
"""What is wrong with one local file, and not with the machine."""
NOT_CONFIGURED = {
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
}
"""Exceptions of botocore for what the user has not set up, or a name that no bucket can have."""
CONTENT_ERRORS = (
    pa.ArrowException,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,  # Arrow says so what is wrong with a page
    RuntimeError,  # an archive's member is encrypted, or a document nested too deeply
    TypeError,
    ValueError,
    csv.Error,
    lzma.LZMAError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What parsers raise on a file that is not what it should be."""
CLIENTS = {
    "aiohttp",
    "asyncio",
    "botocore",
    "gcsfs",
    "http",
    "kubernetes",
    "mlflow",
    "requests",
    "sqlalchemy",
    "urllib3",
}
"""Packages whose other exceptions are of a connection that failed."""


def is_transient(error: BaseException) -> bool:
    """Return whether a failure may pass: no answer, a timeout, an overloaded or failing server."""
    if isinstance(error, WorkError) and error.__cause__ is not None:
        return is_transient(error.__cause__)
    if isinstance(error, (UserError, *FINAL)):
        return False
    if isinstance(error, TimeoutError):  # S3 answers it with 400
        return True
    status = http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, OSError):
        return error.errno not in MACHINE and not str(error).startswith("Forbidden")  # gcsfs's 403
    client = type(error).__module__.partition(".")[0]
    return client in CLIENTS and type(error).__name__ not in NOT_CONFIGURED


def http_status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an exception stands for, or the exception that caused it."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore's, which s3fs turns into an OSError
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif hasattr(error, "get_http_status_code"):  # MLflow's
            status = error.get_http_status_code()
        else:
            names = (error, "code"), (error, "status"), (response, "status_code")
            status = next((s for owner, name in names if (s := getattr(owner, name, None))), None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


@contextlib.contextmanager
def store_errors(uri: str, doing: str = "read") -> Iterator[None]:
    """Raise what a store or the disk does wrong as one line.

    Args:
        uri: path or URI.
        doing: what cannot be done: "read", "written", "listed".

    Raises:
        UserError: the file is missing, or not to be had as things are set up.
        WorkError: the store failed.
    """
    name = uri.encode("utf-8", "backslashreplace").decode()  # a file's name may be any bytes
    try:
        yield
    except (UserError, WorkError):
        raise
    except FINAL as error:
        if isinstance(error, FileNotFoundError) and doing != "written":
            raise UserError(f"{name}: no such file") from error
        raise UserError(f"{name}: cannot be {doing}: {error.strerror or error}") from error
    except OSError as error:
        if disk_is_full(error):
            raise WorkError(f"{name}: cannot be {doing}: {FULL}") from error
        kind = UserError if error.errno in ONE_FILE else WorkError
        raise kind(f"{name}: cannot be {doing}: {_reason(error)}") from error
    except Exception as error:
        if disk_is_full(error):  # safetensors has an exception of its own
            raise WorkError(f"{name}: cannot be {doing}: {FULL}") from error
        if type(error).__name__ in NOT_CONFIGURED:
            raise UserError(f"{name}: cannot be {doing}: {first_line(error)}") from error
        if is_transient(error) or http_status(error) is not None:
            raise WorkError(f"{name}: cannot be {doing}: {_reason(error)}") from error
        raise


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or f"{type(error).__name__}: {printable(first_line(error))}"


@contextlib.contextmanager
def input_errors(uri: str, what: str) -> Iterator[None]:
    """Raise a `UserError` that `uri` is not `what`, "something; remedy", if its content is not.

    To be around the parsing alone: reading is for `store_errors`.
    """
    form, _, remedy = what.partition("; ")
    try:
        yield
    except CONTENT_ERRORS as error:
        # Arrow's and bz2's own have no number; EINVAL is a position before a file's start.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        message = f"{uri}: is not {form} ({first_line(error)})"
        raise UserError(f"{message}; {remedy}" if remedy else message) from error


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error says so, or its cause; safetensors puts the number into words."""
    if error is None:
        return False
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "os error 28" in str(error) or disk_is_full(error.__cause__)
