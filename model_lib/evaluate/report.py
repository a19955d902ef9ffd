"""The page of an evaluation: the decision, scores with intervals against the champion, curves, and
images.

It loads nothing from elsewhere, so it works in a sandboxed frame and without a network.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from model_lib.evaluate.gallery import make_cards
from model_lib.evaluate.result import FEW_IMAGES, MAIN, Decision, Evaluation, EvaluationResult
from model_lib.pages.charts import Chart, Series, line_chart
from model_lib.pages.page import render_page
from model_lib.scores.significance import Comparison, compare

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
CHARTS = {
    "Loss": {"train_loss": "train", "val_loss": "val"},
    MAIN: {"train_slice_CIDEr": "slice of train", "val_slice_CIDEr": "slice of val"},
}
"""For each chart the metrics of training, and the split that they were measured on."""
DIVERSITY = {
    "distinct": ("Distinct captions", "{:.1%}", "different ones, of all captions"),
    "vocabulary": ("Vocabulary", "{:,.0f}", "different words in all captions"),
    "words": ("Words a caption", "{:.1f}", "mean length"),
    "ended": ("Complete captions", "{:.1%}", "ended before the longest length"),
    "memorised": ("Memorised captions", "{:.1%}", "in the training set word for word"),
}
SPEED = {"images_per_second": ("Images per second", "{:,.1f}", "captioning without scoring")}
UNKNOWN = "–"


@dataclass(frozen=True)
class _Model:
    """A model on the page."""

    role: str
    evaluation: Evaluation
    colour: int
    curves: Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class _Row:
    """A score in the table."""

    name: str
    explanation: str
    values: list[str]
    """One for each model."""
    ranges: list[str]
    """Their intervals; empty where unknown."""
    comparison: Comparison | None = None
    """With the champion."""
    comparisons: list[Comparison | None] = field(default_factory=list)
    """One for each model: the first less that model; None for the first and the champion."""


def render_report(
    result: EvaluationResult,
    *,
    others: Sequence[EvaluationResult] = (),
    champion: EvaluationResult | None = None,
    decision: Decision | None = None,
    curves: Curves | None = None,
) -> str:
    """Return the page.

    Args:
        result: of the model that the page is about.
        others: of other models, on the same images: candidates, or those to compare with.
        champion: of the present champion, on the same images.
        decision: whether the model becomes the champion, and why.
        curves: for each training's MLflow run its metrics, each a list of step and value.
    """
    compared: dict[str, Comparison] = {}
    if decision is not None and decision.comparisons:
        compared = {comparison.metric: comparison for comparison in decision.comparisons}
    elif champion is not None and champion.predictions.image_ids == result.predictions.image_ids:
        compared = compare(result.predictions.statistics, champion.predictions.statistics)
    is_candidate = decision is not None or champion is not None
    role = "candidate" if is_candidate else "model"
    roles = [(role, result), *((f"other {role}", other) for other in others)]
    against = [
        compare(result.predictions.statistics, other.predictions.statistics) for other in others
    ]
    if champion is not None:
        replaced = decision is not None and decision.promote
        roles.append(("champion until now" if replaced else "champion", champion))
    models = []
    for colour, (role, evaluated) in enumerate(roles):
        run_id = evaluated.evaluation.mlflow_run_id or ""
        models.append(_Model(role, evaluated.evaluation, colour, (curves or {}).get(run_id, {})))
    return render_page(
        "report.html",
        evaluation=result.evaluation,
        few=FEW_IMAGES,
        decision=decision,
        models=models,
        main=MAIN,
        scale=_scale(models),
        rows=_score_rows(models, compared, against),
        habits=_habit_rows(models),
        charts=_charts(models),
        cards=make_cards(result.predictions, None if champion is None else champion.predictions),
        champion=champion is not None,
        others=bool(others),
    )


def _scale(models: Sequence[_Model]) -> float:
    """Return the CIDEr at the end of the axis on which all models' intervals are drawn."""
    ends = [1e-9]
    for evaluation in (model.evaluation for model in models):
        ends += [evaluation.scores[MAIN], evaluation.shuffled_cider]
        ends += evaluation.intervals.get(MAIN, ())
    return max(1.05 * end for end in ends if math.isfinite(end))


def _score_rows(
    models: Sequence[_Model],
    compared: Mapping[str, Comparison],
    against: Sequence[Mapping[str, Comparison]],
) -> list[_Row]:
    """Return a row for each score that any model has, CIDEr and the shuffled one first.

    Args:
        models: the first is the one that the page is about; the last may be the champion.
        compared: the first's scores with the champion's, by name.
        against: with those of each other model.
    """
    evaluations = [model.evaluation for model in models]
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation.scores)
    rows = []
    for name in sorted(names, key=lambda name: name != MAIN):
        values = [_text(evaluation.scores.get(name), "{:.3f}") for evaluation in evaluations]
        intervals = [evaluation.intervals.get(name) for evaluation in evaluations]
        ranges = ["" if ends is None else "{:.3f} to {:.3f}".format(*ends) for ends in intervals]
        comparisons = [None, *(others.get(name) for others in against)]
        comparisons += [None] * (len(models) - len(comparisons))
        row = _Row(name.replace("_", "-"), "", values, ranges, compared.get(name), comparisons)
        rows.append(row)
        if name == MAIN:
            values = [_text(evaluation.shuffled_cider, "{:.3f}") for evaluation in evaluations]
            explanation = "against other images' references"
            rows.append(_Row(f"{MAIN}, shuffled", explanation, values, [""] * len(models)))
    return rows


def _habit_rows(models: Sequence[_Model]) -> list[_Row]:
    """Return a row for each figure of a model that is not a score."""
    figures = [
        {**model.evaluation.diversity, "images_per_second": model.evaluation.images_per_second}
        for model in models
    ]
    rows = []
    for name, (label, form, explanation) in (DIVERSITY | SPEED).items():
        values = [_text(values.get(name), form) for values in figures]
        if set(values) != {UNKNOWN}:
            rows.append(_Row(label, explanation, values, []))
    return rows


def _text(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else form.format(value)


def _charts(models: Sequence[_Model]) -> list[Chart]:
    charts = []
    for title, metrics in CHARTS.items():
        series = []
        for model in models:
            for metric in sorted(metrics.keys() & model.curves.keys()):
                label = f"{model.evaluation.name}, {metrics[metric]}"
                faint = metric.startswith("train")
                series.append(Series(label, model.colour, faint, model.curves[metric]))
        charts.append(line_chart(title, "step", series))
    return [chart for chart in charts if chart is not None]
