"""From visual tokens to captions: greedy, sampling and beam search, with key/value caches.

A step feeds one new token a row, and asks the device for nothing: its tensors keep their shapes and
places, so that on a GPU a CUDA graph replays it. Every few steps the host asks how many images are
not finished; once half of them are, the others continue without them. Self-attention's keys and
values are cached and never moved; cross-attention's are computed once per image and shared by all
its rows. Greedy and beam search follow transformers' `generate` (`early_stopping=False`): a step
looks at twice as many candidates as beams, those that end enter a pool by their length-normalised
score, and an image is done when no running beam can beat its pool.

Shapes: B images, N rows (beams or samples) per image, V vocabulary, T longest caption in tokens, R
rows in all.
"""

import copy
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from model_lib.errors import UserError
from model_lib.model.config import DecodeConfig
from model_lib.model.decoder import CrossCache, Decoder, KVCache
from model_lib.model.head import MULTIPLE, centred, head_logits

TRIES = 8
"""Draws from all tokens before the nucleus is computed: at top_p 0.5 that is one row in 256."""
NEVER = -1e9
"""Score of what may not be chosen."""
SIZES = (1, 8, 32, 64, 128, 256)
"""Images of the batches for which CUDA graphs are recorded; a batch is filled up to the next."""
STEPS = 4
"""Steps between two looks at what a GPU has finished: it works ahead while the host looks."""
KEPT = 2
"""Searches that are kept for a model, with their memory, for the next batch of the same kind."""


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
def decode(
    model: CaptionModel, features: Tensor, config: DecodeConfig, static: bool | None = None
) -> list[list[Decoded]]:
    """Caption each image of a batch.

    Args:
        model: the captioner.
        features: visual tokens [B, S, E] from `Captioner.encode`.
        config: how to decode.
        static: let no shape depend on how long captions are, and record the steps of the second
            batch and later ones as CUDA graphs; None: on CUDA, outside of autocast.

    Returns:
        For each image its `num_captions` captions; those of a beam search with the best first.

    Raises:
        UserError: `max_new_tokens` is more than the model has positions.
    """
    positions = model.config.decoder_config.n_positions
    if config.max_new_tokens >= positions:
        raise UserError(
            f"max_new_tokens: {config.max_new_tokens} is more than the model's {positions - 1} "
            "positions"
        )
    if static is None:
        static = features.is_cuda and not torch.is_autocast_enabled("cuda")
    if not static:
        return _new_search(model, config, model.decoder.cross_cache(features)).run(len(features))
    with _LOCK:
        search = _kept_search(model, config, features)
        model.decoder.cross_cache(features, [part[: len(features)] for part in search.visual])
        return search.run(len(features), static=True)


class Search(ABC):
    """The captions of a batch while they are decoded.

    Attributes:
        visual: keys and values of the visual tokens.
        history: tokens so far with the start before them, int64 [B, N, 1 + T]; then the end.
        is_open: whether an image is not finished, bool [B].
        scores: of each row, float32 [B, N].
        generator: of random numbers.
    """

    BATCHED: tuple[str, ...] = ("history", "is_open", "scores")
    """The tensors that are the batch's, images first."""

    def __init__(
        self, model: CaptionModel, config: DecodeConfig, visual: CrossCache, rows: int
    ) -> None:
        shape, size, device = model.config.decoder_config, len(visual[0]), visual[0].device
        self.model, self.config, self.visual = model, config, visual
        self.begin, self.end = shape.bos_token_id, shape.eos_token_id
        self.cache = KVCache(shape, size, rows, config.max_new_tokens, like=visual[0])
        ids = torch.int64
        self.history = torch.empty(size, rows, 1 + config.max_new_tokens, dtype=ids, device=device)
        self.is_open = torch.empty(size, dtype=torch.bool, device=device)
        self.scores = torch.empty(size, rows, device=device)
        self.generator = torch.Generator(device)
        # A CPU multiplies in float32.
        self.matrix = None if device.type == "cpu" else self._head()
        self.uses = 0
        self.replay: Callable[[], object] | None = None
        """Does a step's work again, once that is recorded."""
        self.logits: Tensor | None = None
        """Where it puts the logits."""
        self.parts: dict[int, Self] = {}

    def _head(self) -> Tensor:
        return centred(self.model.head.weight, self.visual[0].dtype, MULTIPLE)

    def _first(self, size: int) -> Self:
        """Return the search of the first images, which shares all memory with this one."""
        part = copy.copy(self)
        part.visual = [layer[:size] for layer in self.visual]
        part.cache = self.cache.first(size)
        for name in self.BATCHED:
            setattr(part, name, getattr(self, name)[:size])
        return part

    def _move_first(self, order: Tensor) -> None:
        """Move the images with these indices, int64 [B'], in this order to the first places."""
        batched = [getattr(self, name) for name in self.BATCHED]
        for tensor in [*batched, *self.visual, *self.cache.layers, self.cache.slots]:
            tensor[: len(order)] = tensor.index_select(0, order)

    def run(self, images: int, static: bool = False) -> list[list[Decoded]]:
        """Decode the first images of `visual`."""
        self.start(images)
        longest = self.config.max_new_tokens
        search, numbers = self, torch.arange(len(self.is_open), device=self.is_open.device)
        tokens, scores = (torch.empty_like(result) for result in self.results())
        for step in range(1, longest + 1):
            search.step(None if static else step)
            if step == longest or (static and step % STEPS):
                continue
            count = int(search.is_open.sum())
            if not count:
                break
            size = next((n for n in SIZES if n >= count), count) if static else count
            if size <= len(numbers) // 2:
                tokens[numbers], scores[numbers] = search.results()
                order = search.is_open.int().argsort(descending=True, stable=True)[:size]
                search._move_first(order)
                search, numbers = self.parts.get(size) or self._first(size), numbers[order]
        tokens[numbers], scores[numbers] = search.results()
        pairs = zip(tokens[:images].tolist(), scores[:images].tolist(), strict=True)
        return [list(map(self.caption, *pair)) for pair in pairs]

    def start(self, images: int) -> None:
        """Forget the batch before, and open the first images."""
        self.cache.clear()
        self.history.fill_(self.end)
        self.history[:, :, 0] = self.begin
        self.is_open.fill_(False)[:images] = True
        self.scores.zero_()
        self.generator.manual_seed(self.config.seed)
        if self.matrix is not None:
            self.matrix.copy_(self._head())

    def step(self, window: int | None) -> None:
        """Add a token to each row; see `KVCache.extend` for `window`."""
        if self.replay is None:
            self.choose(self.predict(window))
            return
        self.replay()
        if self.config.do_sample:
            assert self.logits is not None
            self.choose(self.logits)

    def predict(self, window: int | None = None) -> Tensor:
        """Feed the newest token of each row; return the logits of the next, float32 [B, N, V]."""
        newest = self.history.index_select(2, self.cache.position)
        hidden = self.model.decoder(newest, self.visual, self.cache, window=window)[:, :, 0]
        if self.matrix is not None:
            return head_logits(hidden, self.matrix)[:, :, : len(self.model.head.weight)]
        with torch.autocast("cpu", enabled=False):
            return self.model.head(hidden.to(self.model.head.weight.dtype)).float()

    @abstractmethod
    def choose(self, logits: Tensor) -> None:
        """Append a token to each row, by the logits, float32 [B, N, V], which may be changed."""

    @abstractmethod
    def results(self) -> tuple[Tensor, Tensor]:
        """Return each image's captions, int64 [B, captions, T], and scores, [B, captions]."""

    @abstractmethod
    def caption(self, tokens: list[int], score: float) -> Decoded:
        """Return a result as a caption."""

    def length(self, tokens: list[int]) -> int:
        """Return the number of tokens up to and including the end."""
        return tokens.index(self.end) + 1 if self.end in tokens else len(tokens)

    def append(self, tokens: Tensor) -> None:
        """Add a token, int64 [B, N], to each row."""
        self.history.index_copy_(2, self.cache.position, tokens.unsqueeze(-1))

    def rule_out(self, logits: Tensor) -> Tensor:
        """Set the logits of the tokens that the options rule out to -inf, and return them."""
        size, position = self.config.no_repeat_ngram_size, self.cache.position
        if 0 < size <= self.history.shape[2]:
            # A token may not complete an n-gram that has occurred: one whose first n - 1 tokens are
            # the row's last ones.
            ngrams = self.history.unfold(2, size, 1)
            last = torch.arange(1 - size, 0, device=position.device) + position
            last = self.history.index_select(2, last.clamp(min=0))
            has_occurred = torch.arange(ngrams.shape[2], device=position.device) <= position - size
            same = (ngrams[..., :-1] == last.unsqueeze(2)).all(-1) & has_occurred
            counts = torch.zeros_like(logits).scatter_add_(2, ngrams[..., -1], same.float())
            logits.masked_fill_(counts > 0, -torch.inf)
        if self.config.min_new_tokens:
            ends = logits[:, :, self.end]
            ends.masked_fill_(position <= self.config.min_new_tokens, -torch.inf)
        return logits

    def record(self, recorder: "Recorder") -> None:
        """Record a step, or what comes before tokens are drawn, for which the host asks the device
        for values."""

        def work() -> None:
            self.logits = self.predict()
            if not self.config.do_sample:
                self.choose(self.logits)

        self.cache.clear()
        self.replay = recorder(work)


class RowSearch(Search):
    """Takes the most likely token of each row, or draws one.

    Attributes:
        ended: whether a row has ended, bool [B, N].
        scores: the sum of its tokens' log-probabilities.
    """

    BATCHED = (*Search.BATCHED, "ended")

    def __init__(self, model: CaptionModel, config: DecodeConfig, visual: CrossCache) -> None:
        size, device = len(visual[0]), visual[0].device
        self.ended = torch.empty(size, config.num_captions, dtype=torch.bool, device=device)
        super().__init__(model, config, visual, config.num_captions)

    def start(self, images: int) -> None:
        super().start(images)
        self.ended.copy_(~self.is_open.unsqueeze(1))

    def choose(self, logits: Tensor) -> None:
        log_total = logits.logsumexp(-1)
        logits = self.rule_out(logits)
        if self.config.do_sample:
            tokens = draw(logits.flatten(0, 1), self.config, self.generator).view_as(self.ended)
        else:
            tokens = logits.argmax(-1)
        tokens = tokens.masked_fill(self.ended, self.end)
        log_probs = logits.gather(2, tokens.unsqueeze(-1)).squeeze(-1) - log_total
        self.scores += log_probs.masked_fill(self.ended, 0)
        self.ended |= tokens == self.end
        self.is_open.copy_(~self.ended.all(1))
        self.append(tokens)

    def results(self) -> tuple[Tensor, Tensor]:
        return self.history[:, :, 1:], self.scores

    def caption(self, tokens: list[int], score: float) -> Decoded:
        length = self.length(tokens)
        return Decoded(tokens[:length], score / length)


class BeamSearch(Search):
    """Keeps the N most likely beginnings of each image's caption.

    Attributes:
        scores: the beams' sums of log-probabilities.
        pool: captions that have ended, int64 [B, N, T], the best first.
        pool_scores: theirs, divided by a power of their length, float32 [B, N].
        penalties: that power of each length, float32 [1 + T].
    """

    BATCHED = (*Search.BATCHED, "pool", "pool_scores")

    def __init__(self, model: CaptionModel, config: DecodeConfig, visual: CrossCache) -> None:
        size, device, N = len(visual[0]), visual[0].device, config.num_beams
        shape = (size, N, config.max_new_tokens)
        self.pool = torch.empty(shape, dtype=torch.int64, device=device)
        self.pool_scores = torch.empty(size, N, device=device)
        lengths = range(1, config.max_new_tokens + 1)
        penalties = [1.0, *(length**config.length_penalty for length in lengths)]
        self.penalties = torch.tensor(penalties, device=device)
        self.among_best = torch.arange(2 * N, device=device) < N
        super().__init__(model, config, visual, N)

    def start(self, images: int) -> None:
        super().start(images)
        self.scores[:, 1:] = NEVER  # all beams start alike, so only the first may branch
        self.pool.fill_(self.end)
        self.pool_scores.fill_(NEVER)

    def choose(self, logits: Tensor) -> None:
        position, N = self.cache.position, self.config.num_beams
        penalty = self.penalties.index_select(0, position)
        log_total = logits.logsumexp(-1, keepdim=True)
        # The best 2N of all N * V continuations are among the best 2N of each beam.
        best, vocabulary = self.rule_out(logits).topk(min(2 * N, logits.shape[-1]))
        totals = best - log_total + self.scores.unsqueeze(-1)
        scores, flat = totals.flatten(1).topk(2 * N)
        parents = flat // best.shape[2]
        tokens = vocabulary.flatten(1).gather(1, flat)
        ends = tokens == self.end
        is_last = position == self.config.max_new_tokens

        # Those of the best N that end, or may not become longer, enter the pool of an open image.
        enters = (ends | is_last) & self.among_best & self.is_open.unsqueeze(1)
        normalised = (scores / penalty).masked_fill(~enters, NEVER)
        captions = self._rows(self.history, parents)
        captions = captions.index_copy_(2, position, tokens.unsqueeze(-1))[:, :, 1:]
        pool_scores, kept = torch.cat([self.pool_scores, normalised], 1).topk(N)
        self.pool_scores.copy_(pool_scores)
        self.pool.copy_(self._rows(torch.cat([self.pool, captions], 1), kept))

        # The best N of the others are the next beams.
        scores, kept = scores.masked_fill(ends, NEVER).topk(N)
        self.scores.copy_(scores)
        parents = parents.gather(1, kept)
        self.history.copy_(self._rows(self.history, parents))
        self.cache.reorder(parents)
        self.append(tokens.gather(1, kept))
        worst = pool_scores[:, -1]
        is_full = worst > NEVER / 10
        self.is_open &= ~is_last & ~(is_full & (scores[:, 0] / penalty <= worst))

    @staticmethod
    def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
        """Return the rows `indices`, int64 [B, M], of [B, N, T]: [B, M, T]."""
        return tensor.gather(1, indices.unsqueeze(-1).expand(-1, -1, tensor.shape[2]))

    def results(self) -> tuple[Tensor, Tensor]:
        count = self.config.num_captions
        return self.pool[:, :count], self.pool_scores[:, :count]

    def caption(self, tokens: list[int], score: float) -> Decoded:
        length = self.length(tokens)
        return Decoded(tokens[:length], score * length**self.config.length_penalty / length)


def _new_search(model: CaptionModel, config: DecodeConfig, visual: CrossCache) -> Search:
    return (BeamSearch if config.num_beams > 1 else RowSearch)(model, config, visual)


_SEARCHES: weakref.WeakKeyDictionary[Any, OrderedDict[Any, Search]]
_SEARCHES = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
"""Held while one of `_SEARCHES` is used: a batch's tensors are in it."""


def _kept_search(model: CaptionModel, config: DecodeConfig, features: Tensor) -> Search:
    """Return a search for a batch of this kind: the model's, from its second use on recorded.

    Graphs read weights from where they were. A model whose weights lie elsewhere needs another one.
    """
    size = next((n for n in SIZES if n >= len(features)), len(features))
    parameters = [*model.decoder.parameters(), model.head.weight]
    weights = tuple(parameter.data_ptr() for parameter in parameters)
    key = (size, replace(config, seed=0), features.shape[1], weights)
    searches = _SEARCHES.setdefault(model, OrderedDict())
    if key not in searches:
        shape = model.config.decoder_config
        heads, width = shape.n_head, shape.n_embd // shape.n_head
        buffer = (size, 2, heads, features.shape[1], width)
        dtype = model.decoder.ln_f.weight.dtype
        visual = [features.new_zeros(buffer, dtype=dtype) for _ in range(shape.n_layer)]
        # Not the model itself, which would then live as long as its searches.
        search = _new_search(weakref.proxy(model), config, visual)
        search.parts = {n: search._first(n) for n in SIZES if n < size}
        searches[key] = search
        if len(searches) > KEPT:
            searches.popitem(last=False)
    searches.move_to_end(key)
    search = searches[key]
    search.config = config
    search.uses += 1
    if search.uses == 2 and features.device.type in RECORDERS:
        recorder = RECORDERS[features.device.type]()
        for part in (search, *search.parts.values()):
            part.record(recorder)
    return search


Recorder = Callable[[Callable[[], None]], Callable[[], object]]
"""Records work on a device, and returns what does it again on the same memory."""


def _cuda_graphs() -> Recorder:
    """Return a recorder of CUDA graphs, which share one memory, as they are replayed in turn."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], None]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # libraries allocate their memory in the first call
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    return record


RECORDERS: dict[str, Callable[[], Recorder]] = {"cuda": _cuda_graphs}
"""By the type of the device."""


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
