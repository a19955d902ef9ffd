"""Calling the model: images of any kind in, `Caption`s out."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from model_lib.errors import UserError, WorkError
from model_lib.io import storage
from model_lib.io.archives import SCHEMES, archive_kind, read_image
from model_lib.io.folders import left_out_line, list_images
from model_lib.io.images import EXTENSIONS, ImageError, as_rgb, decode_image
from model_lib.io.prefetch import prefetch_map
from model_lib.model.config import DecodeConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caption:
    """A caption of an image."""

    text: str
    score: float
    """Mean log-probability of its tokens, in nats."""
    tokens: list[int]
    """Token ids; the last is end-of-text if the caption ended by itself."""


Problem = UserError | WorkError | ImageError
"""Why an image has no caption."""


class ImageCaptioner(Protocol):
    """What captions images: ours, or another one of transformers (`model.rivals`)."""

    training_record: dict[str, Any]

    @property
    def preprocess(self) -> Callable[[Image.Image], np.ndarray]:
        """From an RGB image to what `caption_pixels` takes; called by several threads."""

    def caption_pixels(
        self, pixels: Sequence[np.ndarray], config: DecodeConfig
    ) -> list[list[Caption]]:
        """Return each image's `num_captions` captions."""

    def caption_batches(
        self, batches: Iterable[Sequence[np.ndarray]], config: DecodeConfig
    ) -> Iterator[list[list[Caption]]]:
        """Yield each batch's captions as `caption_pixels` returns them; a batch may have no image.

        Batches are taken as they are needed, which may be some before a batch's captions.
        """

    def has_ended(self, caption: Caption) -> bool:
        """Return whether a caption ended by itself, not at the longest length."""


def load_image(image: Any, redirects: bool = True) -> Image.Image:
    """Return an image, upright and RGB.

    Args:
        image: a path, URI, http(s) address, bytes, PIL image, or an array or tensor: uint8,
            [height, width] grey, [height, width, 3] or [3, height, width] RGB.
        redirects: whether a web server may send us to another address.

    Raises:
        UserError: the file is missing, or an array has another type or shape.
        WorkError: its store or server failed.
        ImageError: it is no image that can be shown.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        image = _from_array(np.asarray(image.cpu() if isinstance(image, torch.Tensor) else image))
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if not isinstance(image, str | bytes | os.PathLike):
        raise UserError(f"{_name(image)}: expected a path, URI, bytes, PIL image or array")
    if not isinstance(image, bytes):
        image = read_image(os.fspath(image), redirects=redirects)
    return decode_image(image)


def _from_array(values: np.ndarray) -> Image.Image:
    if values.ndim == 3 and values.shape[0] == 3 and values.shape[2] != 3:
        values = values.transpose(1, 2, 0)
    has_right_shape = values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3)
    if values.dtype != np.uint8 or not has_right_shape:
        raise UserError(
            f"image given as {values.dtype} {list(values.shape)}: expected uint8 [height, width], "
            "[height, width, 3] or [3, height, width]"
        )
    return Image.fromarray(np.ascontiguousarray(values))


def load_pixels(model: ImageCaptioner, image: Any, redirects: bool = True) -> np.ndarray | Problem:
    """Return what `caption_pixels` takes of an image, see `load_image`, or the error for which it
    has none; a `Problem` is returned as it is."""
    if isinstance(image, Problem):
        return image
    try:
        return model.preprocess(load_image(image, redirects))
    except (UserError, WorkError, ImageError) as error:
        return error


def caption_each_batch(
    model: ImageCaptioner, batches: Iterable[Sequence[np.ndarray]], config: DecodeConfig
) -> Iterator[list[list[Caption]]]:
    """Yield each batch's captions, one batch after another: `caption_batches` where nothing is
    gained by working ahead."""
    return (model.caption_pixels(batch, config) if len(batch) else [] for batch in batches)


def caption_each(
    model: ImageCaptioner,
    images: Iterable[Any],
    config: DecodeConfig,
    batch_size: int = 16,
    redirects: bool = True,
) -> Iterator[list[Caption] | Problem]:
    """Yield for each image, in order, its captions, or the error for which it has none.

    Images are taken from `images` as they are needed, and read and decoded while the model works. A
    `Problem` among them, as `find_images` yields it, is yielded again.
    """
    load = partial(load_pixels, model, redirects=redirects)
    with closing(prefetch_map(load, images, depth=2 * batch_size)) as loaded:
        batches, ahead = tee(iter(lambda: list(islice(loaded, batch_size)), []))
        pixels = ([result for result in batch if isinstance(result, np.ndarray)] for batch in ahead)
        captioned = model.caption_batches(pixels, config)
        for captions, batch in zip(map(iter, captioned), batches, strict=True):
            for result in batch:
                yield next(captions) if isinstance(result, np.ndarray) else result


def find_images(names: Iterable[str], lines: Iterable[str]) -> Iterator[str | Problem]:
    """Yield the images that `names` stand for, in order; for a name without images, the error.

    Args:
        names: paths, URIs and addresses, which stand for themselves; folders and archives, for the
            images in them; patterns with * or ?, for the files that match; "-", for `lines`.
        lines: more paths, URIs and addresses, one a line.
    """
    for name in names:
        if name == "-":
            yield from (line.strip() for line in lines if line.strip())
            continue
        if name.startswith(("http://", "https://", *SCHEMES)):
            yield name
            continue
        try:
            yield from _expand(name)
        except (UserError, WorkError) as error:
            yield error


def _expand(name: str) -> list[str]:
    """Return the images of a folder, archive or pattern, or the name itself; `UserError` if none.

    What is left out of a folder is logged.
    """
    fs, path = storage.filesystem(name)
    if storage.is_folder(name) or _is_archive(name):
        images = list_images(name)
        left_out = left_out_line(images.left_out)
        if not images.files:
            raise UserError(f"{name}: has no images in it{left_out and f'; {left_out}'}")
        if left_out:
            log.warning("%s: %s", name, left_out)
        uris = [file.uri for file in images.files]
    elif any(sign in name for sign in "*?") and not storage.exists(name):
        paths = sorted(storage.access(name, lambda: fs.glob(path), doing="listed"))
        if not paths:
            raise UserError(f"{name}: matches nothing")
        uris = paths if storage.is_local(name) else [str(fs.unstrip_protocol(p)) for p in paths]
    else:
        return [name]
    is_plain = "://" not in uris[0] and not os.path.isabs(name)
    return [os.path.relpath(uri) for uri in uris] if is_plain else uris


def _is_archive(name: str) -> bool:
    has_ending = PurePosixPath(name).suffix.lower() in EXTENSIONS
    return not has_ending and storage.exists(name) and archive_kind(name) is not None


def caption_images(model: ImageCaptioner, images: Iterable[Any], **options: Any) -> list[Caption]:
    """Return `num_captions` captions for each image, those of an image side by side.

    Args:
        model: the captioner.
        images: see `load_image`; or one path.
        options: those of `DecodeConfig`, `num_beams=5` for example.

    Raises:
        UserError: an image is missing or broken, or an option makes no sense.
        WorkError: an image's store or server failed.
    """
    captions: list[Caption] = []
    config = DecodeConfig.from_options(**options)
    images = [images] if isinstance(images, str | bytes | os.PathLike) else list(images)
    for image, result in zip(images, caption_each(model, images, config), strict=True):
        if isinstance(result, ImageError):
            raise UserError(f"{_name(image)}: {result}")
        if isinstance(result, UserError | WorkError):
            raise result
        captions += result
    return captions


def generate_caption(model: ImageCaptioner, image: Any, **options: Any) -> str:
    """Return the caption of one image: `generate_caption(model, "image.jpg", num_beams=5)`.

    Arguments and errors are those of `caption_images`.
    """
    return caption_images(model, [image], **options)[0].text


def _name(image: Any) -> str:
    is_path = isinstance(image, str | os.PathLike)
    return str(image) if is_path else f"image given as {type(image).__name__}"
