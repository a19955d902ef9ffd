"""The captioner as an MLflow model:
`mlflow.pyfunc.load_model("models:/captioner@champion").predict(["a.jpg"])`.

Input: images as bytes, base64, data URIs, arrays or Pillow images, or as paths and URIs, of which a
server opens only those that `url_policy.py` allows. Output: the captions. MLflow loads this file as
the model's code.
"""

import json
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
from model_lib.io.url_policy import is_serving
from model_lib.model.config import DecodeConfig
from model_lib.model.requests import decode_text, describe_problems, require_limits

BYTES = (bytes, bytearray, memoryview)
MOST_ROWS = 256
"""Rows of a request to a server: all of them wait for the last one."""


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
            if is_serving():
                require_limits(len(images), config, MOST_ROWS)
            rows = [_decode_row(row) for row in images]
            results = list(caption_each(self.model, rows, config, redirects=False))
        except UserError as error:
            raise Refused(str(error)) from error
        problems = {n: r for n, r in enumerate(results) if not isinstance(r, list)}
        if problems:
            is_transient = all(isinstance(problem, WorkError) for problem in problems.values())
            code = TEMPORARILY_UNAVAILABLE if is_transient else INVALID_PARAMETER_VALUE
            raise Refused(describe_problems(rows, problems), code)
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
    if pd.isna(row) is True:
        return UserError("is empty")
    if not isinstance(row, str):
        return UserError(f"is {type(row).__name__}, not an image")
    return decode_text(row, any_path=not is_serving())


mlflow.models.set_model(CaptionerModel())
