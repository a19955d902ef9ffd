"""The promotion rule: better, worse, equal, noisy, guarded, missing, not comparable."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model_lib import UserError
from model_lib.evaluate.result import Evaluation, EvaluationResult, Predictions
from model_lib.registry.config import Policy
from model_lib.registry.promotion import choose_winner, decide
from model_lib.scores.significance import corpus_scores, intervals

IMAGES = 200


def evaluated(
    cider: float, name: str = "a", noise: float = 0.0, rouge: float = 0.3, **changes: Any
) -> EvaluationResult:
    """Return a model's result: its images have these scores on average, and the same ups and downs
    but `noise`."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 0.3, (IMAGES, 1))
    own = np.random.default_rng(len(name) + 1).normal(0, 1, (IMAGES, 1)) * noise
    statistics = {
        "CIDEr": cider + (hard - hard.mean()) + (own - own.mean()),
        "ROUGE_L": np.full((IMAGES, 1), rouge),
    }
    evaluation = Evaluation(
        name=name,
        model=f"runs/{name}",
        split="val",
        images=IMAGES,
        scores=corpus_scores(statistics),
        intervals=intervals(statistics),
        shuffled_cider=0.1,
        frequencies="these",
        diversity={},
        tokenizer="PTB",
        missing={},
        decoding={"num_beams": 5},
        images_per_second=10.0,
        data_fingerprint="f",
    )
    texts = ["a dog"] * IMAGES
    images = Predictions(list(range(IMAGES)), texts, texts, [texts[:1]] * IMAGES, statistics)
    return EvaluationResult(replace(evaluation, **changes), images)


@pytest.mark.parametrize(
    ("champion", "challenger", "min_gain", "promoted"),
    [
        (None, 0.1, 0.0, True),
        (1.0, 1.1, 0.0, True),
        (1.0, 0.9, 0.0, False),
        (1.0, 1.0, 0.0, False),
        (1.0, 1.1, 0.2, False),
        (1.0, 1.251, 0.25, True),
    ],
)
def test_the_champion_falls_only_to_a_better_one(
    champion: float | None, challenger: float, min_gain: float, promoted: bool
) -> None:
    present = None if champion is None else evaluated(champion, "champion")
    decision = decide(present, evaluated(challenger), Policy(min_gain=min_gain))
    assert decision.promote == promoted
    assert decision.reason


def test_a_difference_that_other_images_would_not_show_is_chance() -> None:
    champion = evaluated(1.0, "champion")
    noisy = decide(champion, evaluated(1.02, "noisy", noise=0.5), Policy())
    assert not noisy.promote and "not statistically significant" in noisy.reason
    steady = decide(champion, evaluated(1.02, "steady", noise=0.05), Policy())
    assert steady.promote
    (found,) = (one for one in steady.comparisons if one.metric == "CIDEr")
    assert found.significant and found.low < 0.02 < found.high and found.p < 0.05


def test_a_guard_keeps_the_champion() -> None:
    champion = evaluated(1.0, "champion")
    worse = decide(champion, evaluated(1.5, rouge=0.28), Policy())
    assert (
        not worse.promote
        and "its ROUGE_L falls from 0.3000 to 0.2800, by more than 5%" in worse.reason
    )
    assert decide(champion, evaluated(1.5, rouge=0.28), Policy(max_regression=0.1)).promote
    slow = decide(champion, evaluated(1.5, images_per_second=4.0), Policy())
    assert (
        not slow.promote
        and "it captions 4.0 images per second where the champion does 10.0" in slow.reason
    )
    assert decide(champion, evaluated(1.5, images_per_second=4.0), Policy(max_slowdown=0.7)).promote


def test_the_decision_says_both_scores_and_how_sure_they_are() -> None:
    reason = decide(evaluated(1.0), evaluated(1.1, "new"), Policy()).reason
    assert "new has CIDEr 1.1000, the champion 1.0000" in reason
    assert "(+0.1000, 95 % interval +0.1000 to +0.1000)" in reason


def test_another_score_may_decide() -> None:
    assert not decide(evaluated(1.0), evaluated(2.0, rouge=0.2), Policy(metric="ROUGE_L")).promote
    assert decide(evaluated(1.0), evaluated(0.97, rouge=0.4), Policy(metric="ROUGE_L")).promote


@pytest.mark.parametrize(
    "change",
    [
        {"data_fingerprint": "g"},
        {"split": "test"},
        {"images": 499},
        {"tokenizer": "plain"},
        {"decoding": {}},
        {"clip": "x"},
    ],
)
def test_what_was_evaluated_differently_is_not_compared(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        decide(evaluated(1.0), evaluated(2.0, **change), Policy())
    with pytest.raises(UserError, match=next(iter(change))):
        choose_winner([evaluated(1.0), evaluated(2.0, **change)], "CIDEr")


def test_other_images_are_not_compared() -> None:
    other = evaluated(2.0)
    moved = EvaluationResult(
        other.evaluation, replace(other.predictions, image_ids=list(range(1, IMAGES + 1)))
    )
    with pytest.raises(UserError, match="are of other images"):
        decide(evaluated(1.0), moved, Policy())


def test_a_missing_score_is_named() -> None:
    with pytest.raises(UserError, match=r"METEOR.*needs Java"):
        choose_winner([evaluated(1.0, missing={"METEOR": "needs Java"})], "METEOR")
    with pytest.raises(UserError, match=r"SPICE.*only CIDEr, ROUGE_L were computed"):
        decide(evaluated(1.0), evaluated(1.0), Policy(metric="SPICE"))


def test_the_winner_is_the_best_and_among_equals_the_first_by_name() -> None:
    rows = [evaluated(1.0, "b"), evaluated(2.0, "d"), evaluated(2.0, "c")]
    for order in (rows, rows[::-1]):
        assert choose_winner(order, "CIDEr").evaluation.name == "c"
