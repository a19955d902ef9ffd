"""From visual tokens to captions: greedy, sampling and beam search, with key/value caches.

A step feeds one new token a row; once half of the images are finished, the others go on without
them. Self-attention's keys and values are cached and never moved; cross-attention's are computed
once per image and shared by all its rows. Greedy and beam search follow transformers' `generate`
(`early_stopping=False`): twice as many candidates as beams are looked at, those that end enter a
pool by their length-normalised score, and an image is done when no running beam can beat its pool.

Shapes: B images, N rows (beams or samples) per image, V vocabulary, T tokens so far.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model_lib.errors import UserError
from model_lib.model.captioner import Captioner
from model_lib.model.config import DecodeConfig
from model_lib.model.decoder import CrossCache, KVCache

TRIES = 8
"""Draws from all tokens before the nucleus is sorted out: at top_p 0.5 one row in 256 comes to
it."""


@dataclass(frozen=True)
class Decoded:
    """One decoded caption."""

    tokens: list[int]
    """Ids without the start; the last is end-of-text if the caption ended by itself."""
    score: float
    """Mean log-probability of the tokens under the model, in nats."""


@torch.inference_mode()
def decode(model: Captioner, features: Tensor, config: DecodeConfig) -> list[list[Decoded]]:
    """Caption each image of a batch.

    Args:
        model: the captioner.
        features: visual tokens [B, S, E] from `Captioner.encode`.
        config: how to decode.

    Returns:
        For each image its `num_captions` captions, of a beam search the best first.

    Raises:
        UserError: more tokens are asked for than the model has positions.
    """
    visual = model.cross_cache(features)
    if config.num_beams > 1:
        return _beam_search(_DecodingState(model, visual, config.num_beams, config), config)
    return _greedy_or_sample(_DecodingState(model, visual, config.num_captions, config), config)


class _DecodingState:
    """The rows being decoded: feeds their newest tokens to the decoder, and knows what may not come
    next."""

    def __init__(
        self, model: Captioner, visual: CrossCache, rows: int, config: DecodeConfig
    ) -> None:
        decoder = model.config.decoder_config
        if config.max_new_tokens >= decoder.n_positions:
            raise UserError(
                f"max_new_tokens: {config.max_new_tokens} is more than the model's "
                f"{decoder.n_positions - 1} positions"
            )
        self.model, self.visual, self.config = model, visual, config
        self.end = (
            model.tokenizer.eos_token_id if model.tokenizer is not None else decoder.eos_token_id
        )
        batch, self.device = visual[0][0].shape[0], visual[0][0].device
        self.cache = KVCache(decoder, batch, rows, config.max_new_tokens, like=visual[0][0])
        self.history = torch.full((batch, rows, 1), self.end, device=self.device)
        """Tokens so far with the start before them, int64 [B, N, 1 + T]."""

    @property
    def length(self) -> int:
        """Tokens so far, without the start."""
        return self.history.shape[2] - 1

    def logits(self) -> Tensor:
        """Feed the newest token of each row; return what the model says of the next, float32 [B, N,
        V]."""
        hidden = self.model.hidden(self.history[:, :, -1:], self.visual, self.cache)
        return self.model.head(hidden[:, :, 0]).float()

    def mask_logits(self, logits: Tensor) -> Tensor:
        """Return the logits with those at -inf that the options rule out."""
        size = self.config.no_repeat_ngram_size
        if 0 < size <= self.history.shape[2]:
            # A token may not end an n-gram that is there already: each window that begins as the
            # last n - 1 tokens.
            windows = self.history.unfold(2, size, 1)
            last = self.history[:, :, self.history.shape[2] - size + 1 :]
            same = (windows[..., :-1] == last.unsqueeze(2)).all(-1)
            counts = torch.zeros_like(logits).scatter_add(
                2, windows[..., -1], same.to(logits.dtype)
            )
            logits = logits.masked_fill(counts > 0, -torch.inf)
        if self.length < self.config.min_new_tokens:
            logits = logits.index_fill(2, torch.tensor([self.end], device=self.device), -torch.inf)
        return logits

    def append(self, tokens: Tensor, parents: Tensor | None = None) -> None:
        """Add a token to each row, int64 [B, N]; with `parents`, to the row of its image that it
        names."""
        if parents is not None:
            self.history = self.history.gather(
                1, parents.unsqueeze(-1).expand(-1, -1, self.history.shape[2])
            )
            self.cache.reorder(parents)
        self.history = torch.cat([self.history, tokens.unsqueeze(-1)], 2)

    def keep_batch(self, images: Tensor) -> None:
        """Go on with some of the images, int64 [B'], in this order."""
        self.visual = [(keys[images], values[images]) for keys, values in self.visual]
        self.history = self.history[images]
        self.cache.keep_batch(images)


def _left(open_: Tensor) -> Tensor | None:
    """Return the places of the open images, bool [B], if enough are finished to go on without;
    None: all go on."""
    left = open_.nonzero()[:, 0]
    return left if 0 < len(left) <= len(open_) // 2 else None


def _greedy_or_sample(rows: _DecodingState, config: DecodeConfig) -> list[list[Decoded]]:
    """Take the most likely token at each step, or draw one."""
    generator = torch.Generator(rows.device).manual_seed(config.seed)
    B, N = rows.history.shape[:2]
    tokens = torch.full((B, N, config.max_new_tokens), rows.end, device=rows.device)
    scores = torch.zeros((B, N, config.max_new_tokens), device=rows.device)
    images = torch.arange(B, device=rows.device)  # that are still being captioned
    ended = torch.zeros((B, N), dtype=torch.bool, device=rows.device)
    while rows.length < config.max_new_tokens and not ended.all():
        logits = rows.logits()
        allowed = rows.mask_logits(logits)
        choice = (
            draw(allowed.flatten(0, 1), config, generator).view_as(ended)
            if config.samples
            else allowed.argmax(-1)
        )
        choice = choice.masked_fill(ended, rows.end)
        tokens[images, :, rows.length] = choice
        scores[images, :, rows.length] = logits.gather(2, choice.unsqueeze(-1)).squeeze(
            -1
        ) - logits.logsumexp(-1)
        ended = ended | (choice == rows.end)
        rows.append(choice)
        left = _left(~ended.all(1))
        if left is not None:
            rows.keep_batch(left)
            images, ended = images[left], ended[left]
    decoded = []
    for image, values in zip(tokens.tolist(), scores.tolist(), strict=True):
        decoded.append([_until_end(*pair, rows.end) for pair in zip(image, values, strict=True)])
    return decoded


def _until_end(tokens: list[int], scores: list[float], end: int) -> Decoded:
    length = tokens.index(end) + 1 if end in tokens else len(tokens)
    return Decoded(tokens[:length], sum(scores[:length]) / length)


def draw(logits: Tensor, config: DecodeConfig, generator: torch.Generator) -> Tensor:
    """Draw a token from each row of logits, float32 [R, V]: tempered, from the top k, from the
    nucleus; int64 [R].

    The nucleus is the smallest set of most likely tokens whose probabilities reach `top_p`
    (Holtzman et al., 2020, "The Curious Case of Neural Text Degeneration"); tokens as likely as its
    last belong to it too. Instead of sorting the vocabulary, a token is drawn from all and drawn
    again until it lies in the nucleus: a token does if those more likely than it sum to less than
    `top_p`. Where `TRIES` draws miss a small nucleus, the vocabulary is sorted.
    """
    if config.temperature is not None:
        logits = logits / config.temperature
    if config.top_k is not None:
        least = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    drawn = _draw_from_all(probs, generator)
    if config.top_p is None:
        return drawn
    left = torch.arange(len(logits), device=logits.device)
    for draws in range(1, TRIES + 1):
        outside = ~_in_nucleus(probs, drawn[left].unsqueeze(1), config.top_p)
        left, probs = left[outside], probs[outside]
        if not len(left):
            break
        drawn[left] = _draw_from_all(
            probs if draws < TRIES else _nucleus(probs, config.top_p), generator
        )
    return drawn


def _draw_from_all(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token from each row of probabilities [R, V], which need not sum to one; int64 [R]."""
    cumulative = probs.cumsum(-1)
    chance = torch.rand((len(probs), 1), device=probs.device, generator=generator)
    # In (0, total]: a place before the first or between two equal sums would be a token of
    # probability zero.
    token = torch.searchsorted(cumulative, (1 - chance) * cumulative[:, -1:])[:, 0]
    return token.clamp_(
        max=probs.shape[-1] - 1
    )  # it is beyond where a model's weights are no numbers


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Return probabilities [R, V] with zeros outside of each row's nucleus."""
    ordered = probs.sort(-1, descending=True).values
    size = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True)
    return probs.masked_fill(probs < ordered.gather(-1, (size - 1).clamp_(min=0)), 0)


def _in_nucleus(probs: Tensor, token: Tensor, top_p: float) -> Tensor:
    """Return for each row of probabilities [R, V] whether `token`, [R, 1], lies in its nucleus;
    bool [R]."""
    own = probs.gather(1, token)
    # Sums of floats: the masks that one would write take eight times as long on a CPU.
    excess = (probs - own).relu_()
    more_likely = excess.sum(-1) + own[:, 0] * excess.sign_().sum(-1)
    return more_likely < top_p


def _beam_search(rows: _DecodingState, config: DecodeConfig) -> list[list[Decoded]]:
    N, longest, end = config.num_beams, config.max_new_tokens, rows.end
    B, device = rows.history.shape[0], rows.device
    running = torch.full((B, N), -1e9, device=device)
    running[:, 0] = 0  # all beams start alike, so only the first may branch
    pool_scores = torch.full((B, N), -1e9, device=device)
    pool_tokens = torch.full((B, N, longest), end, device=device)
    pool_lengths = torch.zeros((B, N), dtype=torch.int64, device=device)
    open_ = torch.ones(B, dtype=torch.bool, device=device)
    images = list(range(B))  # that are still being captioned
    decoded: dict[int, list[Decoded]] = {}

    def finish(places: list[int]) -> None:
        """Take what the pool holds of these as their captions."""
        for place in places:
            pooled = (pool[place].tolist() for pool in (pool_tokens, pool_lengths, pool_scores))
            best = list(zip(*pooled, strict=True))[: config.num_captions]
            decoded[images[place]] = [
                Decoded(t[:n], score * n**config.length_penalty / n) for t, n, score in best
            ]

    for length in range(1, longest + 1):
        # The best 2N of all N * V continuations are among the best 2N of each beam.
        logits = rows.logits()
        beam_scores, tokens = rows.mask_logits(logits).topk(min(2 * N, logits.shape[-1]))
        totals = beam_scores - logits.logsumexp(-1, keepdim=True) + running.unsqueeze(-1)
        scores, flat = totals.flatten(1).topk(2 * N)
        parents, choices = flat // tokens.shape[2], tokens.flatten(1).gather(1, flat)
        past = rows.history[:, :, 1:].gather(1, parents.unsqueeze(-1).expand(-1, -1, length - 1))
        ends = choices == end
        last = length == longest

        # Those that end (or run out of length) enter the pool, if they are among the first N and
        # the image is open.
        among_first = torch.arange(2 * N, device=device) < N
        enters = (ends | last) & among_first & open_.unsqueeze(1)
        normalised = (scores / length**config.length_penalty).masked_fill(~enters, -1e9)
        padded = torch.full((len(images), 2 * N, longest), end, device=device)
        padded[:, :, : length - 1], padded[:, :, length - 1] = past, choices
        pool_scores, kept = torch.cat([pool_scores, normalised], 1).topk(N)
        pool_tokens = torch.cat([pool_tokens, padded], 1).gather(
            1, kept.unsqueeze(-1).expand(-1, -1, longest)
        )
        pool_lengths = torch.cat([pool_lengths, torch.full_like(flat, length)], 1).gather(1, kept)
        if last:
            break

        # The best N that go on become the running beams.
        running, kept = scores.masked_fill(ends, -1e9).topk(N)
        rows.append(choices.gather(1, kept), parents.gather(1, kept))
        reachable = running[:, 0] / length**config.length_penalty
        open_ = open_ & ~((pool_scores[:, -1] > -1e8) & (reachable <= pool_scores[:, -1]))
        if not open_.any():
            break
        left = _left(open_)
        if left is not None:
            finish((~open_).nonzero()[:, 0].tolist())
            rows.keep_batch(left)
            running, open_ = running[left], open_[left]
            pool_scores, pool_tokens, pool_lengths = (
                pool_scores[left],
                pool_tokens[left],
                pool_lengths[left],
            )
            images = [images[place] for place in left.tolist()]

    finish(list(range(len(images))))
    return [decoded[image] for image in range(B)]
