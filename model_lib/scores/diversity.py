"""What a set of captions is like as a whole: how much of it is said again and again, and how much
by heart."""

from collections.abc import Iterable, Sequence

from model_lib.scores.cider import words


def describe(
    captions: Sequence[str], ended: Sequence[bool], learned: Iterable[str] | None
) -> dict[str, float]:
    """Return the captions' diversity; captions are compared by their words alone.

    Args:
        captions: one per image.
        ended: whether each ended by itself, rather than at the longest length; empty where that is
            not known.
        learned: the captions of the training images, or None where they are not known.

    Returns:
        `distinct`, the share of captions that differ from all before them; `vocabulary`, how many
        words they use; `words`, their mean length; and, where known, `ended` and `learned`, the
        shares of captions that ended by themselves and that stand in the training set word for
        word.
    """
    split = [tuple(words(caption)) for caption in captions]
    found = {
        "distinct": len(set(split)) / len(split),
        "vocabulary": float(len({word for caption in split for word in caption})),
        "words": sum(map(len, split)) / len(split),
    }
    if ended:
        found["ended"] = sum(ended) / len(ended)
    if learned is not None:
        wanted = set(split)
        known = wanted.intersection(tuple(words(caption)) for caption in learned)
        found["learned"] = sum(caption in known for caption in split) / len(split)
    return found
