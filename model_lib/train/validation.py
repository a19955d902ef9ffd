"""How good a model is in the middle of its training: loss and CIDEr on the first images of both
splits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model_lib.data.shards import BatchOrder, Manifest, SplitReader
from model_lib.errors import WorkError
from model_lib.model.captioner import Captioner
from model_lib.model.config import DecodeConfig
from model_lib.model.decoding import decode
from model_lib.model.precision import autocast
from model_lib.model.tokens import decode_tokens, encode_captions, pack_captions
from model_lib.progress import Progress
from model_lib.scores.cider import corpus_cider
from model_lib.train.config import TrainConfig
from model_lib.train.distributed import World, shared
from model_lib.train.loss import caption_loss


@dataclass(frozen=True, order=True)
class ValidationScore:
    """How good a model is: by CIDEr, and among equals by loss."""

    cider: float
    negative_loss: float


class Validator:
    """Measures a model on the first validation images, and on as many training images.

    Args:
        config: of training.
        manifest: the data set.
        size: side of the images in pixels.
        world: the processes that share the images.
    """

    def __init__(self, config: TrainConfig, manifest: Manifest, size: int, world: World) -> None:
        self.config, self.world = config, world
        known = manifest.counts["val"]
        limit = min(config.validation_images or known, known)
        self.slices = {
            split: SplitReader(manifest, split, size=size, workers=config.workers, limit=limit)
            for split in ("val", "train")
        }

    def measure(
        self, model: Captioner, encode: Callable[[Tensor], Tensor], dtype: torch.dtype, at_once: int
    ) -> dict[str, float]:
        """Return loss and CIDEr on both slices, the same in each process: far apart, much was
        learned by heart.

        Args:
            model: the captioner.
            encode: from pixels on the CPU, uint8 [B, 3, size, size], to visual tokens [B, S, E] on
                the model's device.
            dtype: in which the model computes.
            at_once: images that go through the model together.

        Raises:
            WorkError: the device has too little memory for so many.
        """
        try:
            return self._measure(model, encode, dtype, at_once)
        except torch.OutOfMemoryError:
            raise WorkError(
                f"{self.config.name}: out of memory in the validation with {at_once} images at "
                "once; give a smaller "
                "--micro_batch_size and start again: it goes on from its last checkpoint"
            ) from None

    def _measure(
        self, model: Captioner, encode: Callable[[Tensor], Tensor], dtype: torch.dtype, at_once: int
    ) -> dict[str, float]:
        orders = {
            split: shared(reader.in_order(at_once), self.world)
            for split, reader in self.slices.items()
        }
        scores: dict[str, float] = {}
        model.eval()
        images = sum(len(numbers) for order in orders.values() for numbers in order)
        with Progress(
            f"validate {self.config.name}", images, "images", shown=self.world.is_main
        ) as progress:
            for split, reader in self.slices.items():
                loss, cider = self._measure_on(
                    reader, orders[split], model, encode, dtype, progress
                )
                scores |= {
                    f"{split}_slice_CIDEr": cider,
                    "val_loss" if split == "val" else "train_slice_loss": loss,
                }
        return scores

    @torch.no_grad()
    def _measure_on(
        self,
        reader: SplitReader,
        order: BatchOrder,
        model: Captioner,
        encode: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        progress: Progress,
    ) -> tuple[float, float]:
        """Return the mean cross-entropy a token, and the CIDEr of greedy captions."""
        config, losses, count = self.config, 0.0, 0
        captions: dict[int, str] = {}
        references: dict[int, list[str]] = {}
        decoding = DecodeConfig(max_new_tokens=config.max_tokens)
        for batch in reader.batches(order):
            features = encode(torch.from_numpy(batch.pixels))
            ids = encode_captions(
                model.tokenizer, batch.captions, config.captions_per_image, config.max_tokens
            )
            rows = pack_captions(ids, model.tokenizer.eos_token_id)
            with autocast(dtype, features.device):
                losses += float(caption_loss(model, features, rows.to(features.device)))
                decoded = decode(model, features, decoding)
            count += rows.count
            for number, (one,), texts in zip(batch.numbers, decoded, batch.captions, strict=True):
                captions[number], references[number] = (
                    decode_tokens(model.tokenizer, one.tokens),
                    texts,
                )
            progress.advance(len(batch.numbers))

        def merge() -> tuple[float, float]:
            for _, _, others, of_others in parts:
                captions.update(others)
                references.update(of_others)
            total = sum(part[0] for part in parts) / sum(part[1] for part in parts)
            in_order = sorted(captions)
            return total, corpus_cider(
                {n: captions[n] for n in in_order}, {n: references[n] for n in in_order}
            )

        parts = self.world.gather((losses, count, captions, references))
        return self.world.run_on_main(merge)
