"""How certain a score is: intervals and paired comparisons by bootstrap over images.

Each score of a set of captions is a function of sums over its images: means of the images' own
scores, BLEU and METEOR of the sums of their counts. Drawing the images anew, with replacement, and
summing again shows how far the score would move with other images (Efron and Tibshirani 1993,
chapter 13; Koehn 2004 for scores of texts). CIDEr's document frequencies stay those of the whole
set.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

ROUNDS = 10_000
"""Times the images are drawn anew."""
CHUNK = 250
"""Rounds that are held in memory together."""
CONFIDENCE = 0.95
"""Share of the rounds that an interval holds."""
BLEU, METEOR = "Bleu", "METEOR"
BLEU_COUNTS = (
    "length",
    "reference_length",
    *(f"{kind}_{n}" for kind in ("ngrams", "matches") for n in range(1, 5)),
)
"""A caption's counts from which BLEU follows."""
Statistics = Mapping[str, np.ndarray]
"""For each score float64 [images, counts]: `BLEU_COUNTS`, METEOR's, or the image's own score
alone."""


@dataclass(frozen=True)
class Comparison:
    """A new model's score beside an old one's, on the same images."""

    metric: str
    new: float
    old: float
    low: float
    """With `high`, the 95 % interval of the difference."""
    high: float
    p: float
    """Probability of so large a difference, in either direction, between equal models."""

    @property
    def gain(self) -> float:
        return self.new - self.old

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval of the difference excludes 0."""
        return self.low > 0 or self.high < 0


def corpus_scores(statistics: Statistics) -> dict[str, float]:
    """Return the scores of a whole set of captions."""
    return {
        name: float(value)
        for name, value in _combine(statistics, {k: v.sum(0) for k, v in statistics.items()})
    }


def intervals(statistics: Statistics, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return each score's 95 % interval: lowest and highest value."""
    return {name: _interval(values) for name, values in _redrawn(statistics, seed).items()}


def compare(new: Statistics, old: Statistics, seed: int = 0) -> dict[str, Comparison]:
    """Compare two models on each score that both have.

    Args:
        new: of the new model.
        old: of the old model, on the same images in the same order.
        seed: of the drawing. Both get the same images in each round, and an image which is hard
            for both does not count.
    """
    new_scores, old_scores = corpus_scores(new), corpus_scores(old)
    new_drawn, old_drawn = _redrawn(new, seed), _redrawn(old, seed)
    comparisons = {}
    for name in (name for name in new_scores if name in old_scores):
        # Equal scores differ in their last bits.
        gains = (new_drawn[name] - old_drawn[name]).round(12)
        smaller = min((gains <= 0).sum(), (gains >= 0).sum())
        p = min(1.0, float(2 * (1 + smaller) / (1 + ROUNDS)))
        interval = _interval(gains)
        comparisons[name] = Comparison(name, new_scores[name], old_scores[name], *interval, p)
    return comparisons


def meteor(counts: np.ndarray) -> np.ndarray:
    """Return METEOR 1.5 of captions or sums of captions, with its constants for English.

    Denkowski and Lavie 2014, "Meteor Universal: Language Specific Translation Evaluation for Any
    Target Language".

    Args:
        counts: float64 [..., 23] as METEOR prints them: lengths, function words, for each kind of
            match the content and function words matched (each of caption and reference), chunks (0
            for a caption that matches a whole reference), and words matched.
    """
    alpha, beta, gamma, delta = 0.85, 0.20, 0.60, 0.75
    kinds = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
    lengths, functions = counts[..., :2], counts[..., 2:4]
    chunks, matched = counts[..., 20], counts[..., 21:23]
    # [..., kind, content or function, caption or reference]
    matches = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 2, 2)
    weighted = np.einsum("...kwt,k,w->...t", matches, kinds, np.array([delta, 1 - delta]))
    with np.errstate(divide="ignore", invalid="ignore"):
        precision_recall = weighted / (delta * (lengths - functions) + (1 - delta) * functions)
        mean = 1 / ((1 - alpha) / precision_recall[..., 0] + alpha / precision_recall[..., 1])
        penalty = gamma * (chunks / (matched.sum(-1) / 2)) ** beta
        return np.nan_to_num(mean * (1 - penalty))


def bleu(counts: np.ndarray) -> np.ndarray:
    """Return BLEU-1 to BLEU-4 (Papineni et al. 2002) of captions or sums of captions, as the
    official toolkit does.

    Args:
        counts: float64 [..., 10], `BLEU_COUNTS`.

    Returns:
        float64 [..., 4].
    """
    small, tiny = 1e-9, 1e-15  # the toolkit's, against division by zero
    precisions = (counts[..., 6:10] + tiny) / (counts[..., 2:6] + small)
    means = np.cumprod(precisions, -1) ** (1 / np.arange(1, 5))
    ratio = (counts[..., 0] + tiny) / (counts[..., 1] + small)
    return means * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None]


def _combine(statistics: Statistics, sums: Statistics) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each score's name and values from sums, [..., counts], over as many images as
    `statistics` has."""
    for name, values in sums.items():
        if name == BLEU:
            for n, value in enumerate(np.moveaxis(bleu(values), -1, 0), 1):
                yield f"{BLEU}_{n}", value
        elif name == METEOR:
            yield name, meteor(values)
        else:
            yield name, values[..., 0] / len(statistics[name])


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _redrawn(statistics: Statistics, seed: int) -> dict[str, np.ndarray]:
    """Return each score's values, [ROUNDS], with the images drawn anew."""
    images = len(next(iter(statistics.values())))
    rng = np.random.default_rng(seed)
    parts: list[dict[str, np.ndarray]] = []
    for _ in range(ROUNDS // CHUNK):
        drawn = rng.integers(0, images, (CHUNK, images)) + images * np.arange(CHUNK)[:, None]
        times = np.bincount(drawn.ravel(), minlength=CHUNK * images).astype(np.float64)
        times = times.reshape(CHUNK, images)
        sums = {name: times @ values for name, values in statistics.items()}
        parts.append(dict(_combine(statistics, sums)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
