"""What goes wrong with files, buckets and servers: one line for the user, and whether it may pass.

`store_errors` is for reading and writing a file, `input_errors` for what is in it.
"""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from model_lib.errors import UserError, WorkError, first_line

FINAL = (FileNotFoundError, FileExistsError, PermissionError)
FULL = "the disk is full; make room there and start again"
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EINVAL)
"""Errors of a full or read-only disk, and of a call that no store would take."""
ONE_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)
"""Errors of one local file, and not of the machine."""
NOT_CONFIGURED = {
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
}
"""Exceptions of botocore for what the user has not set up, or a name that no bucket can have."""
CLIENTS = {"aiohttp", "botocore", "gcsfs", "http", "kubernetes", "mlflow", "sqlalchemy", "urllib3"}
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
    """Raise errors of a store or the disk as one line; `doing` is "read", "written" or "listed".

    Raises:
        UserError: the file is missing, or the user may not use it.
        WorkError: the store failed.
    """
    try:
        yield
    except (UserError, WorkError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and doing != "written":
            raise UserError(f"{uri}: no such file") from error
        kind: type[UserError | WorkError] = WorkError
        if isinstance(error, FINAL) or type(error).__name__ in NOT_CONFIGURED:
            kind = UserError
        elif isinstance(error, OSError):
            kind = UserError if error.errno in ONE_FILE else WorkError
        elif not (disk_is_full(error) or is_transient(error) or http_status(error)):
            raise
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {first_line(error)}"
        if disk_is_full(error):
            reason = FULL
        raise kind(f"{uri}: cannot be {doing}: {reason}") from error


@contextlib.contextmanager
def input_errors(uri: str, what: str) -> Iterator[None]:
    """Raise a parser's error as a `UserError` that `uri` is not `what`: "a plan; plan again".

    Errors of reading are for `store_errors`.
    """
    form, _, remedy = what.partition("; ")
    try:
        yield
    except (UserError, WorkError):
        raise
    except Exception as error:  # parsers raise all kinds on a file that is not what it should be
        # The disk's own errors have a number; EINVAL is a position before a file's start. Arrow's
        # kind of MemoryError is of a size that a damaged file claims.
        is_of_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if is_of_disk or type(error) is MemoryError:
            raise
        message = f"{uri}: is not {form} ({first_line(error)})"
        raise UserError(f"{message}; {remedy}" if remedy else message) from error


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error or its cause says so; safetensors puts the number into words."""
    if error is None:
        return False
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "os error 28" in str(error) or disk_is_full(error.__cause__)
