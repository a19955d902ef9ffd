"""The promotion rule: which candidate wins, and whether it takes the champion's place. Pure
functions."""

from collections.abc import Sequence

from model_lib.errors import UserError
from model_lib.evaluate.result import Decision, Evaluation, EvaluationResult
from model_lib.registry.config import Policy
from model_lib.scores.significance import Comparison, compare

COMPARABLE = ("data_fingerprint", "split", "images", "tokenizer", "decoding", "clip")
"""What two evaluations must have in common before their scores may be compared."""


def score_of(evaluation: Evaluation, metric: str) -> float:
    """Return the deciding score; `UserError` if the evaluation lacks it."""
    if metric not in evaluation.scores:
        why = evaluation.missing.get(metric, f"only {', '.join(evaluation.scores)} were computed")
        raise UserError(
            f"metric {metric}: the evaluation of {evaluation.model} has no such score: {why}"
        )
    return evaluation.scores[metric]


def require_comparable(results: Sequence[EvaluationResult]) -> None:
    """Raise `UserError` unless all were evaluated on the same images in the same way."""
    first = results[0]
    for other in results[1:]:
        both = f"evaluations of {first.evaluation.model} and {other.evaluation.model}"
        for name in COMPARABLE:
            ours, theirs = getattr(first.evaluation, name), getattr(other.evaluation, name)
            if ours != theirs:
                raise UserError(
                    f"{both} differ in {name} ({ours} and {theirs}); evaluate both on the same "
                    "data with the same options"
                )
        if first.predictions.image_ids != other.predictions.image_ids:
            raise UserError(f"{both} are of other images; evaluate both on the same data")


def choose_winner(candidates: Sequence[EvaluationResult], metric: str) -> EvaluationResult:
    """Return the candidate with the highest score; among equals the first by name, then by
    place."""
    require_comparable(candidates)

    def rank(candidate: EvaluationResult) -> tuple[float, str, str]:
        evaluation = candidate.evaluation
        return -score_of(evaluation, metric), evaluation.name, evaluation.model

    return min(candidates, key=rank)


def decide(
    champion: EvaluationResult | None, challenger: EvaluationResult, policy: Policy
) -> Decision:
    """Compare the challenger with the champion, both evaluated on the same images with the same
    code.

    It is promoted if it is better by the minimum gain, if the gain is significant, and if no guard
    says no: another score that falls for certain and by more than the policy allows, or captioning
    that is much slower.

    Args:
        champion: None if there is none yet.
        challenger: the winner among the candidates.
        policy: what is asked of it.

    Raises:
        UserError: the two cannot be compared, or lack the score that decides.
    """
    name, metric = challenger.evaluation.name, policy.metric
    new = score_of(challenger.evaluation, metric)
    if champion is None:
        return Decision(True, f"{name} has {metric} {new:.4f} and there was no champion yet")
    require_comparable([champion, challenger])
    score_of(champion.evaluation, metric)
    compared = compare(challenger.predictions.statistics, champion.predictions.statistics)
    one = compared[metric]
    said = (
        f"{name} has {metric} {one.new:.4f}, the champion {one.old:.4f} on the same images "
        f"({one.gain:+.4f}, 95 % interval {one.low:+.4f} to {one.high:+.4f})"
    )
    if one.gain <= 0 or one.gain < policy.min_gain:
        needed = "more" if policy.min_gain == 0 else f"{policy.min_gain:+.4f}"
        reason, promote = f"{said}; it needed {needed}", False
    elif not one.significant:
        reason, promote = f"{said}; that is not statistically significant", False
    elif guarded := _guards(
        champion.evaluation, challenger.evaluation, list(compared.values()), policy
    ):
        reason, promote = f"{said}, but {'; '.join(guarded)}", False
    else:
        reason, promote = said, True
    return Decision(promote, reason, list(compared.values()))


def _guards(
    champion: Evaluation, challenger: Evaluation, compared: Sequence[Comparison], policy: Policy
) -> list[str]:
    """Return what forbids the promotion."""
    found = [
        f"its {one.metric} falls from {one.old:.4f} to {one.new:.4f}, by more than "
        f"{policy.max_regression:.0%}"
        for one in compared
        if one.metric != policy.metric
        and one.high < 0
        and one.new < one.old * (1 - policy.max_regression)
    ]
    old, new = champion.images_per_second, challenger.images_per_second
    if old is not None and new is not None and new < old * (1 - policy.max_slowdown):
        found.append(f"it captions {new:,.1f} images per second where the champion does {old:,.1f}")
    return found
