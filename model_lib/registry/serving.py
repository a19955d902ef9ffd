"""The captioner as an MLflow model:
`mlflow.pyfunc.load_model("models:/captioner@champion").predict(["a.jpg"])`.

Input: images as bytes, base64, data URIs, arrays or Pillow images, or as paths and URIs, of which a
server opens only those that `url_policy.py` allows. Output: the captions. MLflow loads this file as
the model's code.
"""

import base64
import binascii
import json
import urllib.parse
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from model_lib.errors import UserError, WorkError
from model_lib.io.images import ImageError, is_image
from model_lib.io.url_policy import UrlNotAllowed, is_serving, require_allowed
from model_lib.model.config import DecodeConfig
from model_lib.options import require

SHOWN = 80
"""Characters of a row in an error: base64 may be megabytes."""
LONGEST_PATH = 4096
"""Characters of a path or URI: what is longer is none."""
BYTES = (bytes, bytearray, memoryview)
NAMED = 5
"""Rows in an error."""
MOST_ROWS = 256
"""Rows of a request to a server: all of them wait for the last one."""
LIMITS = {"num_beams": 16, "max_new_tokens": 200}
"""Highest values, in a request to a server, of options with which the memory of decoding grows."""


class Refused(MlflowException):
    """A request that cannot be answered: HTTP status 400, or 503 if a store failed that may work
    again."""

    def __init__(self, message: str, error_code: int = INVALID_PARAMETER_VALUE) -> None:
        super().__init__(message, error_code)
        self.reason = message

    def serialize_as_json(self) -> str:
        """Return the answer's body; MLflow's server puts the whole request before the message."""
        return json.dumps({"error_code": self.error_code, "message": self.reason})


class CaptionerModel(PythonModel):
    """Loads the captioner once and captions columns of images."""

    def load_context(self, context: Any) -> None:
        from model_lib import Captioner

        self.model = Captioner.from_pretrained(context.artifacts["model"])

    def predict(
        self, context: Any, model_input: Any, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Return the caption of each image.

        Args:
            context: MLflow's.
            model_input: an image; or a list, series, array or data frame of images, see
                `_image_column`.
            params: options of `DecodeConfig`.

        Raises:
            Refused: some rows are no images, which the message names; or options are out of range.
        """
        from model_lib.model.captioning import caption_each

        try:
            config = DecodeConfig.from_options(**(params or {}))
            images = _image_column(model_input)
            _require_limits(len(images), config)
            rows = [_decode_row(row) for row in images]
            results = list(caption_each(self.model, rows, config, redirects=False))
        except UserError as error:
            raise Refused(str(error)) from error
        problems = [(n, r) for n, r in enumerate(results) if not isinstance(r, list)]
        if problems:
            messages = [
                f"row {n + 1} of {len(rows)}: {_describe(rows[n], problem)}"
                for n, problem in problems[:NAMED]
            ]
            if len(problems) > NAMED:
                messages.append(f"{len(problems) - NAMED} more rows")
            is_transient = all(isinstance(problem, WorkError) for _, problem in problems)
            code = TEMPORARILY_UNAVAILABLE if is_transient else INVALID_PARAMETER_VALUE
            raise Refused("; ".join(messages), code)
        return [result[0].text for result in results if isinstance(result, list)]


def _image_column(model_input: Any) -> list[Any]:
    """Return the images of what `predict` gets, one an entry.

    Of a data frame they are the first column that holds bytes, as Spark's binaryFile has beside the
    paths, else the first one. An array of integers is an image, [height, width] or [height, width,
    3], or several of the latter.
    """
    if isinstance(model_input, dict):
        model_input = pd.DataFrame(model_input)
    if isinstance(model_input, pd.DataFrame):
        columns = [model_input[name].tolist() for name in model_input]
        holds_bytes = [any(isinstance(row, BYTES) for row in column) for column in columns]
        return columns[holds_bytes.index(True) if True in holds_bytes else 0] if columns else []
    if isinstance(model_input, np.ndarray) and model_input.dtype.kind in "iu":
        return list(model_input) if model_input.ndim == 4 else [model_input]
    if isinstance(model_input, np.ndarray):
        return model_input.ravel().tolist()
    return list(model_input) if isinstance(model_input, list | tuple | pd.Series) else [model_input]


def _decode_row(row: Any) -> Any:
    """Return the image in a row for `captioning.load_image`: base64 and data URIs as bytes, a path
    or URI unchanged; or the error of a row that is none of these, or that a server does not open.
    """
    if isinstance(row, BYTES):
        return bytes(row)
    if isinstance(row, np.ndarray) and row.dtype.kind in "iu" and np.all((row >= 0) & (row < 256)):
        return row.astype(np.uint8)
    if isinstance(row, Path | Image.Image | np.ndarray):
        return row
    if pd.isna(row) is True or not str(row).strip():
        return UserError("is empty")
    if not isinstance(row, str):
        return UserError(f"is {type(row).__name__}, not an image")
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
    if is_serving():
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


def _require_limits(rows: int, config: Any) -> None:
    """Raise `UserError` if a request to a server asks for too much at once."""
    if is_serving():
        limit = f"more than the {MOST_ROWS} that a request may have here"
        require(rows <= MOST_ROWS, f"{rows} rows: are {limit}; send several")
        for name, most in LIMITS.items():
            value = getattr(config, name)
            limit = f"more than the {most} that a request may have here"
            require(value <= most, f"{name}: {value} is {limit}")


def _describe(row: Any, problem: Exception) -> str:
    """Return what is wrong with a row, in one line."""
    message = " ".join(str(problem).split())
    if not isinstance(row, str):
        return message
    short = row if len(row) <= SHOWN else f"{row[: SHOWN // 2]}…{row[-SHOWN // 2 :]}"
    return f"{short}: {message}" if isinstance(problem, ImageError) else message.replace(row, short)


mlflow.models.set_model(CaptionerModel())
