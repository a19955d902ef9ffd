"""Calling the model: pictures of any kind in, `Caption`s out."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from model_lib import storage
from model_lib.config import DecodeConfig
from model_lib.decoding import decode
from model_lib.errors import UserError
from model_lib.model import Captioner
from model_lib.pictures import PictureError, open_picture, to_pixels
from model_lib.precision import autocast, autocast_dtype
from model_lib.tokens import decode_tokens


@dataclass(frozen=True)
class Caption:
    """What the model says of a picture."""

    text: str
    score: float
    """Mean log-probability of its tokens, in nats."""
    tokens: list[int]
    """Token ids; the last is end-of-text if the caption ended by itself."""


def caption_pixels(model: Captioner, pixels: np.ndarray | torch.Tensor, config: DecodeConfig) -> list[Caption]:
    """Caption a batch of the model's own pixels, RGB uint8 [B, 3, size, size].

    On a GPU the arithmetic runs in its fast 16-bit format, elsewhere in the weights' own.
    """
    fast = autocast_dtype("auto", model.device) if model.device.type == "cuda" else torch.float32
    with torch.inference_mode(), autocast(fast, model.device):
        features = model.encode(torch.as_tensor(pixels).to(model.device))
        decoded = decode(model, features, config)
    return [Caption(decode_tokens(model.tokenizer, row.tokens), row.score, row.tokens) for row in decoded]


def load_pixels(image: Any, size: int) -> np.ndarray:
    """Return the pixels, uint8 [3, size, size], of a path, URI, bytes or PIL image.

    Raises:
        UserError: the file is missing.
        PictureError: it is no picture that can be shown.
    """
    if isinstance(image, Image.Image):
        return to_pixels(image.convert("RGB"), size)
    content = image if isinstance(image, bytes) else storage.read_bytes(os.fspath(image))
    return to_pixels(open_picture(content), size)


def caption_each(
    model: Captioner, images: Iterable[Any], config: DecodeConfig, batch_size: int = 16
) -> Iterator[Caption | UserError | PictureError]:
    """Yield for each picture, in order, its caption or the error that it raised; the others get theirs."""

    def attempt(image: Any) -> np.ndarray | UserError | PictureError:
        try:
            return load_pixels(image, model.image_size)
        except (UserError, PictureError) as error:
            return error

    images = list(images)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), batch_size):
            loaded = list(pool.map(attempt, images[start : start + batch_size]))
            good = [pixels for pixels in loaded if isinstance(pixels, np.ndarray)]
            captions = iter(caption_pixels(model, np.stack(good), config) if good else [])
            for result in loaded:
                yield next(captions) if isinstance(result, np.ndarray) else result


def caption_images(model: Captioner, images: Iterable[Any], **options: Any) -> list[Caption]:
    """Return a caption for each picture.

    Args:
        model: the captioner.
        images: paths, URIs, bytes or PIL images.
        options: those of `DecodeConfig`, `num_beams=5` for example.

    Raises:
        UserError: a picture is missing or broken, or an option makes no sense.
    """
    captions = []
    for image, result in zip(images := list(images), caption_each(model, images, _config(options)), strict=True):
        if not isinstance(result, Caption):
            raise UserError(str(result) if isinstance(result, UserError) else f"{_name(image)}: {result}")
        captions.append(result)
    return captions


def generate_caption(model: Captioner, image: Any, **options: Any) -> str:
    """Return the caption of one picture: `generate_caption(model, "image.jpg", top_p=0.9)`.

    Arguments and errors are those of `caption_images`.
    """
    return caption_images(model, [image], **options)[0].text


def _config(options: dict[str, Any]) -> DecodeConfig:
    return DecodeConfig.from_options(**options)


def _name(image: Any) -> str:
    return str(image) if isinstance(image, str | os.PathLike) else f"picture given as {type(image).__name__}"
