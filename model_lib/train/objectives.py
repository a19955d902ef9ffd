"""What training learns from a batch: its captions, or which of the captions it draws itself people
would agree with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model_lib.model.captioner import Captioner
from model_lib.model.config import DecodeConfig
from model_lib.model.decoding import Decoded, decode
from model_lib.model.tokens import IGNORED, PackedCaptions, decode_tokens, pack_captions
from model_lib.scores.cider import END, CiderD, words
from model_lib.train.config import TrainConfig
from model_lib.train.loss import caption_loss

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Targets:
    """What is to be minimised of some images: `caption_loss` of `rows`, with `weights`."""

    rows: PackedCaptions
    weights: Tensor | None
    """Of each token, float32 [B, T]; None: all 1."""
    reward: float = 0.0
    """Sum of the drawn captions' rewards."""


class Objective(Protocol):
    """What is learned from images, known by their numbers in the training split."""

    def make_targets(
        self, model: Captioner, features: Tensor, numbers: Sequence[int], step: int
    ) -> Targets:
        """Return what to minimise.

        Args:
            model: the captioner.
            features: visual tokens [B, S, E].
            numbers: of the B images.
            step: of training.
        """

    def normalizer(self, numbers: Sequence[int]) -> int:
        """Return by what a batch's summed loss is divided."""


def loss_of(model: Captioner, features: Tensor, learned: Targets, label_smoothing: float) -> Tensor:
    """Return the summed loss on the features' device, float32 scalar."""
    weights = None if learned.weights is None else learned.weights.to(features.device)
    return caption_loss(model, features, learned.rows.to(features.device), label_smoothing, weights)


class SelfCriticalObjective:
    """Self-critical sequence training: captions drawn from the model are made likelier if better
    than their siblings.

    Rennie et al., 2017, "Self-critical Sequence Training for Image Captioning", with the mean
    reward of an image's other samples as the baseline (Luo, 2020, "A Better Variant of
    Self-Critical Sequence Training"). The reward is CIDEr-D with document frequencies from the
    training captions, and end-of-text as a word of captions and references alike, without which
    captions that break off are rewarded.

    Args:
        captions: each training image's.
        config: of training.
    """

    def __init__(self, captions: Sequence[Sequence[str]], config: TrainConfig) -> None:
        self.config = config
        self.references = [[[*words(text), END] for text in texts] for texts in captions]
        self.scorer = CiderD(self.references)

    def describe(self) -> dict[str, float | int | str]:
        """Return the scorer's configuration, for people and MLflow."""
        return {
            **self.scorer.describe(),
            "end_of_text": END,
            "num_samples": self.config.num_samples,
        }

    def normalizer(self, numbers: Sequence[int]) -> int:
        """Return the number of captions that are drawn."""
        return len(numbers) * self.config.num_samples

    def make_targets(
        self, model: Captioner, features: Tensor, numbers: Sequence[int], step: int
    ) -> Targets:
        """Draw captions and weigh their tokens by how much better they are than the others of their
        image.

        The model draws without dropout. What it draws depends on the seed, the step and the images.
        """
        samples = self.config.num_samples
        # The first number too: a batch may come in parts.
        seed = int(
            np.random.default_rng([self.config.seed, step, numbers[0]]).integers(LARGEST_SEED)
        )
        drawing = DecodeConfig(
            temperature=1.0, num_captions=samples, max_new_tokens=self.config.max_tokens, seed=seed
        )
        was_training = model.training
        model.eval()
        drawn = decode(model, features.detach(), drawing)
        model.train(was_training)
        rewards = torch.tensor(
            [self.rewards(model, *pair) for pair in zip(numbers, drawn, strict=True)]
        )
        others = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
        advantages = rewards - others
        rows = pack_captions(
            [[one.tokens for one in captions] for captions in drawn], model.tokenizer.eos_token_id
        )
        weights = advantages.gather(1, rows.caption.clamp(min=0)) * (rows.targets != IGNORED)
        return Targets(rows, weights, float(rewards.sum()))

    def rewards(self, model: Captioner, number: int, drawn: Sequence[Decoded]) -> list[float]:
        """Return the reward of each caption drawn for a training image."""
        references = [self.scorer.vector(text) for text in self.references[number]]
        end = model.tokenizer.eos_token_id
        texts = (
            [*words(decode_tokens(model.tokenizer, one.tokens)), *([END] * (one.tokens[-1] == end))]
            for one in drawn
        )
        return [self.scorer.score(self.scorer.vector(text), references) for text in texts]


class CrossEntropyObjective:
    """Each image's captions are made likelier.

    Args:
        ids: the captions of each training image, as `encode_captions` returns them.
        end: the end-of-text token.
    """

    def __init__(self, ids: Sequence[Sequence[Sequence[int]]], end: int) -> None:
        self.ids, self.end = ids, end

    def normalizer(self, numbers: Sequence[int]) -> int:
        """Return the number of tokens that are learned."""
        return sum(len(caption) for number in numbers for caption in self.ids[number])

    def make_targets(
        self, model: Captioner, features: Tensor, numbers: Sequence[int], step: int
    ) -> Targets:
        return Targets(pack_captions([self.ids[number] for number in numbers], self.end), None)
