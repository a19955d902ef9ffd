"""Captions as token ids: GPT-2's byte-level BPE, or a small one that is trained on the captions.

A row of ids is end-of-text, the caption, end-of-text. The first starts the decoder; the last is a
target, so the model learns where captions end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100
"""Label of a position without a target."""


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE like GPT-2's on `captions`; end-of-text gets id 0.

    Args:
        captions: the training captions.
        vocab_size: upper bound of the vocabulary, at least 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    return GPT2Tokenizer(tokenizer_object=bpe)


def encode_captions(
    tokenizer: Any, captions: Sequence[Sequence[str]], per_image: int, max_tokens: int
) -> list[list[list[int]]]:
    """Return the ids of each image's captions, each with end-of-text at its end.

    Args:
        tokenizer: the model's.
        captions: each image's captions.
        per_image: most captions of an image.
        max_tokens: most tokens of a caption; one that is cut has no end-of-text.
    """

    def terminate(ids: list[int]) -> list[int]:
        return ids[:max_tokens] if len(ids) > max_tokens else [*ids, tokenizer.eos_token_id]

    chosen = [texts[:per_image] for texts in captions]
    flat = [text for texts in chosen for text in texts]
    encoded = iter(tokenizer(flat)["input_ids"] if flat else [])
    return [[terminate(next(encoded)) for _ in texts] for texts in chosen]


@dataclass(frozen=True)
class PackedCaptions:
    """A batch for the decoder: each image's captions side by side in one padded row."""

    tokens: Tensor
    """The decoder's input, int64 [B, T]; each caption starts with end-of-text."""
    targets: Tensor
    """The next tokens, int64 [B, T]; `IGNORED` in the padding."""
    positions: Tensor
    """Position of each token in its caption, int64 [B, T]."""
    caption: Tensor
    """Index of the caption, among its row's, to which a token belongs, int64 [B, T]; -1 in the
    padding."""
    target_indices: Tensor
    """Indices of the tokens with a target in the flattened batch, int64 [count]."""
    count: int
    """Tokens with a target."""

    def mask(self) -> Tensor:
        """Return what each token sees, its own caption up to itself: bool [B, 1, T, T]."""
        same = self.caption.unsqueeze(2) == self.caption.unsqueeze(1)
        return same.tril().unsqueeze(1)

    def to(self, device: torch.device) -> Self:
        """Return the batch on another device."""
        tensors = {name: value for name, value in vars(self).items() if name != "count"}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def pack_captions(
    captions: Sequence[Sequence[Sequence[int]]], end: int, multiple: int = 8
) -> PackedCaptions:
    """Lay each image's captions side by side into one row.

    Args:
        captions: for each image its captions' ids, as `encode_captions` returns them.
        end: the end-of-text token.
        multiple: of which the rows' length is one, as matrix units prefer.
    """
    length = max(sum(len(ids) for ids in image) for image in captions)
    shape = len(captions), -(-length // multiple) * multiple
    tokens = np.full(shape, end)
    targets = np.full(shape, IGNORED)
    positions = np.zeros(shape, np.int64)
    caption = np.full(shape, -1)
    for row, image in enumerate(captions):
        start = 0
        for number, ids in enumerate(image):
            part = slice(start, start + len(ids))
            tokens[row, part] = [end, *ids[:-1]]
            targets[row, part] = ids
            positions[row, part] = range(len(ids))
            caption[row, part] = number
            start += len(ids)
    indices = np.flatnonzero(targets != IGNORED)
    return PackedCaptions(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        caption=torch.from_numpy(caption),
        target_indices=torch.from_numpy(indices),
        count=len(indices),
    )


def decode_tokens(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of `ids`, without special tokens and surplus spaces."""
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
