"""CIDEr-D: the n-grams that a caption shares with its image's references, rare ones counting most.

Vedantam et al., 2015, "CIDEr: Consensus-based Image Description Evaluation", in the form of the
official COCO toolkit (which calls it CIDEr): n-grams of one to four words, weighted by how rare
they are among the images' references, compared by a clipped cosine with a penalty for other
lengths. Training evaluates its checkpoints and rewards its samples by it; the scores of `captioner
evaluate` come from the official toolkit itself.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

ORDERS = 4
MULTIPLIER, LAST = np.uint64(0x9E3779B97F4A7C15), np.uint64(2**64 - 1)
"""By which an n-gram's key is that of its words in their order; and a key after all others."""
SIGMA = 6.0
"""Spread of the length penalty, in words."""
END = "<end>"
"""Stands for end-of-text where captions are scored with it, so that stopping early or late
costs."""
_MARKS = "".join(
    chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc")
)
_LETTER, _IDEOGRAPH = f"(?:[^\\W_]|[{_MARKS}])", "[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"
_ENDING = "(?:n't|'(?:d|ll|m|re|s|ve))\\b"
_PLAIN = f"(?:(?!{_IDEOGRAPH}|n't\\b){_LETTER})+"
WORD = re.compile(f"{_IDEOGRAPH}|{_ENDING}|{_PLAIN}(?:(?!{_ENDING})[-']{_PLAIN})*")
"""A word: letters and digits with what stands above, below and beside them, hyphens and apostrophes
inside. As for the official tokenizer, "isn't" is two words, is and n't, and so is "dog's"."""


def words(text: str) -> list[str]:
    """Split a caption plainly: lower case, words and numbers of any script, no punctuation.

    Chinese and Japanese are split into characters; other scripts without spaces, as Thai, are not
    split.
    """
    return WORD.findall(unicodedata.normalize("NFC", text).lower().replace("\u2019", "'"))


@lru_cache(2**18)
def _word_key(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())


class _Ngrams:
    """The distinct n-grams of captions, sorted by caption and key, G in all.

    Attributes:
        keys: a 64-bit hash of the words, of which no two are expected to be equal, uint64 [G].
        captions: whose they are, int64 [G].
        orders: words less one, int64 [G].
        counts: how often each one occurs in its caption, int64 [G].
        lengths: of all captions, the toolkit's measure: their bigrams, int64 [C].
    """

    def __init__(self, captions: Sequence[Sequence[str]]) -> None:
        single = np.array([_word_key(word) for text in captions for word in text], np.uint64)
        sizes = np.array([len(text) for text in captions], np.int64)
        owners, ngrams, parts = np.repeat(np.arange(len(captions)), sizes), single, []
        for order in range(ORDERS):
            if order:
                ngrams = ngrams[:-1] * MULTIPLIER + single[order:]
            inside = owners[: len(ngrams)] == owners[order:]
            here = owners[: len(ngrams)][inside]
            parts.append((here, ngrams[inside], np.full(len(here), order)))
        owners, keys, orders = map(np.concatenate, zip(*parts, strict=True))
        by_caption = np.lexsort((keys, owners))
        owners, keys, orders = owners[by_caption], keys[by_caption], orders[by_caption]
        starts = _changes(owners, keys)
        self.captions, self.keys, self.orders = owners[starts], keys[starts], orders[starts]
        self.counts = np.diff(starts, append=len(keys))
        self.lengths = np.maximum(sizes - 1, 0)


def _changes(*sorted_: np.ndarray) -> np.ndarray:
    """Return the indices at which one of several arrays of the same length has another value than
    before."""
    return np.flatnonzero(sum(np.diff(values, prepend=~values[:1]) != 0 for values in sorted_))


class CiderD:
    """Scores captions against the references of their images.

    Args:
        references: of each image of the corpus, lists of words; an n-gram's document
            frequency is the number of images with it.
    """

    def __init__(self, references: Iterable[Sequence[Sequence[str]]]) -> None:
        images = list(references)
        counts = np.array([len(captions) for captions in images], np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts)])
        """Number of each image's first reference, and their count."""
        self.ngrams = _Ngrams([caption for captions in images for caption in captions])
        owners = np.repeat(np.arange(len(images)), counts)[self.ngrams.captions]
        order = np.lexsort((owners, self.ngrams.keys))
        keys = self.ngrams.keys[order]
        once = _changes(keys, owners[order])  # for each image
        starts = _changes(keys[once])
        self.keys = np.append(keys[once][starts], LAST)
        self.frequency = np.append(np.diff(starts, append=len(once)), 1)
        weights, self.norms = self._weigh(self.ngrams)
        self.weights = np.append(weights, 0.0)
        ends = np.cumsum(np.bincount(self.ngrams.captions, minlength=self.first[-1]))
        self.starts = np.concatenate([[0], ends])
        """Index of each reference's first n-gram, and their count."""
        self.reference_keys = np.append(self.ngrams.keys, LAST)

    def describe(self) -> dict[str, float | int | str]:
        """Return the scorer's configuration."""
        return {
            "metric": "CIDEr-D",
            "orders": ORDERS,
            "sigma": SIGMA,
            "images": len(self.first) - 1,
            "ngrams": len(self.keys) - 1,
        }

    def _weigh(self, ngrams: _Ngrams) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight of each n-gram, float64 [G], and each caption's norms, [C, ORDERS]."""
        index = np.searchsorted(self.keys, ngrams.keys)
        frequency = np.where(self.keys[index] == ngrams.keys, self.frequency[index], 1)
        weights = ngrams.counts * (np.log(len(self.first) - 1) - np.log(frequency))
        return weights, np.sqrt(self._sum(ngrams, weights**2))

    @staticmethod
    def _sum(ngrams: _Ngrams, values: np.ndarray) -> np.ndarray:
        """Return the sums of values [G] for each caption and order, [C, ORDERS]."""
        rows = len(ngrams.lengths)
        bins = ngrams.captions * ORDERS + ngrams.orders
        return np.bincount(bins, values, rows * ORDERS).reshape(rows, ORDERS)

    def scores(
        self, captions: Sequence[Sequence[str]], images: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Return the score of each caption, from 0 to about 10, float64 [C].

        Args:
            captions: lists of words.
            images: the number of each caption's image in the corpus.
        """
        ours = _Ngrams(captions)
        weights, norms = self._weigh(ours)
        first, stop = self.first[np.asarray(images)], self.first[np.asarray(images) + 1]
        total = np.zeros(len(captions))
        for number in range((stop - first).max(initial=0)):
            # Whoever has fewer references meets his last one again, for nothing.
            reference = np.minimum(first + number, stop - 1)
            theirs = self._weights_of(ours.keys, reference[ours.captions])
            shared = self._sum(ours, np.minimum(weights, theirs) * theirs)
            product = norms * self.norms[reference]
            cosine = np.divide(shared, product, out=np.zeros_like(product), where=product > 0)
            difference = ours.lengths - self.ngrams.lengths[reference]
            penalty = np.exp(-(difference**2) / (2 * SIGMA**2))
            total += penalty * cosine.sum(1) * (first + number < stop)
        return 10.0 * total / ORDERS / (stop - first)

    def _weights_of(self, keys: np.ndarray, references: np.ndarray) -> np.ndarray:
        """Return the weight of each n-gram in a reference, 0 where it has none, float64 [G]."""
        low, end = self.starts[references], self.starts[references + 1]
        high = end
        while (low < high).any():  # bisection, of all at once
            middle = (low + high) // 2
            is_less = (low < high) & (self.reference_keys[middle] < keys)
            low, high = np.where(is_less, middle + 1, low), np.where(is_less, high, middle)
        return np.where((low < end) & (self.reference_keys[low] == keys), self.weights[low], 0.0)


def consensus(captions: Sequence[Sequence[str]]) -> list[list[float]]:
    """Return how well each caption of an image agrees with that image's others: the mean CIDEr-D.

    Devlin et al., 2015, "Exploring Nearest Neighbor Approaches for Image Captioning". An n-gram's
    document frequency is that among the images.

    Args:
        captions: of each image, two or more.
    """
    split = [[words(text) for text in texts] for texts in captions]
    counts = np.array([len(texts) for texts in split])
    images, counts = np.repeat(np.arange(len(split)), counts), np.repeat(counts, counts)
    scorer = CiderD(split)
    with_itself = scorer.scores([text for texts in split for text in texts], images)
    itself = 10.0 * (scorer.norms > 0).mean(1)
    agreement = iter((with_itself * counts - itself) / (counts - 1))
    return [[float(next(agreement)) for _ in texts] for texts in split]


def corpus_cider(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> float:
    """Return the mean CIDEr of plainly split captions, the references themselves the corpus.

    Args:
        captions: by image.
        references: by image, those of `captions`.
    """
    scorer = CiderD([words(text) for text in references[key]] for key in captions)
    split = [words(caption) for caption in captions.values()]
    return float(scorer.scores(split, range(len(split))).mean())
