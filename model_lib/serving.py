"""The captioner as an MLflow model: `mlflow.pyfunc.load_model("models:/captioner@champion").predict(["a.jpg"])`.

Input: a column of image paths, URIs or base64. Output: the captions. MLflow loads this file as the model's code.
"""

import base64
import binascii
import io
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
    """Return the bytes of a base64 picture (bare, with line breaks, or a data URI); a path or URI unchanged."""
    from PIL import Image

    encoded = "".join((text.partition(",")[2] if text.startswith("data:") else text).split())
    try:
        content = base64.b64decode(encoded, validate=True)
        Image.open(io.BytesIO(content))  # a path may be valid base64 by chance, but not a picture too
    except (binascii.Error, ValueError, OSError):
        return text
    return content


mlflow.models.set_model(CaptionerModel())
