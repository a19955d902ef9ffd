"""The captioner as an MLflow model:
`mlflow.pyfunc.load_model("models:/captioner@champion").predict(["a.jpg"])`.

Input: a column of image paths, URIs or base64. Output: the captions. A server opens for whoever
asks only what `url_policy.py` allows. MLflow loads this file as the model's code.
"""

import base64
import binascii
import json
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel

SHOWN = 80
"""Characters of a row that an error names: base64 may be megabytes."""
NAMED = 5
"""Rows that an error names."""
MOST_ROWS = 256
"""Rows of a request to a server: all of them wait for the last."""
MOST_BEAMS = 16
"""Beams that a server keeps an image: the memory of decoding grows with them …"""
MOST_TOKENS = 200
"""… and with the tokens of the longest caption."""


class Refused(MlflowException):
    """A request that cannot be answered: HTTP status 400, or 503 if a store failed that may work
    again."""

    def __init__(self, message: str, error_code: int = INVALID_PARAMETER_VALUE) -> None:
        super().__init__(message, error_code)
        self.said = message

    def serialize_as_json(self) -> str:
        """Return the answer's body; MLflow's server puts all of the request's data before the
        message."""
        return json.dumps({"error_code": self.error_code, "message": self.said})


class CaptionerModel(PythonModel):
    """Loads the captioner once and captions columns of images."""

    def load_context(self, context: Any) -> None:
        from model_lib import Captioner

        self.model = Captioner.from_pretrained(context.artifacts["model"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Return a caption for each row of the first column; `Refused` names the rows that are no
        images."""
        from model_lib.errors import UserError, WorkError
        from model_lib.model.captioning import caption_each
        from model_lib.model.config import DecodeConfig

        try:
            config = DecodeConfig.from_options(**(params or {}))
            _require_modest(len(model_input), config)
            rows = [_allowed(_image(row)) for row in model_input.iloc[:, 0]]
            results = list(caption_each(self.model, rows, config, redirects=False))
        except UserError as error:
            raise Refused(str(error)) from error
        captions, problems = [], []
        for number, (row, result) in enumerate(zip(rows, results, strict=True), 1):
            if isinstance(result, list):
                captions.append(result[0].text)
            else:
                problems.append(
                    (
                        f"row {number} of {len(rows)}: {_said(row, result)}",
                        isinstance(result, WorkError),
                    )
                )
        if problems:
            more = [f"{len(problems) - NAMED} more rows"] if len(problems) > NAMED else []
            said = "; ".join([text for text, _ in problems[:NAMED]] + more)
            passing = all(
                passing for _, passing in problems
            )  # if any row is wrong, asking again is of no use
            raise Refused(said, TEMPORARILY_UNAVAILABLE if passing else INVALID_PARAMETER_VALUE)
        return captions


def _require_modest(rows: int, config: Any) -> None:
    """Raise `UserError` if a stranger asks for more than a server does at once."""
    from model_lib.io.url_policy import is_serving
    from model_lib.options import require

    if is_serving():
        many = (
            f"{rows} rows: are more than the {MOST_ROWS} that a request may have here; send several"
        )
        require(rows <= MOST_ROWS, many)
        for name, most in (("num_beams", MOST_BEAMS), ("max_new_tokens", MOST_TOKENS)):
            asked = getattr(config, name)
            require(
                asked <= most,
                f"{name}: {asked} is more than the {most} that a request may have here",
            )


def _image(row: Any) -> Any:
    """Return the bytes that base64 stands for (bare, with line breaks, or a data URI); a path or
    URI unchanged."""
    from model_lib.errors import UserError
    from model_lib.io.images import is_image

    if not isinstance(row, str) or not row.strip():
        return UserError("is not the path, URI or base64 of an image")
    encoded = "".join((row.partition(",")[2] if row.startswith("data:") else row).split())
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return UserError("a data URI, but not of base64") if row.startswith("data:") else row
    if is_image(content):
        return content
    # A path may be valid base64 by chance, but then it is short.
    return (
        row
        if len(row) < 4 * SHOWN and not row.startswith("data:")
        else UserError("base64, but not of an image")
    )


def _allowed(row: Any) -> Any:
    """Return a row unchanged, or why a server does not open it for whoever asks."""
    from model_lib.io.url_policy import UrlNotAllowed, is_serving, require_allowed

    if isinstance(row, str) and is_serving():
        try:
            require_allowed(row)
        except UrlNotAllowed as error:
            return error
    return row


def _said(row: Any, problem: Exception) -> str:
    from model_lib.io.images import ImageError

    message = " ".join(str(problem).split())
    if isinstance(row, str):
        short = row if len(row) <= SHOWN else f"{row[: SHOWN // 2]}…{row[-SHOWN // 2 :]}"
        message = (
            f"{short}: {message}"
            if isinstance(problem, ImageError)
            else message.replace(row, short)
        )
    return message


mlflow.models.set_model(CaptionerModel())
