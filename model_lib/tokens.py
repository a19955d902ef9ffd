"""Captions as token ids: GPT-2's byte-level BPE, or a small one of the same kind trained on the captions.

A row of ids is end-of-text, the caption, end-of-text: the first starts the decoder, the last is learned, so that
captions stop by themselves.
"""

from collections.abc import Iterable
from typing import Any

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
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    return GPT2Tokenizer(tokenizer_object=bpe)


def encode_captions(tokenizer: Any, captions: list[list[str]], per_picture: int, max_tokens: int) -> Tensor:
    """Return padded token rows and their targets.

    Args:
        tokenizer: the model's.
        captions: each picture's captions.
        per_picture: captions of a picture to use at most.
        max_tokens: tokens of a caption to keep at most; a cut caption has no end-of-text target.

    Returns:
        int64 [2, B, N, T]: the decoder's input and, at each position, the next token or `IGNORED`.
    """
    end = tokenizer.eos_token_id
    encoded = iter(tokenizer([text for texts in captions for text in texts[:per_picture]])["input_ids"])
    rows = [[_ended(next(encoded), end, max_tokens) for _ in texts[:per_picture]] for texts in captions]
    N = max(len(picture) for picture in rows)
    T = max(len(ids) for picture in rows for ids in picture)
    out = np.full((2, len(rows), N, T), end)
    out[1] = IGNORED
    for b, picture in enumerate(rows):
        for n, ids in enumerate(picture):
            out[0, b, n, 1 : len(ids)] = ids[:-1]
            out[1, b, n, : len(ids)] = ids
    return torch.from_numpy(out)


def _ended(ids: list[int], end: int, max_tokens: int) -> list[int]:
    return ids[:max_tokens] if len(ids) > max_tokens else [*ids, end]


def decode_tokens(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of `ids`, without special tokens and surplus spaces."""
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
