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
from typing import Any

from model_lib.evaluate.report import render_report
from model_lib.evaluate.result import Decision, Evaluation, EvaluationResult
from model_lib.io import storage
from model_lib.io.retries import retry
from model_lib.model.sources import captioner_folder
from model_lib.options import require
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
    for candidate in candidates:
        message = "is another project's model, which is compared and not registered"
        require(not candidate.evaluation.rival, f"{candidate.evaluation.model}: {message}")
    winner = choose_winner(candidates, config.metric)
    pairs = zip(config.evaluations, candidates, strict=True)
    folder = next(folder for folder, candidate in pairs if candidate is winner)
    page = storage.join(folder, "decision.html")
    champion = _champion_result(config)
    present = champion_version(tracking.uri)
    tags = _version_tags(winner.evaluation, champion, config)
    version = _find_version(tags, present, tracking)
    serves = version is not None and str(version.version) == present
    if version is not None and (serves or DECISION in version.tags):
        comparisons = [Comparison(**row) for row in json.loads(version.tags[COMPARISONS])]
        decision = Decision(serves, version.tags[REASON], comparisons)
        if version.tags[COMPARED_WITH] != tags[COMPARED_WITH]:
            champion = None  # it was evaluated as the champion that it is by now
    else:
        message = f"there is a champion, version {present}, to be evaluated on the same data first"
        is_evaluated = config.champion_evaluation is not None or present is None
        require(is_evaluated, f"{message}: {REMEDY}")
        storage.remove(page)  # of another decision on the same evaluation
        decision = decide(champion, winner, config)
        if version is None:
            version = _create_version(winner.evaluation, decision, tags, tracking)
    decision = _set_alias(version, decision, tags[COMPARED_WITH], tracking)
    evaluations = [candidate.evaluation for candidate in candidates]
    if not storage.exists(page):
        html = render_report(
            winner,
            others=[candidate for candidate in candidates if candidate is not winner],
            champion=champion,
            decision=decision,
            curves={e.mlflow_run_id: read_curves(e.model) for e in evaluations if e.mlflow_run_id},
        )
        storage.write_bytes(page, html.encode())
    html = storage.read_bytes(page).decode()
    tracking.add(version.run_id, {}, {}, {"evaluation/decision.html": html})
    rows = [
        {
            "name": evaluation.name,
            **evaluation.scores,
            "CIDEr_shuffled": evaluation.shuffled_cider,
            "mlflow_run_id": evaluation.mlflow_run_id,
        }
        for evaluation in evaluations
    ]
    return Registered(
        winner=winner.evaluation.name,
        version=str(version.version),
        promoted=decision.promote,
        reason=decision.reason,
        champion_version=champion_version(tracking.uri) or "",
        model=winner.evaluation.model,
        evaluation=folder,
        page=page,
        candidates=rows,
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
    message = f"{config.champion_evaluation}: evaluates {model}, no version of {MODEL}: {REMEDY}"
    require(model.startswith(version_uri("")), message)
    return champion


def _version_tags(
    winner: Evaluation, champion: EvaluationResult | None, config: RegisterConfig
) -> dict[str, str]:
    """Return the tags of the winner's version that do not depend on the decision."""
    digest = hashlib.sha256(json.dumps(asdict(winner), sort_keys=True).encode()).hexdigest()
    compared_with = NONE
    if champion is not None:
        compared_with = champion.evaluation.model.removeprefix(version_uri(""))
    return {
        "name": winner.name,
        "metric": config.metric,
        "scores": json.dumps(winner.scores),
        "intervals": json.dumps(winner.intervals),
        "split": winner.split,
        "images": str(winner.images),
        "data_fingerprint": winner.data_fingerprint or "",
        EVALUATION: digest,
        COMPARED_WITH: compared_with,
        POLICY: json.dumps({field.name: getattr(config, field.name) for field in fields(Policy)}),
    }


def _find_version(tags: dict[str, str], present: str | None, tracking: MlflowTracking) -> Any:
    """Return the version that an earlier call created for the winner, or None.

    The present champion is the one if it has the winner's evaluation; another version, if it was
    compared with the same champion under the same policy, and never was champion.
    """
    condition = f"name = '{MODEL}' and tags.`{EVALUATION}` = '{tags[EVALUATION]}'"
    for version in tracking.client.search_model_versions(condition):
        is_same = all(version.tags.get(name) == tags[name] for name in (COMPARED_WITH, POLICY))
        was_champion = version.tags.get(DECISION) == CHAMPION
        if (is_same and not was_champion) or str(version.version) == present:
            return version
    return None


def _create_version(
    winner: Evaluation, decision: Decision, tags: dict[str, str], tracking: MlflowTracking
) -> Any:
    """Upload the winner's model and make it a version; return MLflow's `ModelVersion`."""
    from mlflow.exceptions import MlflowException

    folder = captioner_folder(winner.model)
    client = tracking.client
    run_id = winner.mlflow_run_id
    if run_id is None or not tracking.knows(run_id):
        run_id = tracking.finished_run(winner.name)
    card = render_card(winner, folder)
    model_id = log_model(winner, folder, card, run_id, tracking)
    # Another pod may have registered the same evaluation meanwhile.
    if version := _find_version(tags, champion_version(tracking.uri), tracking):
        return version
    try:
        client.create_registered_model(MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    comparisons = json.dumps([asdict(comparison) for comparison in decision.comparisons])
    version = retry(  # of several at once, the numbers of some collide
        "creating a model version",
        lambda: client.create_model_version(
            MODEL,
            f"models:/{model_id}",
            run_id,
            tags={**tags, REASON: decision.reason, COMPARISONS: comparisons},
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
    version: Any, decision: Decision, compared_with: str, tracking: MlflowTracking
) -> Decision:
    """Make a version champion or challenger; return the decision as it was carried out."""
    client, number = tracking.client, str(version.version)
    if decision.promote and (present := champion_version(tracking.uri)) != number:
        if (present or NONE) == compared_with:
            client.set_registered_model_alias(MODEL, CHAMPION, number)
            time.sleep(SETTLE)
            present = champion_version(tracking.uri)
        if present != number:
            other = NONE if compared_with == NONE else f"version {compared_with}"
            reason = f"version {present} became champion while it was compared with {other}"
            if present is None:
                reason = f"{other}, with which it was compared, is not the champion any more"
            decision = replace(decision, promote=False, reason=f"{reason}: evaluate again")
            client.set_model_version_tag(MODEL, number, REASON, decision.reason)
    alias = CHAMPION if decision.promote else CHALLENGER
    if version.tags.get(DECISION) != alias:
        if alias == CHALLENGER:
            client.set_registered_model_alias(MODEL, CHALLENGER, number)
        client.set_model_version_tag(MODEL, number, DECISION, alias)
    return decision
