"""CIDEr-D: the n-grams that a caption shares with its image's references, rare ones counting most.

Vedantam et al., 2015, "CIDEr: Consensus-based Image Description Evaluation", in the form of the
official COCO toolkit (which calls it CIDEr): n-grams of one to four words, weighted by how rare
they are among the images' references, compared by a clipped cosine with a penalty for other
lengths. Training evaluates its checkpoints and rewards its samples by it; the scores of `captioner
evaluate` come from the official toolkit itself.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

ORDERS = 4
SIGMA = 6.0
"""Spread of the length penalty, in words."""
END = "<end>"
"""Stands for end-of-text where captions are scored with it, so that stopping early or late
costs."""
_MARKS = "".join(
    chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc")
)
_LETTER, _IDEOGRAPH = f"(?:[^\\W_]|[{_MARKS}])", "[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"
WORD = re.compile(
    f"{_IDEOGRAPH}|(?:(?!{_IDEOGRAPH}){_LETTER})+(?:[-'](?:(?!{_IDEOGRAPH}){_LETTER})+)*"
)
"""A word: letters and digits with what stands above, below and beside them, hyphens and apostrophes
inside."""
Ngram = tuple[str, ...]
Vector = tuple[list[dict[Ngram, float]], list[float], int]
"""For each order the weights of n-grams, the norms of these, and the length."""


def words(text: str) -> list[str]:
    """Split a caption plainly: lower case, words and numbers of any script, no punctuation.

    Chinese and Japanese are split into characters; other scripts without spaces, as Thai, are not
    split.
    """
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


def _ngrams(caption: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(caption[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(caption) - n + 1)
    )


class CiderD:
    """Scores captions against references.

    Args:
        references: of each image of the corpus, lists of words; an n-gram's document
            frequency is the number of images with it.
    """

    def __init__(self, references: Iterable[Sequence[Sequence[str]]]) -> None:
        self.frequency: Counter[Ngram] = Counter()
        self.images = 0
        for captions in references:
            self.frequency.update(set().union(*(_ngrams(caption) for caption in captions)))
            self.images += 1

    def describe(self) -> dict[str, float | int | str]:
        """Return the scorer's configuration."""
        return {
            "metric": "CIDEr-D",
            "orders": ORDERS,
            "sigma": SIGMA,
            "images": self.images,
            "ngrams": len(self.frequency),
        }

    def vector(self, caption: Sequence[str]) -> Vector:
        """Return the weights of a caption's n-grams."""
        weights: list[dict[Ngram, float]] = [{} for _ in range(ORDERS)]
        total = math.log(self.images)
        length = 0
        for ngram, count in _ngrams(caption).items():
            rarity = total - math.log(max(1, self.frequency[ngram]))
            weights[len(ngram) - 1][ngram] = count * rarity
            length += count if len(ngram) == 2 else 0  # the toolkit's measure of length
        return weights, [math.sqrt(sum(w * w for w in order.values())) for order in weights], length

    def score(self, caption: Vector, references: Sequence[Vector]) -> float:
        """Return the score of a caption against an image's references: from 0 to about 10."""
        total = 0.0
        for reference in references:
            penalty = math.exp(-((caption[2] - reference[2]) ** 2) / (2 * SIGMA**2))
            for ours, theirs, norm, their_norm in zip(
                caption[0], reference[0], caption[1], reference[1], strict=True
            ):
                if norm and their_norm:
                    shared = sum(
                        min(weight, theirs.get(n, 0.0)) * theirs.get(n, 0.0)
                        for n, weight in ours.items()
                    )
                    total += penalty * shared / (norm * their_norm)
        return 10.0 * total / ORDERS / len(references)


def corpus_cider(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> float:
    """Return the mean CIDEr of plainly split captions, the references themselves the corpus.

    Args:
        captions: by image.
        references: by image, those of `captions`.
    """
    split = {key: [words(text) for text in references[key]] for key in captions}
    scorer = CiderD(split.values())
    scores = [
        scorer.score(scorer.vector(words(caption)), [scorer.vector(text) for text in split[key]])
        for key, caption in captions.items()
    ]
    return float(np.mean(scores))
