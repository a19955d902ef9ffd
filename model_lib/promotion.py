"""The promotion rule: which candidate wins, and whether it takes the champion's place. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from model_lib.errors import UserError
from model_lib.evaluation import Evaluation

COMPARABLE = ("data_fingerprint", "split", "pictures", "tokenizer", "decoding")
"""What two evaluations must have in common before their scores may be compared."""


@dataclass(frozen=True)
class Decision:
    """Whether the challenger becomes the champion, and why, in a sentence."""

    promote: bool
    reason: str


def score_of(evaluation: Evaluation, metric: str) -> float:
    """Return the deciding score; `UserError` if the evaluation lacks it."""
    if metric not in evaluation.scores:
        why = evaluation.missing.get(metric, f"only {', '.join(evaluation.scores)} were computed")
        raise UserError(f"metric {metric}: the evaluation of {evaluation.model} has no such score: {why}")
    return evaluation.scores[metric]


def require_comparable(evaluations: Sequence[Evaluation]) -> None:
    """Raise `UserError` unless all were judged on the same pictures in the same way."""
    first = evaluations[0]
    for other in evaluations[1:]:
        for name in COMPARABLE:
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                raise UserError(
                    f"evaluations of {first.model} and {other.model} differ in {name} ({ours} and {theirs}); "
                    "judge both on the same data with the same options"
                )


def choose_winner(candidates: Sequence[Evaluation], metric: str) -> Evaluation:
    """Return the candidate with the highest score; among equals the first by name, then by place."""
    require_comparable(candidates)

    def rank(candidate: Evaluation) -> tuple[float, str, str]:
        score = score_of(candidate, metric)
        return (math.inf if math.isnan(score) else -score, candidate.name, candidate.model)

    return min(candidates, key=rank)


def decide(champion: Evaluation | None, challenger: Evaluation, metric: str, min_gain: float) -> Decision:
    """Compare the challenger with the champion, both judged on the same pictures.

    Args:
        champion: None if there is none yet.
        challenger: the winner among the candidates.
        metric: name of the score, higher is better.
        min_gain: how much better the challenger must be, on the metric's scale.
    """
    new = score_of(challenger, metric)
    if math.isnan(new):
        return Decision(False, f"{challenger.name} has no valid {metric}")
    if champion is None:
        return Decision(True, f"{challenger.name} has {metric} {new:.4f} and there was no champion yet")
    require_comparable([champion, challenger])
    old = score_of(champion, metric)
    gain = new - old
    compared = f"{challenger.name} has {metric} {new:.4f}, the champion {old:.4f} on the same pictures ({gain:+.4f})"
    if gain > 0 and gain >= min_gain:
        return Decision(True, compared)
    return Decision(False, f"{compared}; it needed {'more' if min_gain == 0 else f'{min_gain:+.4f}'}")
