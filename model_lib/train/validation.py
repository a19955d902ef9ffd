"""Validation during training: loss and CIDEr on the first images of both splits."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from model_lib.data.captions import in_style
from model_lib.data.shards import BatchOrder, Manifest, SplitReader
from model_lib.errors import WorkError
from model_lib.io.pixels import Preprocessing
from model_lib.model.config import DecodeConfig
from model_lib.model.decoding import decode
from model_lib.model.precision import autocast
from model_lib.model.tokens import decode_tokens, encode_captions, pack_captions
from model_lib.progress import Progress
from model_lib.scores.cider import corpus_cider
from model_lib.train.config import ResolvedConfig
from model_lib.train.distributed import World
from model_lib.train.loss import caption_loss
from model_lib.train.step import TrainStep


@dataclass(frozen=True, order=True)
class ValidationScore:
    """How good a model is: by CIDEr, and among equals by loss."""

    cider: float
    negative_loss: float


class Validator:
    """Measures a model on the first validation images, and on as many training images.

    `preprocess` is the model's; the processes of `world` share the images.
    """

    def __init__(
        self, config: ResolvedConfig, manifest: Manifest, preprocess: Preprocessing, world: World
    ) -> None:
        self.config, self.world = config, world
        rows = manifest.counts["val"]
        limit = min(config.validation_images or rows, rows)
        workers = world.threads(config.workers)
        self.readers = {
            split: SplitReader(manifest, split, preprocess, workers=workers, limit=limit)
            for split in ("val", "train")
        }

    def measure(self, step: TrainStep, on_batch: Callable[[], None]) -> dict[str, float]:
        """Return loss and CIDEr of a step's model on both splits, the same in each process;
        `on_batch` is called before each batch.

        Raises:
            WorkError: the device has too little memory.
        """
        size = step.micro_batch_size or -(-self.config.batch_size // self.world.size)
        orders = {
            split: self.world.share(reader.in_order(size)) for split, reader in self.readers.items()
        }
        images = sum(len(numbers) for order in orders.values() for numbers in order)
        name = f"validate {self.config.name}"
        step.model.eval()
        try:
            with Progress(name, images, "images", shown=self.world.is_main) as progress:
                val_loss, val_cider = self._measure("val", orders["val"], step, on_batch, progress)
                loss, cider = self._measure("train", orders["train"], step, on_batch, progress)
        except torch.OutOfMemoryError:
            raise WorkError(
                f"{self.config.name}: out of memory in the validation with {size} images at once; "
                "give a smaller --micro_batch_size and start again: it goes on from its last "
                "checkpoint"
            ) from None
        return {
            "val_loss": val_loss,
            "val_slice_CIDEr": val_cider,
            "train_slice_loss": loss,
            "train_slice_CIDEr": cider,
        }

    @torch.no_grad()
    def _measure(
        self,
        split: str,
        order: BatchOrder,
        step: TrainStep,
        on_batch: Callable[[], None],
        progress: Progress,
    ) -> tuple[float, float]:
        """Return the mean cross-entropy a token, and the CIDEr of greedy captions."""
        config, tokenizer = self.config, step.model.tokenizer
        decoding = DecodeConfig(max_new_tokens=config.max_tokens)
        total, count = 0.0, 0
        captions: dict[int, tuple[str, list[str]]] = {}
        for batch in self.readers[split].batches(order):
            on_batch()
            features = step.loss.encode(torch.from_numpy(np.stack(batch.pixels)))
            style = config.caption_style
            ids = encode_captions(
                tokenizer,
                [[in_style(text, style) for text in texts] for texts in batch.captions],
                step.model.end_token,
                config.captions_per_image,
                config.max_tokens,
            )
            rows = pack_captions(ids, step.model.start_token)
            with autocast(step.dtype, features.device):
                total += float(caption_loss(step.model, features, rows.to(features.device)))
                decoded = decode(step.model, features, decoding)
            count += rows.count
            texts = [decode_tokens(tokenizer, caption.tokens) for (caption,) in decoded]
            pairs = zip(texts, batch.captions, strict=True)
            captions.update(zip(batch.numbers, pairs, strict=True))
            progress.advance(len(batch.numbers))
        totals, counts, shares = zip(*self.world.gather((total, count, captions)), strict=True)

        def cider() -> float:
            rows = sorted(row for share in shares for row in share.items())
            return corpus_cider(
                {number: text for number, (text, _) in rows},
                {number: references for number, (_, references) in rows},
            )

        return sum(totals) / sum(counts), self.world.run_on_main(cider)
