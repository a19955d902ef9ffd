"""Self-critical sequence training: the second stage, which raises the CIDEr-D of drawn captions."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model_lib.model.captioner import Captioner
from model_lib.model.config import DecodeConfig
from model_lib.model.decoding import Decoded, decode
from model_lib.model.tokens import IGNORED, PackedCaptions, decode_tokens, pack_captions
from model_lib.scores.cider import END, CiderD, words
from model_lib.train.config import ResolvedConfig
from model_lib.train.loss import Targets, autocast_dtype_on


class DrawingModel:
    """A model in training with a decoder for drawing: no dropout, and weights in 16 bits.

    So they are converted once a step, and not for each token. Weights that have its dtype already,
    as the frozen ones, are shared, and so is the head.
    """

    def __init__(self, model: Captioner, dtype: torch.dtype) -> None:
        self.config, self.head, self.dtype = model.config, model.head, dtype
        shared = {id(p): p for p in model.decoder.parameters() if p.dtype == dtype}
        self.decoder = copy.deepcopy(model.decoder, shared).to(dtype).eval()
        pairs = zip(self.decoder.parameters(), model.decoder.parameters(), strict=True)
        self.pairs = [pair for pair in pairs if pair[0] is not pair[1]]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights."""
        for own, weight in self.pairs:
            own.copy_(weight)


class SelfCriticalObjective:
    """Makes drawn captions likelier if they score better than the others of their image.

    Rennie et al., 2017, "Self-critical Sequence Training for Image Captioning", with the mean
    reward of an image's other samples as the baseline (Luo, 2020, "A Better Variant of
    Self-Critical Sequence Training"). The reward is CIDEr-D with document frequencies from the
    training captions. End-of-text counts as a word of captions and references; without it, captions
    that break off are rewarded.
    """

    def __init__(self, captions: Sequence[Sequence[str]], config: ResolvedConfig) -> None:
        self.config = config
        self.drawing: DrawingModel | None = None
        self.step: int | None = None  # whose weights it has
        self.scorer = CiderD([[*words(text), END] for text in texts] for texts in captions)

    def describe(self) -> dict[str, float | int | str]:
        """Return the scorer's configuration, for the log and MLflow."""
        samples = self.config.num_samples
        return {**self.scorer.describe(), "end_of_text": END, "num_samples": samples}

    def normalizer(self, numbers: Sequence[int]) -> int:
        """Return the number of captions that are drawn."""
        return len(numbers) * self.config.num_samples

    def pack(self, numbers: Sequence[int]) -> None:
        """Return None: nothing is known before captions are drawn."""

    def make_targets(
        self,
        model: Captioner,
        features: Tensor,
        numbers: Sequence[int],
        step: int,
        rows: PackedCaptions | None = None,
    ) -> Targets:
        """Draw captions; weigh their tokens by their reward less the mean of their siblings'.

        The model draws without dropout. The samples depend on the seed, the step and the images.
        """
        samples = self.config.num_samples
        # The first number too: a batch may come in parts.
        rng = np.random.default_rng([self.config.seed, step, numbers[0]])
        sampling = DecodeConfig(
            temperature=1.0,
            num_captions=samples,
            max_new_tokens=self.config.max_tokens,
            seed=int(rng.integers(2**63 - 1)),
        )
        if self.drawing is None:
            self.drawing = DrawingModel(model, autocast_dtype_on(features) or model.dtype)
        if step != self.step:
            self.drawing.refresh()
            self.step = step
        with torch.autocast(features.device.type, enabled=False):
            drawn = decode(self.drawing, features.detach().to(self.drawing.dtype), sampling)
        tokens = [[caption.tokens for caption in captions] for captions in drawn]
        rows = pack_captions(tokens, model.start_token)

        def weigh() -> tuple[Tensor, dict[str, float]]:
            scores, sums = self.score(model, numbers, drawn)
            rewards = torch.from_numpy(scores)
            baselines = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
            advantages = (rewards - baselines).gather(1, rows.caption.clamp(min=0))
            weights = (advantages * (rows.targets != IGNORED)).float()
            return weights.to(features.device, non_blocking=True), sums

        return Targets(rows.to(features.device), weigh)

    def score(
        self, model: Captioner, numbers: Sequence[int], drawn: Sequence[Sequence[Decoded]]
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Return the rewards of captions, as many for each image, drawn for the training images
        with these numbers, float64 [B, N], and the captions' sums to log.

        A reward may rise by captions that are too long or say things twice, which these sums show:
        `drawn_words`, and `drawn_repetition`, the share of a caption's pairs of words that it has
        had before.
        """
        captions = [caption for image in drawn for caption in image]
        texts = [words(decode_tokens(model.tokenizer, caption.tokens)) for caption in captions]
        ended = [
            [*text, END] if caption.tokens[-1] == model.end_token else text
            for text, caption in zip(texts, captions, strict=True)
        ]
        rewards = self.scorer.scores(ended, np.repeat(numbers, len(drawn[0])))
        sums = {
            "reward": float(rewards.sum()),
            "drawn_words": float(sum(map(len, texts))),
            "drawn_repetition": sum(map(_repetition, texts)),
        }
        return rewards.reshape(len(drawn), -1), sums


def _repetition(text: Sequence[str]) -> float:
    pairs = list(pairwise(text))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
