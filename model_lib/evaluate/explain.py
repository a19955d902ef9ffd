"""The model's attention: the parts of an image from which it took each word of its caption."""

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from model_lib.model.captioner import Captioner
from model_lib.model.captioning import Caption, load_image
from model_lib.model.tokens import decode_tokens
from model_lib.model.vision import class_tokens
from model_lib.pages.page import render_page


def word_attention(
    model: Captioner, pixels: np.ndarray, caption: Caption
) -> list[tuple[str, np.ndarray]]:
    """Return each word of a caption with its attention over the image's patches.

    Args:
        model: the captioner.
        pixels: the model's own, uint8 [3, image_size, image_size].
        caption: the model's caption of the image.

    Returns:
        For each word its text and float32 [P, P], the mean over its tokens, layers and heads; P
        patches a side. They sum to less than one: the rest is on a class token, if the tower
        has one.
    """
    inputs = torch.tensor([[[model.start_token, *caption.tokens[:-1]]]], device=model.device)
    with torch.inference_mode():
        features = model.encode(torch.from_numpy(pixels).unsqueeze(0).to(model.device))
        maps = model.attention(features, inputs)[0, 0].cpu().numpy()
    maps = maps[:, class_tokens(model.config.vision_config) :]
    side = round(maps.shape[1] ** 0.5)
    maps = maps.reshape(-1, side, side)
    text = ""
    words: list[list[np.ndarray]] = []
    for number, weights in enumerate(maps, 1):
        # Tokens differ in how they carry spaces, so words are counted in the text so far.
        text = decode_tokens(model.tokenizer, caption.tokens[:number])
        count = len(text.split())
        if 0 < count == len(words) and caption.tokens[number - 1] != model.end_token:
            words[-1].append(weights)
        while count > len(words):
            words.append([weights])
    return list(zip(text.split(), [np.mean(word, axis=0) for word in words], strict=False))


def render_explanation(model: Captioner, captions: Sequence[tuple[str, Caption]]) -> str:
    """Return an HTML page of images, by path or URI, with the attention for each word."""
    rows = []
    for uri, caption in captions:
        pixels = model.preprocess(load_image(uri))
        attention = word_attention(model, pixels, caption)
        words = [(text, _overlay(pixels.transpose(1, 2, 0), map)) for text, map in attention]
        rows.append({"name": uri, "caption": caption.text, "words": words})
    return render_page("explain.html", captions=rows)


def _overlay(pixels: np.ndarray, weights: np.ndarray) -> str:
    """Return a data URI of the image, uint8 [size, size, 3], bright where the weights [P, P] are
    largest."""
    scaled = weights / max(float(weights.max()), 1e-9)
    light = Image.fromarray((scaled * 255).astype(np.uint8)).resize(
        pixels.shape[1::-1], Image.Resampling.BICUBIC
    )
    strength = 0.25 + 0.75 * np.asarray(light, dtype=np.float32)[..., None] / 255
    encoded = io.BytesIO()
    Image.fromarray((pixels * strength).astype(np.uint8)).save(encoded, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
