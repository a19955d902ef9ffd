"""The page of an evaluation: the decision, scores with intervals against the champion, curves, and
images.

Nothing in it is asked for from elsewhere, so it shows in a sandboxed frame and without a network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model_lib.evaluate.gallery import cards
from model_lib.evaluate.result import FEW_IMAGES, MAIN, Decision, Evaluation, EvaluationResult
from model_lib.pages.charts import Chart, Series, line_chart
from model_lib.pages.page import render_page
from model_lib.scores.significance import Comparison, compare

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
CHARTS = {
    "Loss": {"train_loss": "train", "val_loss": "val"},
    MAIN: {"train_slice_CIDEr": "slice of train", "val_slice_CIDEr": "slice of val"},
}
"""For each chart the metrics of training that it shows, and the split that they were measured
on."""
DIVERSITY = {
    "distinct": ("Distinct captions", "{:.1%}", "different captions, of all"),
    "vocabulary": ("Vocabulary", "{:,.0f}", "different words in all captions"),
    "words": ("Words a caption", "{:.1f}", "mean length"),
    "ended": ("Complete captions", "{:.1%}", "not cut at the most tokens"),
    "learned": ("Known by heart", "{:.1%}", "in the training set word for word"),
}


@dataclass(frozen=True)
class _Model:
    """A model on the page."""

    role: str
    evaluation: Evaluation
    colour: int


@dataclass(frozen=True)
class _Row:
    """A score in the table."""

    name: str
    explanation: str
    values: list[str]
    """A model each."""
    ranges: list[str]
    """Their intervals, as far as known."""
    comparison: Comparison | None = None


def render_report(
    result: EvaluationResult,
    *,
    others: Sequence[EvaluationResult] = (),
    champion: EvaluationResult | None = None,
    decision: Decision | None = None,
    curves: Curves | None = None,
) -> str:
    """Return the page; captions stand in it as text, whatever they hold.

    Args:
        result: of the model that the page is about.
        others: of the other candidates, on the same images.
        champion: of the present champion, on the same images.
        decision: whether the model takes the champion's place, and why.
        curves: for each training's MLflow run its metrics, each a list of step and value.
    """
    compared: dict[str, Comparison] = {}
    if decision is not None and decision.comparisons:
        compared = {one.metric: one for one in decision.comparisons}
    elif champion is not None and champion.predictions.image_ids == result.predictions.image_ids:
        compared = compare(result.predictions.statistics, champion.predictions.statistics)
    evaluated = [("candidate", result), *(("other candidate", other) for other in others)]
    if champion is not None:
        evaluated.append(
            (
                "champion until now" if decision is not None and decision.promote else "champion",
                champion,
            )
        )
    models = [_Model(role, one.evaluation, colour) for colour, (role, one) in enumerate(evaluated)]
    return render_page(
        "report.html",
        evaluation=result.evaluation,
        few=FEW_IMAGES,
        decision=decision,
        models=models,
        main=MAIN,
        compared=compared,
        scale=_scale(models),
        rows=_scores(models, compared),
        habits=_habits(models),
        charts=_charts(curves or {}, models),
        cards=cards(result.predictions, champion.predictions if champion is not None else None),
        champion=champion is not None,
    )


def _scale(models: Sequence[_Model]) -> float:
    """Return the CIDEr at the end of the axis on which all models' intervals are drawn."""
    ends = [one.evaluation.intervals.get(MAIN, (0.0, 0.0))[1] for one in models]
    ends += [
        value
        for one in models
        for value in (one.evaluation.scores[MAIN], one.evaluation.shuffled_cider)
    ]
    return max(1e-9, *(1.05 * end for end in ends if end == end))


def _scores(models: Sequence[_Model], compared: Mapping[str, Comparison]) -> list[_Row]:
    """Return a row for each score that any model has, CIDEr and what shuffling leaves of it
    first."""
    known = dict.fromkeys(name for one in models for name in one.evaluation.scores)
    rows = []
    for name in sorted(known, key=lambda name: name != MAIN):
        values, ranges = [], []
        for one in models:
            value, ends = one.evaluation.scores.get(name), one.evaluation.intervals.get(name)
            values.append("–" if value is None else f"{value:.3f}")
            ranges.append("" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}")
        rows.append(_Row(name.replace("_", "-"), "", values, ranges, compared.get(name)))
        if name == MAIN:
            values = [f"{one.evaluation.shuffled_cider:.3f}" for one in models]
            what = "against other images' references"
            rows.append(_Row(f"{MAIN}, shuffled", what, values, [""] * len(models)))
    return rows


def _habits(models: Sequence[_Model]) -> list[_Row]:
    """Return a row for each figure about a model that is not a score."""
    empty = [""] * len(models)
    rows = []
    for name, (label, form, explanation) in DIVERSITY.items():
        if any(name in one.evaluation.diversity for one in models):
            found = [one.evaluation.diversity.get(name) for one in models]
            rows.append(
                _Row(
                    label, explanation, ["–" if f is None else form.format(f) for f in found], empty
                )
            )
    speeds = [one.evaluation.images_per_second for one in models]
    if any(speed is not None for speed in speeds):
        shown = ["–" if speed is None else f"{speed:,.1f}" for speed in speeds]
        rows.append(_Row("Images per second", "captioning alone, where evaluated", shown, empty))
    return rows


def _charts(curves: Curves, models: Sequence[_Model]) -> list[Chart]:
    known = [(one, curves.get(one.evaluation.mlflow_run_id or "", {})) for one in models]
    drawn = []
    for title, metrics in CHARTS.items():
        series = [
            Series(
                f"{one.evaluation.name}, {measured}",
                one.colour,
                metric.startswith("train"),
                found[metric],
            )
            for one, found in known
            for metric, measured in metrics.items()
            if metric in found
        ]
        if chart := line_chart(title, "step", series):
            drawn.append(chart)
    return drawn
