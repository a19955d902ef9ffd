"""Documents that are damaged, and the check that a reader refuses them in one line."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_lib.errors import LONGEST, UserError

DEEP = 100_000
"""Lists inside each other, more than a stack holds."""


def fingerprint(folder: Path) -> str:
    """Digest every name and content below a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        digest.update(f"{file.relative_to(folder)}\0".encode())
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def refused(read: Callable[[], object], folder: Path, kind: type[Exception] = UserError) -> str:
    """Return the one-line message with which `read` refuses a file; no file in `folder` changes."""
    before = fingerprint(folder)
    with pytest.raises(kind) as error:
        read()
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 2 * LONGEST
    assert fingerprint(folder) == before
    return message


def write(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document))


def broken(whole: bytes) -> list[bytes]:
    """Return documents that are not valid JSON, or of another form, made from a valid one."""
    cut = [b"", b" ", b"\0" * 100, b"\xff\xfe{", whole[:-1], whole[: len(whole) // 2], whole + b"x"]
    other = [b"null", b"0", b'"text"', b"true", b"NaN", b"[1]", b"[[]]", b'{"x": 1}', b"1" * 5000]
    deep = [b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP, b'{"images": ' + b"[" * DEEP]
    return [*cut, *other, *deep, pickle.dumps({"images": [], "annotations": []})]
