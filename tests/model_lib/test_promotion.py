"""The promotion rule: better, worse, equal, missing, not comparable."""

from dataclasses import replace
from typing import Any

import pytest

from model_lib import UserError
from model_lib.evaluation import Evaluation
from model_lib.promotion import choose_winner, decide


def judged(cider: float, name: str = "a", **changes: Any) -> Evaluation:
    made = Evaluation(
        name=name,
        model=f"runs/{name}",
        split="val",
        pictures=500,
        scores={"CIDEr": cider, "Bleu_4": 0.3},
        shuffled_cider=0.1,
        tokenizer="PTB",
        missing={},
        decoding={"num_beams": 5},
        data_fingerprint="f",
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("champion", "challenger", "min_gain", "promoted"),
    [
        (None, 0.1, 0.0, True),
        (1.0, 1.1, 0.0, True),
        (1.0, 0.9, 0.0, False),
        (1.0, 1.0, 0.0, False),
        (1.0, 1.1, 0.2, False),
        (1.0, 1.25, 0.25, True),
        (1.0, float("nan"), 0.0, False),
        (None, float("nan"), 0.0, False),
    ],
)
def test_the_champion_falls_only_to_a_better_one(
    champion: float | None, challenger: float, min_gain: float, promoted: bool
) -> None:
    present = None if champion is None else judged(champion, "champion")
    decision = decide(present, judged(challenger), "CIDEr", min_gain)
    assert decision.promote == promoted
    assert decision.reason


def test_the_decision_says_both_scores() -> None:
    reason = decide(judged(1.0), judged(1.1, "new"), "CIDEr", 0.0).reason
    assert "new has CIDEr 1.1000, the champion 1.0000" in reason and "+0.1000" in reason


def test_another_score_may_decide() -> None:
    worse_bleu = judged(2.0, scores={"CIDEr": 2.0, "Bleu_4": 0.2})
    assert not decide(judged(1.0), worse_bleu, "Bleu_4", 0.0).promote


@pytest.mark.parametrize(
    "change",
    [{"data_fingerprint": "g"}, {"split": "test"}, {"pictures": 499}, {"tokenizer": "plain"}, {"decoding": {}}],
)
def test_what_was_judged_differently_is_not_compared(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        decide(judged(1.0), judged(2.0, **change), "CIDEr", 0.0)
    with pytest.raises(UserError, match=next(iter(change))):
        choose_winner([judged(1.0), judged(2.0, **change)], "CIDEr")


def test_a_missing_score_is_named() -> None:
    with pytest.raises(UserError, match=r"METEOR.*needs Java"):
        choose_winner([judged(1.0, missing={"METEOR": "needs Java"})], "METEOR")


def test_the_winner_is_the_best_and_among_equals_the_first_by_name() -> None:
    rows = [judged(1.0, "b"), judged(2.0, "d"), judged(2.0, "c"), judged(float("nan"), "a")]
    for order in (rows, rows[::-1]):
        assert choose_winner(order, "CIDEr").name == "c"
