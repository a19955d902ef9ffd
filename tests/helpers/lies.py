"""What the attacks on files share: documents that are none, and how a refusal is to look."""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from model_lib.errors import LONGEST, UserError

DEEP = 100_000
"""Lists in lists of a document that no stack holds."""


def fingerprint(folder: Path) -> str:
    """Digest every name and content below a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        found.update(f"{file.relative_to(folder)}\0".encode())
        found.update(file.read_bytes() if file.is_file() else b"")
    return found.hexdigest()


def refused(read: Callable[[], object], folder: Path, kind: type[Exception] = UserError) -> str:
    """Return the line with which a folder's lie is refused, its files as they were."""
    before = fingerprint(folder)
    with pytest.raises(kind) as error:
        read()
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 2 * LONGEST
    assert fingerprint(folder) == before
    return message


def write(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document))


def broken(whole: bytes) -> Iterator[bytes]:
    """Yield what is no whole document."""
    yield from (
        b"",
        b" ",
        b"\0" * 100,
        b"\xff\xfe{",
        whole[:-1],
        whole[: len(whole) // 2],
        whole + b"x",
    )
    yield from (
        b"null",
        b"0",
        b'"text"',
        b"true",
        b"NaN",
        b"[1]",
        b"[[]]",
        b'{"x": 1}',
        b"1" * 5000,
    )
    yield from (
        b"[" * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        b'{"a":' * DEEP,
        b'{"images": ' + b"[" * DEEP,
    )
    yield pickle.dumps({"images": [], "annotations": []})
