"""The promotion rule: which candidate wins, and when it replaces the champion."""

from dataclasses import replace

import pytest

from model_lib import UserError
from model_lib.registry.config import Policy
from model_lib.registry.promotion import choose_winner, decide
from tests.helpers.evaluations import IMAGES, evaluated


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
def test_only_a_better_candidate_replaces_the_champion(
    champion: float | None, challenger: float, min_gain: float, promoted: bool
) -> None:
    present = None if champion is None else evaluated(champion, "champion")
    decision = decide(present, evaluated(challenger), Policy(min_gain=min_gain))
    assert decision.promote == promoted


def test_a_gain_must_be_statistically_significant() -> None:
    champion = evaluated(1.0, "champion")
    noisy = decide(champion, evaluated(1.02, "noisy", noise=0.5), Policy())
    assert not noisy.promote and "not statistically significant" in noisy.reason
    steady = decide(champion, evaluated(1.02, "steady", noise=0.05), Policy())
    assert steady.promote
    assert "steady has CIDEr 1.0200, the champion 1.0000 on the same images (+0.0200, 95 %" in (
        steady.reason
    )
    cider = next(row for row in steady.comparisons if row.metric == "CIDEr")
    assert 0 < cider.low < 0.02 < cider.high and cider.p < 0.05


def test_a_regression_of_another_score_or_of_speed_keeps_the_champion() -> None:
    champion = evaluated(1.0, "champion")
    worse, slow = evaluated(1.5, rouge=0.28), evaluated(1.5, images_per_second=4.0)
    decision = decide(champion, worse, Policy())
    assert not decision.promote
    assert "its ROUGE_L falls from 0.3000 to 0.2800, by more than 5%" in decision.reason
    assert decide(champion, worse, Policy(max_regression=0.1)).promote
    decision = decide(champion, slow, Policy())
    assert not decision.promote
    assert "captions 4.0 images per second where the champion does 10.0" in decision.reason
    assert decide(champion, slow, Policy(max_slowdown=0.7)).promote


def test_another_score_may_decide() -> None:
    assert not decide(evaluated(1.0), evaluated(2.0, rouge=0.2), Policy(metric="ROUGE_L")).promote
    assert decide(evaluated(1.0), evaluated(0.97, rouge=0.4), Policy(metric="ROUGE_L")).promote


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_fingerprint", "g"),
        ("split", "test"),
        ("images", 499),
        ("tokenizer", "plain"),
        ("decoding", {}),
        ("clip", "x"),
    ],
)
def test_evaluations_with_different_options_are_not_compared(name: str, value: object) -> None:
    one, other = evaluated(1.0), evaluated(2.0, **{name: value})
    with pytest.raises(UserError, match=f"differ in {name}"):
        decide(one, other, Policy())
    with pytest.raises(UserError, match=f"differ in {name}"):
        choose_winner([one, other], "CIDEr")


def test_evaluations_of_different_images_are_not_compared() -> None:
    other = evaluated(2.0)
    predictions = replace(other.predictions, image_ids=list(range(1, IMAGES + 1)))
    moved = replace(other, predictions=predictions)
    with pytest.raises(UserError, match="are of different images"):
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
