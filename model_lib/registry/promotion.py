"""The promotion rule: which candidate wins, and whether it replaces the champion.

Pure functions.
"""

from collections.abc import Sequence

from model_lib.evaluate.result import (
    Decision,
    Evaluation,
    EvaluationResult,
    require_comparable,
)
from model_lib.options import require
from model_lib.registry.config import Policy
from model_lib.scores.significance import Comparison, compare


def score_of(evaluation: Evaluation, metric: str) -> float:
    """Return the deciding score; `UserError` if the evaluation lacks it."""
    computed = f"only {', '.join(evaluation.scores)} were computed"
    reason = evaluation.missing.get(metric, computed)
    message = f"the evaluation of {evaluation.model} has no such score: {reason}"
    require(metric in evaluation.scores, f"metric {metric}: {message}")
    return evaluation.scores[metric]


def choose_winner(candidates: Sequence[EvaluationResult], metric: str) -> EvaluationResult:
    """Return the candidate with the highest score; among equals the first by name and model."""
    require_comparable(candidates)

    def rank(candidate: EvaluationResult) -> tuple[float, str, str]:
        evaluation = candidate.evaluation
        return -score_of(evaluation, metric), evaluation.name, evaluation.model

    return min(candidates, key=rank)


def decide(
    champion: EvaluationResult | None, challenger: EvaluationResult, policy: Policy
) -> Decision:
    """Decide whether the challenger replaces the champion, both evaluated on the same images.

    It does if its deciding score is higher by `policy.min_gain`, if that gain is statistically
    significant, and if nothing forbids it: another score that falls significantly and by more than
    the policy allows, or captioning that is much slower.

    Args:
        champion: None if there is none yet.
        challenger: the winner among the candidates.
        policy: for the promotion.

    Raises:
        UserError: the two cannot be compared, or lack the deciding score.
    """
    name, metric = challenger.evaluation.name, policy.metric
    score = score_of(challenger.evaluation, metric)
    if champion is None:
        return Decision(True, f"{name} has {metric} {score:.4f} and there was no champion yet")
    require_comparable([champion, challenger])
    score_of(champion.evaluation, metric)
    compared = compare(challenger.predictions.statistics, champion.predictions.statistics)
    comparisons = list(compared.values())
    gain = compared[metric]
    reason = (
        f"{name} has {metric} {gain.new:.4f}, the champion {gain.old:.4f} on the same images "
        f"({gain.gain:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f})"
    )
    if gain.gain <= 0 or gain.gain < policy.min_gain:
        needed = "more" if policy.min_gain == 0 else f"{policy.min_gain:+.4f}"
        return Decision(False, f"{reason}; it needed {needed}", comparisons)
    if gain.low <= 0:
        return Decision(False, f"{reason}; that is not statistically significant", comparisons)
    if regressions := _regressions(champion.evaluation, challenger.evaluation, comparisons, policy):
        return Decision(False, f"{reason}, but {'; '.join(regressions)}", comparisons)
    return Decision(True, reason, comparisons)


def _regressions(
    champion: Evaluation, challenger: Evaluation, comparisons: list[Comparison], policy: Policy
) -> list[str]:
    """Return what forbids the promotion."""
    regressions = [
        f"its {other.metric} falls from {other.old:.4f} to {other.new:.4f}, by more than "
        f"{policy.max_regression:.0%}"
        for other in comparisons
        if other.metric != policy.metric
        and other.high < 0
        and other.new < other.old * (1 - policy.max_regression)
    ]
    old, new = champion.images_per_second, challenger.images_per_second
    if old is not None and new is not None and new < old * (1 - policy.max_slowdown):
        speeds = f"{new:,.1f} images per second where the champion does {old:,.1f}"
        regressions.append(f"it captions {speeds}")
    return regressions
