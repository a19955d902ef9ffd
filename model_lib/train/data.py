"""The training images: their order in an epoch, and the pixels of each batch."""

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import closing

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_lib.data.captions import in_style
from model_lib.data.shards import Manifest, SplitReader
from model_lib.io.pixels import Preprocessing
from model_lib.model.captioner import Captioner
from model_lib.model.tokens import PackedCaptions, encode_captions
from model_lib.train.config import ResolvedConfig
from model_lib.train.distributed import World

SMALLEST_CROP = 0.85
"""Side of the smallest crop, as a share of the shorter side."""
SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)
"""Words that are wrong of a mirrored image."""


class TrainData:
    """The training split in epochs of batches; the step alone decides what a batch holds."""

    def __init__(
        self, config: ResolvedConfig, manifest: Manifest, model: Captioner, world: World
    ) -> None:
        self.config, self.world, self.preprocess = config, world, model.preprocess
        self.reader = SplitReader(
            manifest, "train", self.preprocess, workers=world.threads(config.workers)
        )
        self.captions = [
            [in_style(text, config.caption_style) for text in texts]
            for texts in self.reader.captions()
        ]
        self.ids = encode_captions(
            model.tokenizer,
            self.captions,
            model.end_token,
            config.captions_per_image,
            config.max_tokens,
        )
        self.lengths = np.array([sum(map(len, image)) for image in self.ids])
        self.epoch_steps = -(-self.reader.rows // config.batch_size)

    def batches(
        self, step: int, pack: Callable[[list[int]], PackedCaptions | None]
    ) -> Generator[tuple[np.ndarray, Tensor, PackedCaptions | None]]:
        """Yield the batches from `step` to its epoch's end.

        Each is the numbers of all its images, int [N], and of this process's share the pixels,
        uint8 [B, 3, size, size], and what `pack` makes of their numbers, in memory from which the
        device copies by itself.
        """
        config = self.config
        epoch, skip = divmod(step, self.epoch_steps)
        order = self.reader.shuffled(
            config.batch_size, config.seed, epoch, self.lengths, config.sort_batches
        )[skip:]

        def view(image: Image.Image, number: int) -> np.ndarray:
            rng = np.random.default_rng([config.seed, epoch, number])
            return augment(image, self.preprocess, self.captions[number], rng)

        def finish(numbers: np.ndarray, array: np.ndarray) -> tuple[Tensor, PackedCaptions | None]:
            pixels, rows = torch.from_numpy(array), pack(numbers.tolist())
            if self.world.device.type == "cuda":
                pixels, rows = pixels.pin_memory(), rows and rows.pin_memory()
            return pixels, rows

        shares = [self.world.shard(batch) for batch in order]
        with closing(self.reader.pixels(shares, finish, view if config.augment else None)) as ready:
            for batch, (pixels, rows) in zip(order, ready, strict=True):
                yield batch, pixels, rows


def augment(
    image: Image.Image,
    preprocess: Preprocessing,
    captions: Iterable[str],
    rng: np.random.Generator,
) -> np.ndarray:
    """Return a large random crop of an image, mirrored half of the time.

    Its captions stay true: an image is not mirrored if one says left or right, and colours stay as
    they are.

    Args:
        image: RGB, any size.
        preprocess: the model's; one that stretches whole images stretches the crop.
        captions: of the image.
        rng: the same state gives the same view.

    Returns:
        uint8 [3, size, size].
    """
    share, shorter = rng.uniform(SMALLEST_CROP, 1), min(image.size)
    whole = image.size if preprocess.stretch else (shorter, shorter)
    width, height = share * whole[0], share * whole[1]
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    side, resample = preprocess.size, Image.Resampling(preprocess.resample)
    view = image.resize((side, side), resample, box=box)
    pixels = np.asarray(view).transpose(2, 0, 1)
    if rng.random() < 0.5 and not any(SIDED.search(caption) for caption in captions):
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)
