"""The diversity of captions: how many differ, and how many are copies of training captions."""

from collections.abc import Iterable, Sequence

from model_lib.scores.cider import words


def describe(
    captions: Sequence[str], ended: Sequence[bool], training: Iterable[str] | None
) -> dict[str, float]:
    """Return the captions' diversity; captions are compared by their words alone.

    Args:
        captions: one per image.
        ended: whether each ended by itself, rather than at the longest length; empty if unknown.
        training: the captions of the training images; None if unknown.

    Returns:
        `distinct`, the share of captions that differ from all before them; `vocabulary`, the number
        of different words; `words`, the mean length; and, where known, `ended` and `memorised`, the
        shares of captions that ended by themselves, and that are in the training set word for word.
    """
    split = [tuple(words(caption)) for caption in captions]
    distinct = set(split)
    values = {
        "distinct": len(distinct) / len(split),
        "vocabulary": float(len({word for caption in distinct for word in caption})),
        "words": sum(map(len, split)) / len(split),
    }
    if ended:
        values["ended"] = sum(ended) / len(ended)
    if training is not None:
        known = distinct.intersection(tuple(words(caption)) for caption in training)
        values["memorised"] = sum(caption in known for caption in split) / len(split)
    return values
