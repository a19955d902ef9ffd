"""The MLflow model registry: versions of the model `captioner`, and which of them serves.

The alias `champion` is on the version that serves, `challenger` on the latest one that did not win.
MLflow has no compare-and-swap. So a version becomes champion only if the champion is still the one
that it was compared with, read again right before the alias is set, and again when another process
that read the same has set it as well.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from model_lib.errors import UserError
from model_lib.evaluate.report import render_report
from model_lib.evaluate.result import Decision, Evaluation, EvaluationResult
from model_lib.io import storage
from model_lib.io.retries import retry
from model_lib.model.sources import captioner_folder
from model_lib.registry.config import NO_CHAMPION, Policy, RegisterConfig
from model_lib.registry.model_uris import CHAMPION, MODEL, version_uri
from model_lib.registry.packaging import LONGEST_CARD, log_model, render_card
from model_lib.registry.promotion import choose_winner, decide
from model_lib.scores.significance import Comparison
from model_lib.tracking.errors import find
from model_lib.tracking.metrics import read_curves
from model_lib.tracking.runs import Tracking
from model_lib.tracking.server import MlflowTracking, require_mlflow

CHALLENGER = "challenger"
SETTLE = 0.5
"""Seconds between setting the alias and reading it again. It is far longer than another process
needs between its last look and its own call."""
NONE = "none"
# Tags of a version.
DECISION = "decision"
"""Its alias, once it has one: champion or challenger."""
REASON = "reason"
COMPARISONS = "comparisons"
"""Each score of it and of the champion that it was compared with, as JSON."""
EVALUATION = "evaluation"
"""SHA-256 of its evaluation."""
COMPARED_WITH = "compared_with"
"""The champion's version, or none."""
POLICY = "policy"
"""The conditions of its promotion, as JSON."""
REMEDY = (
    f"captioner evaluate --model models:/{MODEL}@{CHAMPION} --data … --output …, then "
    "--champion_evaluation"
)


@dataclass(frozen=True)
class Registered:
    """The outcome of a registration."""

    winner: str
    version: str
    promoted: bool
    reason: str
    champion_version: str
    """The version that serves now; empty if none does."""
    model: str
    """Source of the winner's model."""
    evaluation: str
    """Folder of the winner's evaluation."""
    page: str
    """The HTML page of the decision."""
    candidates: list[dict[str, Any]]
    """Every candidate's name, scores and MLflow run."""

    @property
    def outcome(self) -> str:
        """The outcome in words, which follow the version's name."""
        if self.promoted:
            return "is the champion now"
        if not self.champion_version:
            return "is a challenger, and there is no champion"
        return f"does not replace version {self.champion_version}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": self.outcome}


def champion_version(uri: str) -> str | None:
    """Return the version that serves, or None if there is none."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    version = find(lambda: client.get_model_version_by_alias(MODEL, CHAMPION))
    return None if version is None else str(version.version)


def register(config: RegisterConfig, tracking: Tracking) -> Registered:
    """Register the best candidate, and make it the champion if it beats the present one.

    Called again with the same evaluations and policy, it finds the version that it created: Argo
    starts the step of a lost pod again.

    Raises:
        UserError: evaluations are missing or cannot be compared, the champion was not evaluated, or
            the winner's model is not the one that was evaluated.
    """
    tracking = require_mlflow(tracking)
    candidates = [EvaluationResult.read(folder) for folder in config.evaluations]
    winner = choose_winner(candidates, config.metric)
    pairs = zip(config.evaluations, candidates, strict=True)
    folder = next(folder for folder, candidate in pairs if candidate is winner)
    page = storage.join(folder, "decision.html")
    champion = _champion_result(config)
    present = champion_version(tracking.uri)
    version = _find_version(winner.evaluation, present, champion, config, tracking)
    if version is not None and str(version.version) == present:
        decision = _read_decision(version)
        if version.tags[COMPARED_WITH] != _compared_with(champion):
            champion = None  # it was evaluated as the champion that it is by now
    elif version is not None and DECISION in version.tags:
        decision = replace(_read_decision(version), promote=False)
    else:
        if config.champion_evaluation is None and present is not None:
            raise UserError(
                f"there is a champion, version {present}, to be evaluated on the same data first: "
                f"{REMEDY}"
            )
        storage.remove(page)  # of another decision on the same evaluation
        decision = decide(champion, winner, config)
        if version is None:
            version = _create_version(config, winner.evaluation, champion, decision, tracking)
    decision = _set_alias(version, decision, champion, tracking)
    if not storage.exists(page):
        html = render_report(
            winner,
            others=[candidate for candidate in candidates if candidate is not winner],
            champion=champion,
            decision=decision,
            curves=_curves(candidates),
        )
        storage.write_bytes(page, html.encode())
    tracking.add(version.run_id, {}, {}, {"evaluation/decision.html": storage.read_bytes(page)})
    return Registered(
        winner=winner.evaluation.name,
        version=str(version.version),
        promoted=decision.promote,
        reason=decision.reason,
        champion_version=champion_version(tracking.uri) or "",
        model=winner.evaluation.model,
        evaluation=folder,
        page=page,
        candidates=[_summary(candidate.evaluation) for candidate in candidates],
    )


def _champion_result(config: RegisterConfig) -> EvaluationResult | None:
    """Return the champion's evaluation, or None if there was no champion.

    Raises:
        UserError: it is of something else than a version of the model.
    """
    if config.champion_evaluation in (None, NO_CHAMPION):
        return None
    champion = EvaluationResult.read(config.champion_evaluation)
    model = champion.evaluation.model
    if not model.startswith(version_uri("")):
        message = f"evaluates {model}, no version of {MODEL}: {REMEDY}"
        raise UserError(f"{config.champion_evaluation}: {message}")
    return champion


def _compared_with(champion: EvaluationResult | None) -> str:
    return NONE if champion is None else champion.evaluation.model.removeprefix(version_uri(""))


def _find_version(
    winner: Evaluation,
    present: str | None,
    champion: EvaluationResult | None,
    config: RegisterConfig,
    tracking: MlflowTracking,
) -> Any:
    """Return the version that an earlier call created for the winner, or None.

    The present champion is the one if it has the winner's evaluation; another version, if it was
    compared with the same champion under the same policy, and never was champion.
    """
    condition = f"name = '{MODEL}' and tags.`{EVALUATION}` = '{_digest(winner)}'"
    tags = {COMPARED_WITH: _compared_with(champion), POLICY: _policy(config)}
    for version in tracking.client.search_model_versions(condition):
        is_same = tags.items() <= version.tags.items() and version.tags.get(DECISION) != CHAMPION
        if is_same or str(version.version) == present:
            return version
    return None


def _create_version(
    config: RegisterConfig,
    winner: Evaluation,
    champion: EvaluationResult | None,
    decision: Decision,
    tracking: MlflowTracking,
) -> Any:
    """Upload the winner's model and make it a version; return MLflow's `ModelVersion`."""
    from mlflow.exceptions import MlflowException

    folder = captioner_folder(winner.model)
    if not Path(folder).is_dir():
        raise UserError(
            f"{winner.model}: lies on a hub; fetch it into a folder, evaluate it there and "
            "register that"
        )
    client = tracking.client
    run_id = winner.mlflow_run_id
    if run_id is None or not tracking.knows(run_id):
        run_id = tracking.create_finished_run(winner.name)
    card = render_card(winner, folder)
    model_id = log_model(MODEL, winner, folder, card, run_id, tracking)
    # Another pod may have registered the same evaluation meanwhile.
    present = champion_version(tracking.uri)
    if version := _find_version(winner, present, champion, config, tracking):
        return version
    try:
        client.create_registered_model(MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "name": winner.name,
        "metric": config.metric,
        "scores": json.dumps(winner.scores),
        "intervals": json.dumps(winner.intervals),
        "split": winner.split,
        "images": str(winner.images),
        "data_fingerprint": winner.data_fingerprint or "",
        EVALUATION: _digest(winner),
        COMPARED_WITH: _compared_with(champion),
        POLICY: _policy(config),
        REASON: decision.reason,
        COMPARISONS: json.dumps([asdict(comparison) for comparison in decision.comparisons]),
    }
    version = retry(  # of several at once, the numbers of some collide
        "creating a model version",
        lambda: client.create_model_version(
            MODEL,
            f"models:/{model_id}",
            run_id,
            tags=tags,
            description=card[:LONGEST_CARD],
            model_id=model_id,
        ),
        seconds=60,
    )
    # MLflow's page of the model links to its versions by this tag.
    versions = json.dumps([{"name": MODEL, "version": int(version.version)}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": versions})
    return version


def _set_alias(
    version: Any, decision: Decision, champion: EvaluationResult | None, tracking: MlflowTracking
) -> Decision:
    """Make a version champion or challenger; return the decision as it was carried out."""
    client, number = tracking.client, str(version.version)
    if decision.promote and (present := champion_version(tracking.uri)) != number:
        if (present or NONE) == _compared_with(champion):
            client.set_registered_model_alias(MODEL, CHAMPION, number)
            time.sleep(SETTLE)
            present = champion_version(tracking.uri)
        if present != number:
            reason = _overtaken(present, _compared_with(champion))
            decision = replace(decision, promote=False, reason=reason)
            client.set_model_version_tag(MODEL, number, REASON, reason)
    alias = CHAMPION if decision.promote else CHALLENGER
    if version.tags.get(DECISION) != alias:
        if alias == CHALLENGER:
            client.set_registered_model_alias(MODEL, CHALLENGER, number)
        client.set_model_version_tag(MODEL, number, DECISION, alias)
    return decision


def _overtaken(present: str | None, compared_with: str) -> str:
    other = NONE if compared_with == NONE else f"version {compared_with}"
    if present is None:
        return f"{other}, with which it was compared, is not the champion any more: evaluate again"
    return f"version {present} became champion while it was compared with {other}: evaluate again"


def _read_decision(version: Any) -> Decision:
    comparisons = [Comparison(**row) for row in json.loads(version.tags[COMPARISONS])]
    return Decision(True, version.tags[REASON], comparisons)


def _digest(evaluation: Evaluation) -> str:
    return hashlib.sha256(json.dumps(evaluation.to_dict(), sort_keys=True).encode()).hexdigest()


def _policy(config: RegisterConfig) -> str:
    return json.dumps({field.name: getattr(config, field.name) for field in fields(Policy)})


def _curves(candidates: list[EvaluationResult]) -> dict[str, Any]:
    """Return each candidate's curves of training, by its MLflow run."""
    evaluations = [candidate.evaluation for candidate in candidates]
    return {e.mlflow_run_id: read_curves(e.model) for e in evaluations if e.mlflow_run_id}


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "name": evaluation.name,
        **evaluation.scores,
        "CIDEr_shuffled": evaluation.shuffled_cider,
        "mlflow_run_id": evaluation.mlflow_run_id,
    }
