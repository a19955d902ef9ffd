"""The captioner as an MLflow model:
`mlflow.pyfunc.load_model("models:/captioner@champion").predict(["a.jpg"])`.

Input: a column of base64, or of image paths and URIs, of which a server opens only those that
`url_policy.py` allows. Output: the captions. MLflow loads this file as the model's code.
"""

import base64
import binascii
import json
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc.model import PythonModel

SHOWN = 80
"""Characters of a row in an error: base64 may be megabytes."""
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
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Return a caption for each row of the first column.

        Raises:
            Refused: some rows are no images, which the message names; or options are out of range.
        """
        from model_lib.errors import UserError, WorkError
        from model_lib.model.captioning import caption_each
        from model_lib.model.config import DecodeConfig

        try:
            config = DecodeConfig.from_options(**(params or {}))
            _require_limits(len(model_input), config)
            rows = [_decode_row(row) for row in model_input.iloc[:, 0]]
            results = list(caption_each(self.model, rows, config, redirects=False))
        except UserError as error:
            raise Refused(str(error)) from error
        captions: list[str] = []
        problems: dict[str, bool] = {}  # and whether asking again may help
        for number, (row, result) in enumerate(zip(rows, results, strict=True), 1):
            if isinstance(result, list):
                captions.append(result[0].text)
            else:
                message = f"row {number} of {len(rows)}: {_describe(row, result)}"
                problems[message] = isinstance(result, WorkError)
        if problems:
            messages = [*problems][:NAMED]
            if len(problems) > NAMED:
                messages.append(f"{len(problems) - NAMED} more rows")
            is_transient = all(problems.values())
            code = TEMPORARILY_UNAVAILABLE if is_transient else INVALID_PARAMETER_VALUE
            raise Refused("; ".join(messages), code)
        return captions


def _require_limits(rows: int, config: Any) -> None:
    """Raise `UserError` if a request to a server asks for too much at once."""
    from model_lib.io.url_policy import is_serving
    from model_lib.options import require

    if is_serving():
        limit = f"more than the {MOST_ROWS} that a request may have here; send several"
        require(rows <= MOST_ROWS, f"{rows} rows: are {limit}")
        for name, most in LIMITS.items():
            value = getattr(config, name)
            limit = f"more than the {most} that a request may have here"
            require(value <= most, f"{name}: {value} is {limit}")


def _decode_row(row: Any) -> Any:
    """Return the image in a row's base64 (bare, with line breaks, or a data URI) as bytes; a path
    or URI unchanged; or the error of a row that is neither, or that a server does not open."""
    from model_lib.errors import UserError
    from model_lib.io.images import is_image
    from model_lib.io.url_policy import UrlNotAllowed, is_serving, require_allowed

    if not isinstance(row, str) or not row.strip():
        return UserError("is not the path, URI or base64 of an image")
    is_data = row.startswith("data:")
    encoded = "".join((row.partition(",")[2] if is_data else row).split())
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        if is_data:
            return UserError("a data URI, but not of base64")
    else:
        if is_image(content):
            return content
        # A path may be valid base64 by chance, but then it is short.
        if is_data or len(row) >= 4 * SHOWN:
            return UserError("base64, but not of an image")
    try:
        if is_serving():
            require_allowed(row)
    except UrlNotAllowed as error:
        return error
    return row


def _describe(row: Any, problem: Exception) -> str:
    """Return what is wrong with a row, in one line."""
    from model_lib.io.images import ImageError

    message = " ".join(str(problem).split())
    if not isinstance(row, str):
        return message
    short = row if len(row) <= SHOWN else f"{row[: SHOWN // 2]}…{row[-SHOWN // 2 :]}"
    return f"{short}: {message}" if isinstance(problem, ImageError) else message.replace(row, short)


mlflow.models.set_model(CaptionerModel())
