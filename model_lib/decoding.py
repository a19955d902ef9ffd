"""From visual tokens to captions: greedy, nucleus sampling and beam search, with key/value caches.

A step feeds one new token a row. Self-attention's keys and values are cached; cross-attention's are computed once a
picture and shared by all its beams. Beam search follows transformers' `generate` (`early_stopping=False`): twice as
many candidates as beams are looked at, those that end enter a pool by their length-normalised score, and a picture is
done when no running beam can beat its pool.

Shapes: B pictures, N beams or samples a picture, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model_lib.config import DecodeConfig
from model_lib.errors import UserError
from model_lib.model import Captioner, CrossCache, SelfAttentionCache


@dataclass(frozen=True)
class Decoded:
    """One decoded caption."""

    tokens: list[int]
    """Ids without the start; the last is end-of-text if the caption ended by itself."""
    score: float
    """Mean log-probability of the tokens under the model, in nats."""


class _Stepper:
    """Feeds tokens to the decoder one at a time and returns float32 log-probabilities of the next."""

    def __init__(self, model: Captioner, visual: CrossCache, rows: int, max_tokens: int) -> None:
        self.model, self.visual = model, visual
        self.batch, self.rows = visual[0][0].shape[0], rows
        config = model.config.decoder_config
        self.end = model.tokenizer.eos_token_id if model.tokenizer is not None else config.eos_token_id
        if max_tokens >= config.n_positions:
            raise UserError(f"max_new_tokens: {max_tokens} is more than the model's {config.n_positions - 1} positions")
        self.cache = SelfAttentionCache(config, self.batch * rows, max_tokens, like=visual[0][0])

    def start(self) -> Tensor:
        return torch.full((self.batch, self.rows), self.end, device=self.visual[0][0].device)

    def step(self, tokens: Tensor) -> Tensor:
        """Take the newest token of each row, int64 [B, N]; return float32 [B, N, V]."""
        hidden = self.model.hidden(tokens.unsqueeze(-1), self.visual, self.cache)
        return self.model.head(hidden[:, :, 0]).float().log_softmax(-1)


@torch.inference_mode()
def decode(model: Captioner, features: Tensor, config: DecodeConfig) -> list[Decoded]:
    """Caption each picture of a batch.

    Args:
        model: the captioner.
        features: visual tokens [B, S, E] from `Captioner.encode`.
        config: how to decode.

    Raises:
        UserError: more tokens are asked for than the model has positions.
    """
    visual = model.cross_cache(features)
    if config.num_beams > 1:
        return _beam_search(model, visual, config)
    return _one_by_one(model, visual, config)


def _one_by_one(model: Captioner, visual: CrossCache, config: DecodeConfig) -> list[Decoded]:
    """Take the most likely token at each step, or draw one."""
    stepper = _Stepper(model, visual, 1, config.max_new_tokens)
    generator = torch.Generator(visual[0][0].device).manual_seed(config.seed)
    tokens = stepper.start()
    taken: list[Tensor] = []
    scores: list[Tensor] = []
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    for _ in range(config.max_new_tokens):
        log_probs = stepper.step(tokens)
        if config.samples:
            choice = torch.multinomial(_filtered(log_probs[:, 0], config), 1, generator=generator)
        else:
            choice = log_probs[:, 0].argmax(-1, keepdim=True)
        tokens = choice.masked_fill(ended, stepper.end)
        taken.append(tokens)
        scores.append(log_probs.gather(-1, tokens.unsqueeze(-1))[:, :, 0])
        ended = ended | (tokens == stepper.end)
        if ended.all():
            break
    decoded = []
    for row, values in zip(torch.cat(taken, 1).tolist(), torch.cat(scores, 1).tolist(), strict=True):
        length = row.index(stepper.end) + 1 if stepper.end in row else len(row)
        decoded.append(Decoded(row[:length], sum(values[:length]) / length))
    return decoded


def _filtered(log_probs: Tensor, config: DecodeConfig) -> Tensor:
    """Return the probabilities to draw from, [B, V]: tempered, then the top k, then the nucleus.

    The nucleus is the smallest set of most likely tokens whose probabilities reach `top_p` (Holtzman et al., 2020,
    "The Curious Case of Neural Text Degeneration").
    """
    logits = log_probs / (config.temperature or 1.0)
    if config.top_k is not None:
        least = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    if config.top_p is not None:
        ordered, order = probs.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= config.top_p  # what stands before a token already suffices
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(beyond, 0))
    return probs


def _beam_search(model: Captioner, visual: CrossCache, config: DecodeConfig) -> list[Decoded]:
    N, longest = config.num_beams, config.max_new_tokens
    stepper = _Stepper(model, visual, N, longest)
    tokens = stepper.start()
    B, device = tokens.shape[0], tokens.device
    first_row = torch.arange(B, device=device).unsqueeze(1) * N  # [B, 1]: where a picture's rows begin in the cache

    running = torch.full((B, N), -1e9, device=device)
    running[:, 0] = 0  # all beams start alike, so only the first may branch
    history = torch.empty((B, N, 0), dtype=torch.int64, device=device)
    pool_scores = torch.full((B, N), -1e9, device=device)
    pool_tokens = torch.full((B, N, longest), stepper.end, device=device)
    pool_lengths = torch.zeros((B, N), dtype=torch.int64, device=device)
    open_ = torch.ones(B, dtype=torch.bool, device=device)

    for length in range(1, longest + 1):
        totals = stepper.step(tokens) + running.unsqueeze(-1)
        V = totals.shape[-1]
        scores, flat = totals.view(B, N * V).topk(2 * N)
        parents, choices = flat // V, flat % V
        paths = torch.cat([history.gather(1, parents.unsqueeze(-1).expand(-1, -1, length - 1)), choices[..., None]], 2)
        ends = choices == stepper.end
        last = length == longest

        # Those that end (or run out of length) enter the pool, if they are among the first N and the picture is open.
        among_first = torch.arange(2 * N, device=device) < N
        enters = (ends | last) & among_first & open_.unsqueeze(1)
        normalised = (scores / length**config.length_penalty).masked_fill(~enters, -1e9)
        padded = torch.full((B, 2 * N, longest), stepper.end, device=device)
        padded[:, :, :length] = paths
        merged = torch.cat([pool_scores, normalised], 1)
        pool_scores, kept = merged.topk(N)
        pool_tokens = torch.cat([pool_tokens, padded], 1).gather(1, kept.unsqueeze(-1).expand(-1, -1, longest))
        lengths = torch.cat([pool_lengths, torch.full_like(flat, length)], 1)
        pool_lengths = lengths.gather(1, kept)
        if last:
            break

        # The best N that go on become the running beams.
        running, kept = scores.masked_fill(ends, -1e9).topk(N)
        history = paths.gather(1, kept.unsqueeze(-1).expand(-1, -1, length))
        tokens = choices.gather(1, kept)
        stepper.cache.select((first_row + parents.gather(1, kept)).view(-1))
        reachable = running[:, 0] / length**config.length_penalty
        open_ = open_ & ~((pool_scores[:, -1] > -1e8) & (reachable <= pool_scores[:, -1]))
        if not open_.any():
            break

    best = (pool_tokens[:, 0].tolist(), pool_lengths[:, 0].tolist(), pool_scores[:, 0].tolist())
    return [
        Decoded(row[:length], score * length**config.length_penalty / length)
        for row, length, score in zip(*best, strict=True)
    ]
