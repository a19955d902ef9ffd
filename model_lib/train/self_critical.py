"""Self-critical sequence training: the second stage, which raises the CIDEr-D of drawn captions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model_lib.model.captioner import Captioner
from model_lib.model.config import DecodeConfig
from model_lib.model.decoding import Decoded, decode
from model_lib.model.tokens import IGNORED, PackedCaptions, decode_tokens, pack_captions
from model_lib.scores.cider import END, CiderD, words
from model_lib.train.config import TrainConfig
from model_lib.train.loss import Targets


class SelfCriticalObjective:
    """Makes drawn captions likelier if they score better than the others of their image.

    Rennie et al., 2017, "Self-critical Sequence Training for Image Captioning", with the mean
    reward of an image's other samples as the baseline (Luo, 2020, "A Better Variant of
    Self-Critical Sequence Training"). The reward is CIDEr-D with document frequencies from the
    training captions. End-of-text counts as a word of captions and references; without it, captions
    that break off are rewarded.
    """

    def __init__(self, captions: Sequence[Sequence[str]], config: TrainConfig) -> None:
        self.config = config
        self.references = [[[*words(text), END] for text in texts] for texts in captions]
        self.scorer = CiderD(self.references)

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
        was_training = model.training
        model.eval()
        drawn = decode(model, features.detach(), sampling)
        model.train(was_training)
        pairs = zip(numbers, drawn, strict=True)
        rewards = torch.tensor([self.rewards(model, *pair) for pair in pairs])
        baselines = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
        tokens = [[caption.tokens for caption in captions] for captions in drawn]
        rows = pack_captions(tokens, model.start_token)
        advantages = (rewards - baselines).gather(1, rows.caption.clamp(min=0))
        weights = advantages * (rows.targets != IGNORED)
        device = features.device
        return Targets(rows.to(device), weights.to(device), float(rewards.sum()))

    def rewards(self, model: Captioner, number: int, drawn: Sequence[Decoded]) -> list[float]:
        """Return the reward of each caption drawn for a training image."""
        references = [self.scorer.vector(text) for text in self.references[number]]
        rewards = []
        for caption in drawn:
            text = words(decode_tokens(model.tokenizer, caption.tokens))
            ended = caption.tokens[-1] == model.end_token
            vector = self.scorer.vector([*text, END] if ended else text)
            rewards.append(self.scorer.score(vector, references))
        return rewards
