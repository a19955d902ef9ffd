"""From visual tokens to captions: greedy, sampling and beam search, with key/value caches.

A step feeds one new token a row; once half of the images are finished, the others continue without
them. Self-attention's keys and values are cached and never moved; cross-attention's are computed
once per image and shared by all its rows. Greedy and beam search follow transformers' `generate`
(`early_stopping=False`): a step looks at twice as many candidates as beams, those that end enter a
pool by their length-normalised score, and an image is done when no running beam can beat its pool.

Shapes: B images, N rows (beams or samples) per image, V vocabulary, T tokens so far, R rows in all.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model_lib.errors import UserError
from model_lib.model.config import DecodeConfig
from model_lib.model.decoder import CrossCache, Decoder, KVCache

TRIES = 8
"""Draws from all tokens before the nucleus is computed: at top_p 0.5 that is one row in 256."""
NEVER = -1e9
"""Score of what may not be chosen."""


class CaptionModel(Protocol):
    """The parts of a captioner that decoding uses."""

    config: Any
    decoder: Decoder
    head: nn.Linear


@dataclass(frozen=True)
class Decoded:
    """One decoded caption."""

    tokens: list[int]
    """Ids without the start; the last is end-of-text if the caption ended by itself."""
    score: float
    """Mean log-probability of the tokens under the model, in nats."""


@torch.inference_mode()
def decode(model: CaptionModel, features: Tensor, config: DecodeConfig) -> list[list[Decoded]]:
    """Caption each image of a batch.

    Args:
        model: the captioner.
        features: visual tokens [B, S, E] from `Captioner.encode`.
        config: how to decode.

    Returns:
        For each image its `num_captions` captions; those of a beam search with the best first.

    Raises:
        UserError: `max_new_tokens` is more than the model has positions.
    """
    visual = model.decoder.cross_cache(features)
    if config.num_beams > 1:
        return _beam_search(_DecodingState(model, visual, config.num_beams, config), config)
    return _greedy_or_sample(_DecodingState(model, visual, config.num_captions, config), config)


class _DecodingState:
    """The rows that are being decoded, and the decoder's cache of them."""

    def __init__(
        self, model: CaptionModel, visual: CrossCache, rows: int, config: DecodeConfig
    ) -> None:
        shape = model.config.decoder_config
        if config.max_new_tokens >= shape.n_positions:
            raise UserError(
                f"max_new_tokens: {config.max_new_tokens} is more than the model's "
                f"{shape.n_positions - 1} positions"
            )
        self.model = model
        self.visual = visual
        self.config = config
        self.end = shape.eos_token_id
        keys = visual[0][0]
        self.device = keys.device
        self.cache = KVCache(shape, len(keys), rows, config.max_new_tokens, like=keys)
        self.history = torch.full((len(keys), rows, 1), shape.bos_token_id, device=self.device)
        """Tokens so far with the start before them, int64 [B, N, 1 + T]."""

    @property
    def length(self) -> int:
        """Tokens so far, without the start."""
        return self.history.shape[2] - 1

    def logits(self) -> Tensor:
        """Feed the newest token of each row; return the logits of the next, float32 [B, N, V]."""
        hidden = self.model.decoder(self.history[:, :, -1:], self.visual, self.cache)
        return self.model.head(hidden[:, :, 0]).float()

    def mask_logits(self, logits: Tensor) -> Tensor:
        """Return the logits with -inf for the tokens that the options rule out."""
        size = self.config.no_repeat_ngram_size
        if 0 < size <= self.history.shape[2]:
            # A token may not complete an n-gram that has occurred: one whose first n - 1 tokens are
            # the row's last ones.
            ngrams = self.history.unfold(2, size, 1)
            last = self.history[:, :, self.history.shape[2] - size + 1 :]
            same = (ngrams[..., :-1] == last.unsqueeze(2)).all(-1).to(logits.dtype)
            counts = torch.zeros_like(logits).scatter_add(2, ngrams[..., -1], same)
            logits = logits.masked_fill(counts > 0, -torch.inf)
        if self.length < self.config.min_new_tokens:
            logits = logits.index_fill(2, torch.tensor([self.end], device=self.device), -torch.inf)
        return logits

    def append(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        """Add a token, int64 [B, N], to each row, or to the rows `parents`, int64 [B, N]."""
        if parents is not None:
            self.history = self.history.gather(1, parents.unsqueeze(-1).expand_as(self.history))
            self.cache.reorder(parents)
        self.history = torch.cat([self.history, tokens.unsqueeze(-1)], 2)

    def keep_batch(self, indices: Tensor) -> None:
        """Keep the images with these indices, int64 [B'], in this order."""
        self.visual = [(keys[indices], values[indices]) for keys, values in self.visual]
        self.history = self.history[indices]
        self.cache.keep_batch(indices)


def _unfinished(is_open: Tensor) -> Tensor | None:
    """Return the indices of open images, bool [B]; None if too few are finished to drop them."""
    indices = is_open.nonzero()[:, 0]
    return indices if 0 < len(indices) <= len(is_open) // 2 else None


def _length(tokens: list[int], end: int) -> int:
    """Return the number of tokens up to and including the end."""
    return tokens.index(end) + 1 if end in tokens else len(tokens)


def _greedy_or_sample(state: _DecodingState, config: DecodeConfig) -> list[list[Decoded]]:
    """Take the most likely token at each step, or draw one."""
    device = state.device
    generator = torch.Generator(device).manual_seed(config.seed)
    B, N = state.history.shape[:2]
    tokens = torch.full((B, N, config.max_new_tokens), state.end, device=device)
    scores = torch.zeros((B, N, config.max_new_tokens), device=device)
    ended = torch.zeros((B, N), dtype=torch.bool, device=device)
    images = torch.arange(B, device=device)  # not dropped yet
    while state.length < config.max_new_tokens and not ended.all():
        logits = state.logits()
        allowed = state.mask_logits(logits)
        if config.do_sample:
            choice = draw(allowed.flatten(0, 1), config, generator).view_as(ended)
        else:
            choice = allowed.argmax(-1)
        choice = choice.masked_fill(ended, state.end)
        tokens[images, :, state.length] = choice
        chosen = logits.gather(2, choice.unsqueeze(-1)).squeeze(-1)
        scores[images, :, state.length] = chosen - logits.logsumexp(-1)
        ended = ended | (choice == state.end)
        state.append(choice)
        if (open_images := _unfinished(~ended.all(1))) is not None:
            state.keep_batch(open_images)
            images, ended = images[open_images], ended[open_images]

    def caption(row: list[int], log_probs: list[float]) -> Decoded:
        length = _length(row, state.end)
        return Decoded(row[:length], sum(log_probs[:length]) / length)

    pairs = zip(tokens.tolist(), scores.tolist(), strict=True)
    return [list(map(caption, rows, log_probs)) for rows, log_probs in pairs]


def _beam_search(state: _DecodingState, config: DecodeConfig) -> list[list[Decoded]]:
    """Keep the N most likely beginnings of each image's caption."""
    device = state.device
    B, N = state.history.shape[:2]
    longest, penalty = config.max_new_tokens, config.length_penalty
    totals = torch.full((B, N), NEVER, device=device)
    totals[:, 0] = 0  # all beams start alike, so only the first may branch
    pool_scores = torch.full((B, N), NEVER, device=device)
    pool_tokens = torch.full((B, N, longest), state.end, device=device)
    is_open = torch.ones(B, dtype=torch.bool, device=device)
    images = torch.arange(B, device=device)  # not dropped yet
    among_best = torch.arange(2 * N, device=device) < N
    for length in range(1, longest + 1):
        # The best 2N of all N * V continuations are among the best 2N of each beam.
        logits = state.logits()
        best, vocabulary = state.mask_logits(logits).topk(min(2 * N, logits.shape[-1]))
        log_probs = best - logits.logsumexp(-1, keepdim=True)
        scores, flat = (log_probs + totals.unsqueeze(-1)).flatten(1).topk(2 * N)
        parents = flat // best.shape[2]
        tokens = vocabulary.flatten(1).gather(1, flat)
        ends = tokens == state.end
        is_last = length == longest

        # Those of the best N that end, or may not become longer, enter the pool of an open image.
        enters = (ends | is_last) & among_best & is_open.unsqueeze(1)
        normalised = (scores / length**penalty).masked_fill(~enters, NEVER)
        past = state.history[:, :, 1:].gather(1, parents.unsqueeze(-1).expand(-1, -1, length - 1))
        captions = torch.full((len(images), 2 * N, longest), state.end, device=device)
        captions[:, :, : length - 1] = past
        captions[:, :, length - 1] = tokens
        pool_scores[images], kept = torch.cat([pool_scores[images], normalised], 1).topk(N)
        kept = kept.unsqueeze(-1).expand(-1, -1, longest)
        pool_tokens[images] = torch.cat([pool_tokens[images], captions], 1).gather(1, kept)
        if is_last:
            break

        # The best N of the others are the next beams.
        totals, kept = scores.masked_fill(ends, NEVER).topk(N)
        state.append(tokens.gather(1, kept), parents.gather(1, kept))
        worst = pool_scores[images, -1]
        is_full = worst > NEVER / 10
        is_open = is_open & ~(is_full & (totals[:, 0] / length**penalty <= worst))
        if not is_open.any():
            break
        if (open_images := _unfinished(is_open)) is not None:
            state.keep_batch(open_images)
            images, totals, is_open = images[open_images], totals[open_images], is_open[open_images]

    def caption(row: list[int], score: float) -> Decoded:
        length = _length(row, state.end)
        return Decoded(row[:length], score * length**penalty / length)

    count = config.num_captions
    pairs = zip(pool_tokens[:, :count].tolist(), pool_scores[:, :count].tolist(), strict=True)
    return [list(map(caption, rows, scores)) for rows, scores in pairs]


def draw(logits: Tensor, config: DecodeConfig, generator: torch.Generator) -> Tensor:
    """Draw a token from each row of logits, float32 [R, V], with temperature, top_k and top_p.

    The nucleus is the smallest set of most likely tokens whose probabilities reach `top_p`
    (Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration"); tokens as likely as its
    last belong to it too. Sorting the vocabulary is slow. Instead, a token is drawn from all, and
    drawn again until it lies in the nucleus, which it does if the more likely ones sum to less than
    `top_p`. Where `TRIES` draws miss a small nucleus, the vocabulary is sorted.

    Returns:
        Token ids, int64 [R].
    """
    if config.temperature is not None:
        logits = logits / config.temperature
    if config.top_k is not None:
        least = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    tokens = _draw_from_all(probs, generator)
    if config.top_p is None:
        return tokens
    rows = torch.arange(len(logits), device=logits.device)  # whose token may be outside
    for draws in range(1, TRIES + 1):
        outside = ~_in_nucleus(probs, tokens[rows].unsqueeze(1), config.top_p)
        rows, probs = rows[outside], probs[outside]
        if not len(rows):
            break
        if draws == TRIES:
            probs = _nucleus(probs, config.top_p)
        tokens[rows] = _draw_from_all(probs, generator)
    return tokens


def _draw_from_all(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token from each row of probabilities [R, V], which need not sum to one; int64 [R]."""
    cumulative = probs.cumsum(-1)
    uniform = torch.rand((len(probs), 1), device=probs.device, generator=generator)
    # 1 - uniform is above 0: at 0, the first token would be drawn even if its probability is zero.
    tokens = torch.searchsorted(cumulative, (1 - uniform) * cumulative[:, -1:])[:, 0]
    return tokens.clamp_(max=probs.shape[-1] - 1)  # NaN from broken weights is beyond the last


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Return probabilities [R, V] with zeros outside of each row's nucleus."""
    ordered = probs.sort(-1, descending=True).values
    size = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True)
    return probs.masked_fill(probs < ordered.gather(-1, (size - 1).clamp_(min=0)), 0)


def _in_nucleus(probs: Tensor, tokens: Tensor, top_p: float) -> Tensor:
    """Return whether `tokens`, [R, 1], lie in the nucleus of probabilities [R, V]; bool [R]."""
    own = probs.gather(1, tokens)
    # Sums of floats: with masks, which are plainer, this takes eight times as long on a CPU.
    excess = (probs - own).relu_()
    more_likely = excess.sum(-1) + own[:, 0] * excess.sign_().sum(-1)
    return more_likely < top_p
