"""Captions as token ids: GPT-2's byte-level BPE, or a small one of the same kind trained on the
captions.

A row of ids is end-of-text, the caption, end-of-text: the first starts the decoder, the last is
learned, so that captions stop by themselves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
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
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    return GPT2Tokenizer(tokenizer_object=bpe)


def encode_captions(
    tokenizer: Any, captions: Sequence[Sequence[str]], per_image: int, max_tokens: int
) -> list[list[list[int]]]:
    """Return each image's captions as ids to learn: at most `per_image`, each with end-of-text at
    its end.

    Args:
        tokenizer: the model's.
        captions: each image's captions.
        per_image: captions of an image to use at most.
        max_tokens: tokens of a caption to keep at most; a cut caption has no end-of-text.
    """
    end = tokenizer.eos_token_id
    chosen = [texts[:per_image] for texts in captions]
    flat = [text for texts in chosen for text in texts]
    encoded = iter(tokenizer(flat)["input_ids"] if flat else [])
    return [[_ended(next(encoded), end, max_tokens) for _ in texts] for texts in chosen]


def _ended(ids: list[int], end: int, max_tokens: int) -> list[int]:
    return ids[:max_tokens] if len(ids) > max_tokens else [*ids, end]


@dataclass(frozen=True)
class PackedCaptions:
    """A batch for the decoder: the captions of each image side by side in one row, padded to the
    longest row."""

    tokens: Tensor
    """The decoder's input, int64 [B, T]; each caption starts with end-of-text."""
    targets: Tensor
    """The next tokens, int64 [B, T]; `IGNORED` in the padding."""
    positions: Tensor
    """Place of each token in its caption, int64 [B, T]."""
    caption: Tensor
    """Which of the row's captions a token belongs to, int64 [B, T]; -1 in the padding."""
    places: Tensor
    """Of the tokens with a target in the flattened batch, int64 [count]."""
    count: int
    """Tokens with a target."""

    def mask(self) -> Tensor:
        """Return what each token sees, the earlier tokens of its own caption and itself: bool [B,
        1, T, T]."""
        same = self.caption.unsqueeze(2) == self.caption.unsqueeze(1)
        return same.tril().unsqueeze(1)

    def to(self, device: torch.device) -> Self:
        """Return the batch on another device."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if f.name != "count"
        }
        return replace(self, **moved)


def pack_captions(
    captions: Sequence[Sequence[Sequence[int]]], end: int, multiple: int = 8
) -> PackedCaptions:
    """Lay each image's captions, ids as `encode_captions` returns them, into one row.

    Args:
        captions: for each image its captions' ids.
        end: the end-of-text token.
        multiple: rows are padded to a multiple of so many tokens, as matrix units like them.
    """
    length = max(sum(len(ids) for ids in image) for image in captions)
    length = -(-length // multiple) * multiple
    values = np.zeros((4, len(captions), length), np.int64)
    values[0], values[1], values[3] = end, IGNORED, -1
    for row, image in enumerate(captions):
        start = 0
        for number, ids in enumerate(image):
            part = slice(start, start + len(ids))
            values[0, row, part] = [end, *ids[:-1]]
            values[1, row, part] = ids
            values[2, row, part] = range(len(ids))
            values[3, row, part] = number
            start += len(ids)
    tokens, targets, positions, caption = torch.from_numpy(values)
    places = torch.from_numpy(np.flatnonzero(values[1] != IGNORED))
    return PackedCaptions(tokens, targets, positions, caption, places, len(places))


def decode_tokens(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of `ids`, without special tokens and surplus spaces."""
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
