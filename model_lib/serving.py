"""The captioner as an MLflow model: `mlflow.pyfunc.load_model("models:/captioner@champion").predict(["a.jpg"])`.

Input: a column of image paths, URIs or base64. Output: the captions. MLflow loads this file as the model's code.
"""

import base64
import binascii
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel


class CaptionerModel(PythonModel):
    """Loads the captioner once and captions columns of pictures."""

    def load_context(self, context: Any) -> None:
        from model_lib import Captioner

        self.model = Captioner.from_pretrained(context.artifacts["model"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads the hints
        """Return a caption for each row of the first column; a row that is no picture raises with a clear message."""
        from model_lib.captioning import caption_images

        rows = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        captions = caption_images(self.model, [_picture(str(row)) for row in rows], **(params or {}))
        return [caption.text for caption in captions]


def _picture(text: str) -> str | bytes:
    """Return the bytes of a base64 picture (bare or a data URI); a path or URI unchanged."""
    if text.startswith("data:"):
        return base64.b64decode(text.partition(",")[2])
    if len(text) > 200 and "://" not in text:  # no path is so long, no picture so short
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error:
            return text
    return text


mlflow.models.set_model(CaptionerModel())
