"""Captioned images as HTML: the image, its captions, and a heat map for each word."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from model_lib.evaluate.explain import word_attention
from model_lib.model.captioner import Captioner
from model_lib.model.captioning import Caption, ImageCaptioner, caption_each, load_image
from model_lib.model.config import DecodeConfig
from model_lib.pages.page import render_page, thumbnail

SIDE = 480
"""Longest side of an image on the page in pixels."""
HEAT = np.array([(10, 10, 30), (110, 30, 110), (229, 92, 48), (250, 180, 50), (252, 240, 110)])
"""Colours from the least attention to the most."""
OPACITY = (0.6, 0.75)
"""Of the map where there is the least attention, and the most."""


def caption_cards(
    model: ImageCaptioner, files: Sequence[str], config: DecodeConfig
) -> Iterator[str]:
    """Yield each image's card as HTML, in order: with its captions, or why it has none."""
    results = caption_each(model, files, config)
    for file, result in zip(files, results, strict=True):
        name = Path(file).name
        if isinstance(result, list):
            yield _card(model, name, load_image(file), result)
        else:
            yield render_page("app_card.html", error=f"{name}: {result}")


def _card(model: ImageCaptioner, name: str, image: Image.Image, captions: Sequence[Caption]) -> str:
    words: list[list[tuple[str, str]]] = [[] for _ in captions]
    seen = (100.0, 100.0)
    if isinstance(model, Captioner):
        pixels = model.preprocess(image)
        for caption, shown in zip(captions, words, strict=True):
            attention = word_attention(model, pixels, caption)
            # Odd characters may belong to no word; then the caption is shown as it is.
            if [word for word, _ in attention] == caption.text.split():
                shown += [(word, _heat_map(weights)) for word, weights in attention]
        seen = model.preprocess.seen_part(image.width, image.height)
    return render_page(
        "app_card.html",
        name=name,
        aspect=image.width / image.height,
        captions=list(zip(captions, words, strict=True)),
        seen=seen,
        thumbnail=base64.b64encode(thumbnail(image, SIDE)).decode(),
    )


def _heat_map(weights: np.ndarray) -> str:
    """Return weights [P, P] as a translucent PNG in base64."""
    heat = (weights - weights.min()) / max(float(np.ptp(weights)), 1e-9)
    steps = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(heat, steps, channel) for channel in HEAT.T]
    channels.append(255 * np.interp(heat, (0, 1), OPACITY))
    encoded = io.BytesIO()
    Image.fromarray(np.stack(channels, -1).round().astype(np.uint8)).save(encoded, "PNG")
    return base64.b64encode(encoded.getvalue()).decode()
