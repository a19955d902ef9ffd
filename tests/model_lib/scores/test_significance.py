"""How sure a score is: against scipy's bootstrap, and against what is known of the data."""

import numpy as np
import pytest
from scipy import stats

from model_lib.scores.significance import bleu, compare, intervals, meteor


def scores(mean: float, images: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.0, mean, (images, 1))


def test_intervals_of_a_mean_are_those_of_scipy() -> None:
    values = scores(1.0, 400, 0)
    low, high = intervals({"CIDEr": values})["CIDEr"]
    rng = np.random.default_rng(1)
    theirs = stats.bootstrap((values[:, 0],), np.mean, method="percentile", rng=rng)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_intervals_of_bleu_are_those_of_its_definition() -> None:
    """Each round draws the images and computes the score."""
    rng = np.random.default_rng(2)
    length = rng.integers(5, 15, 80)
    ngrams = np.maximum(length[:, None] - np.arange(4), 0)
    matches = rng.binomial(ngrams, [0.7, 0.5, 0.3, 0.2])
    counts = np.column_stack([length, length + 1, ngrams, matches]).astype(float)
    drawn = [bleu(counts[rng.integers(0, 80, 80)].sum(0))[3] for _ in range(4000)]
    expected = np.quantile(drawn, [0.025, 0.975])
    assert intervals({"Bleu": counts})["Bleu_4"] == pytest.approx(expected, abs=0.01)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    held = 0
    for seed in range(100):
        low, high = intervals({"CIDEr": scores(1.0, 200, seed)})["CIDEr"]
        held += low <= 1.0 <= high
    assert 88 <= held <= 99


def test_what_makes_an_image_hard_cancels_out() -> None:
    hard = scores(1.0, 300, 3)
    better = compare({"CIDEr": hard + 0.02}, {"CIDEr": hard})["CIDEr"]
    assert better.significant and better.gain == pytest.approx(0.02) and better.p < 0.01
    low, high = intervals({"CIDEr": hard})["CIDEr"]
    assert high - low > 0.1  # alone, neither score is known so well


def test_equal_and_unrelated_models_do_not_differ() -> None:
    values = scores(1.0, 300, 4)
    same = compare({"CIDEr": values}, {"CIDEr": values.copy()})["CIDEr"]
    assert not same.significant and same.gain == 0 and same.p == 1
    significant = 0
    for seed in range(60):
        new, old = scores(1.0, 100, 2 * seed), scores(1.0, 100, 2 * seed + 1)
        significant += compare({"CIDEr": new}, {"CIDEr": old})["CIDEr"].significant
    assert significant <= 9  # about 3 of 60 by chance


def test_nothing_said_scores_nothing() -> None:
    assert meteor(np.zeros(23)) == 0
    assert bleu(np.array([0.0, 5.0, *[0.0] * 8])) == pytest.approx([0] * 4, abs=1e-9)
