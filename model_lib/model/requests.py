"""What others ask of a served model: their images and options, and what is wrong with them."""

import base64
import binascii
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from model_lib.errors import UserError
from model_lib.io.images import ImageError, is_image
from model_lib.io.url_policy import UrlNotAllowed, require_allowed
from model_lib.model.config import DecodeConfig
from model_lib.options import require

SHOWN = 80
"""Characters of a row in an error: base64 may be megabytes."""
LONGEST_PATH = 4096
"""Characters of a path or URI: what is longer is none."""
NAMED = 5
"""Rows in an error."""
LIMITS = {"num_beams": 16, "max_new_tokens": 200, "num_captions": 1}
"""Highest values, in a request, of options with which the memory of decoding grows."""


def require_limits(rows: int, config: DecodeConfig, most_rows: int) -> None:
    """Raise `UserError` if a request asks for too much at once."""
    limit = "that a request may have here"
    require(rows <= most_rows, f"{rows} rows: are more than the {most_rows} {limit}; send several")
    for name, most in LIMITS.items():
        value = getattr(config, name)
        require(value <= most, f"{name}: {value} is more than the {most} {limit}")


def decode_text(row: str, any_path: bool = False) -> bytes | str | UserError:
    """Return the image in a row: base64 and data URIs as bytes, a path or URI unchanged; or the
    error of a row that is none of these, or that a server does not open.

    `any_path`: the row is of whoever runs this process, who may open what it can.
    """
    if not row.strip():
        return UserError("is empty")
    is_data = row[:5].lower() == "data:"
    content = _decode_data_uri(row) if is_data else _decode_base64(row.encode())
    if content is None and is_data:
        return UserError("a data URI, but not of base64")
    if content is not None and is_image(content):
        return content
    # A path may be valid base64 by chance, but then it is short.
    if content is not None and (is_data or len(row) >= 4 * SHOWN):
        return UserError("base64, but not of an image")
    if len(row) > LONGEST_PATH:
        return UserError(f"neither base64 nor a path or URI: {row[:SHOWN]!r}")
    if not any_path:
        try:
            require_allowed(row)
        except UrlNotAllowed as error:
            return error
    return row


def _decode_data_uri(uri: str) -> bytes | None:
    """Return the content of a data URI (RFC 2397), or None if its base64 is damaged."""
    kind, _, data = uri.partition(",")
    content = urllib.parse.unquote_to_bytes(data)
    return _decode_base64(content) if kind.lower().rstrip().endswith(";base64") else content


def _decode_base64(encoded: bytes) -> bytes | None:
    """Return what base64 stands for: either alphabet, with line breaks, with or without padding; or
    None if it is none."""
    encoded = b"".join(encoded.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error:
        return None


def describe_problems(rows: Sequence[Any], problems: Mapping[int, Exception]) -> str:
    """Return in one line what is wrong with which rows, by their index."""
    messages = [
        f"row {n + 1} of {len(rows)}: {_describe(rows[n], problem)}"
        for n, problem in list(problems.items())[:NAMED]
    ]
    if len(problems) > NAMED:
        messages.append(f"{len(problems) - NAMED} more rows")
    return "; ".join(messages)


def _describe(row: Any, problem: Exception) -> str:
    """Return what is wrong with a row, in one line."""
    message = " ".join(str(problem).split())
    if not isinstance(row, str):
        return message
    short = row if len(row) <= SHOWN else f"{row[: SHOWN // 2]}…{row[-SHOWN // 2 :]}"
    return f"{short}: {message}" if isinstance(problem, ImageError) else message.replace(row, short)
