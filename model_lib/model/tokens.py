"""Captions as token ids, by the decoder's tokenizer or a small one trained on the captions.

A row of ids is the start token, the caption, the end token. The first starts the decoder; the last
is a target, so the model learns where captions end. GPT-2 has one token for both, end-of-text.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from model_lib.errors import UserError

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


PROBES = ("two large red crosses", "개가 풀밭에 있다", "草地上有一只狗")
"""Sentences of which a tokenizer must give back one as it was."""


def tokenizer_problem(tokenizer: Any) -> str | None:
    """Return why a tokenizer cannot be used; None if it can.

    Where files are missing, or the tokenizer is of another class than its configuration says,
    transformers makes up one that drops text without an error.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        return "holds no tokenizer that can be used (tokenizer.json, or vocab.json and merges.txt)"
    returned = [decode_tokens(tokenizer, ids) for ids in encode_texts(tokenizer, PROBES)]
    returned.append(returned[2].replace(" ", ""))  # WordPiece writes Chinese with spaces
    if any(text in PROBES for text in returned):
        return None
    return (
        f"its tokenizer ({type(tokenizer).__name__}) makes {returned[0]!r:.60} of {PROBES[0]!r}; "
        "give the right tokenizer_class in its tokenizer_config.json, often PreTrainedTokenizerFast"
    )


def control_tokens(tokenizer: Any, config: Any, source: str) -> tuple[int, int]:
    """Return the start and the end token of a decoder's captions.

    They are the configuration's. Where it leaves GPT-2's own numbers, beyond its vocabulary, they
    are the tokenizer's, with which BERT's [CLS] and [SEP] are meant, too.

    Args:
        tokenizer: the decoder's.
        config: the decoder's, with vocab_size, bos_token_id and eos_token_id.
        source: of the tokenizer, for messages.

    Raises:
        UserError: tokenizer and configuration disagree, or there is no end token.
    """

    def within(token: int | None) -> int | None:
        return token if token is not None and 0 <= token < config.vocab_size else None

    text_ids = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    if max(text_ids) >= config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer's ids go up to {max(text_ids)}, and the decoder has "
            f"{config.vocab_size} embeddings; this tokenizer is not the decoder's"
        )
    own = within(tokenizer.eos_token_id)
    end = within(config.eos_token_id)
    if own is not None and end is not None and own != end:
        raise UserError(
            f"{source}: the configuration's end-of-text token is {end}, and the tokenizer's is "
            f"{own}; this tokenizer is not the decoder's"
        )
    candidates = [end, own, within(tokenizer.sep_token_id)]
    end = next((token for token in candidates if token is not None), None)
    if end is None:
        raise UserError(f"{source}: neither configuration nor tokenizer has an end-of-text token")
    starts = [config.bos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, end]
    start = next(token for token in map(within, starts) if token is not None)
    return start, end


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts, without control tokens, also where a text spells one."""
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    control = set(tokenizer.all_special_ids)
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        control.discard(tokenizer.unk_token_id)
    return [[token for token in row if token not in control] for row in rows]


def encode_captions(
    tokenizer: Any, captions: Sequence[Sequence[str]], end: int, per_image: int, max_tokens: int
) -> list[list[list[int]]]:
    """Return the ids of each image's captions, each with the end token at its end.

    Args:
        tokenizer: the model's.
        captions: each image's captions.
        end: the model's end token.
        per_image: most captions of an image.
        max_tokens: most tokens of a caption; one that is cut has no end token.
    """

    def terminate(ids: list[int]) -> list[int]:
        return ids[:max_tokens] if len(ids) > max_tokens else [*ids, end]

    chosen = [texts[:per_image] for texts in captions]
    encoded = iter(encode_texts(tokenizer, [text for texts in chosen for text in texts]))
    return [[terminate(next(encoded)) for _ in texts] for texts in chosen]


@dataclass(frozen=True)
class PackedCaptions:
    """A batch for the decoder: each image's captions side by side in one padded row."""

    tokens: Tensor
    """The decoder's input, int64 [B, T]; each caption starts with the start token."""
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

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return what each token sees, its own caption up to itself: [B, 1, T, T] of `dtype`, 0
        where it sees and -inf elsewhere."""
        visible = (self.caption.unsqueeze(2) == self.caption.unsqueeze(1)).tril()
        mask = torch.zeros_like(visible, dtype=dtype)
        return mask.masked_fill_(~visible, -torch.inf).unsqueeze(1)

    def to(self, device: torch.device) -> Self:
        """Return the batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return the batch in memory from which a GPU copies by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if name != "count"
        }
        return replace(self, **tensors)


def pack_captions(
    captions: Sequence[Sequence[Sequence[int]]], start: int, multiple: int = 8
) -> PackedCaptions:
    """Lay each image's captions side by side into one row.

    Args:
        captions: for each image its captions' ids, as `encode_captions` returns them.
        start: the model's start token.
        multiple: of which the rows' length is one, as matrix units prefer.
    """
    length = max(sum(len(ids) for ids in image) for image in captions)
    shape = len(captions), -(-length // multiple) * multiple
    tokens = np.full(shape, start)
    targets = np.full(shape, IGNORED)
    positions = np.zeros(shape, np.int64)
    caption = np.full(shape, -1)
    for row, image in enumerate(captions):
        offset = 0
        for number, ids in enumerate(image):
            part = slice(offset, offset + len(ids))
            tokens[row, part] = [start, *ids[:-1]]
            targets[row, part] = ids
            positions[row, part] = range(len(ids))
            caption[row, part] = number
            offset += len(ids)
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
