"""The MLflow model registry: the registered model `captioner`, its versions, and the aliases that
say which serves.

`champion` serves; `challenger` is the latest candidate that did not win.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from model_lib.errors import UserError
from model_lib.evaluate.report import render_report
from model_lib.evaluate.result import Decision, Evaluation, EvaluationResult
from model_lib.io import storage
from model_lib.model.sources import resolve_captioner
from model_lib.registry.config import NO_CHAMPION, Policy, RegisterConfig
from model_lib.registry.packaging import LONGEST_CARD, log_model, render_card
from model_lib.registry.promotion import choose_winner, decide
from model_lib.registry.turns import CHAMPION, DECISION, PENDING, REASON, draw, require_turn, turn
from model_lib.scores.significance import Comparison
from model_lib.tracking.model_uris import MODEL, version_uri
from model_lib.tracking.server import MlflowTracking, Tracking, require_mlflow

CHALLENGER = "challenger"
COMPARISONS = "comparisons"
"""Tag of a version: each score of it and of the champion that it was evaluated against, as JSON."""
EVALUATION, AGAINST, POLICY = "evaluation", "evaluated_against", "policy"
"""Tags of a version: sha256 of its evaluation, the champion that it was evaluated against, and what
was asked of it."""
REPLACED = "replaced"
"""Tag of a version that became champion: the version that was it before."""
REMEDY = (
    f"captioner evaluate --model models:/{MODEL}@{CHAMPION} --data … --output …, then "
    "--champion_evaluation"
)


@dataclass(frozen=True)
class Registered:
    """What registering came to."""

    winner: str
    version: str
    promoted: bool
    reason: str
    champion_version: str
    """The version that serves now; empty if none does."""
    model: str
    """Where the winner's model lies."""
    evaluation: str
    """Folder of the winner's evaluation."""
    page: str
    """The HTML page of the decision."""
    candidates: list[dict[str, Any]]
    """Every candidate's name, scores and MLflow run."""

    @property
    def fate(self) -> str:
        """What became of the version, as it is said after its name."""
        if self.promoted:
            return "is the champion now"
        if not self.champion_version:
            return "is a challenger, and there is no champion"
        return f"does not replace version {self.champion_version}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fate": self.fate}


def champion_version(uri: str) -> str | None:
    """Return the version that serves, or None if there is none yet."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return str(mlflow.MlflowClient(uri).get_model_version_by_alias(MODEL, CHAMPION).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def register(config: RegisterConfig, tracking: Tracking) -> Registered:
    """Register the best candidate, and make it the champion if it beats the present one.

    Called again with the same evaluations and policy, after it was killed maybe, it answers what it
    decided before: a pod that is lost is made again by Argo, whatever a step's retries are.

    Raises:
        UserError: evaluations are missing or cannot be compared, the champion was not evaluated, or
            the winner's model is not the one that was evaluated.
    """
    import mlflow

    tracking = require_mlflow(tracking)
    candidates = [EvaluationResult.read(folder) for folder in config.evaluations]
    best = choose_winner(candidates, config.metric)
    winner = best.evaluation
    evaluated = config.evaluations[next(n for n, one in enumerate(candidates) if one is best)]
    page = storage.join(evaluated, "decision.html")
    client = mlflow.MlflowClient(tracking.uri)
    present = champion_version(tracking.uri)
    champion = _champion_result(config)
    against = None if champion is None else champion.evaluation.model.removeprefix(version_uri(""))
    before = _registered_before(
        client, winner, present, {AGAINST: against or "none", POLICY: _policy(config)}
    )
    if before is not None and (before.tags[DECISION] != PENDING or str(before.version) == present):
        run_id, version, now = str(before.run_id), str(before.version), present
        decision = _decided(before, promoted=version == present)
        if before.tags[AGAINST] != (
            against or "none"
        ):  # it is the champion by now, and was evaluated against itself
            champion = None
        if decision.promote:  # killed between the alias and the tag
            client.set_model_version_tag(MODEL, version, DECISION, CHAMPION)
    else:
        folder = _local_model(winner.model)
        if config.champion_evaluation is None and present is not None:
            raise UserError(
                f"there is a champion, version {present}, to be evaluated on the same data first: "
                f"{REMEDY}"
            )
        decision = decide(champion, best, config)
        storage.remove(page)  # of another decision on the same evaluation
        if before is None:
            run_id = _winners_run(winner, tracking)
            before = _make_version(config, winner, folder, run_id, against, tracking)
        run_id, version = str(before.run_id), str(before.version)
        decision, now = _decide_in_turn(client, before, against, decision)
    if not storage.exists(page):
        others = [one for one in candidates if one is not best]
        runs = {one.evaluation.mlflow_run_id for one in candidates}
        curves = {run: tracking.curves(run) for run in runs if run is not None}
        html = render_report(
            best, others=others, champion=champion, decision=decision, curves=curves
        )
        storage.write_bytes(page, html.encode())
    tracking.add(run_id, {}, {}, {"evaluation/decision.html": storage.read_bytes(page)})
    return Registered(
        winner=winner.name,
        version=version,
        promoted=decision.promote,
        reason=decision.reason,
        champion_version=version if decision.promote else now or "",
        model=winner.model,
        evaluation=evaluated,
        page=page,
        candidates=[
            {
                "name": e.name,
                **e.scores,
                "CIDEr_shuffled": e.shuffled_cider,
                "mlflow_run_id": e.mlflow_run_id,
            }
            for e in (candidate.evaluation for candidate in candidates)
        ],
    )


def _local_model(source: str) -> str:
    """Return the folder with a model's files; `UserError` if they are on a hub, where others may
    take their place."""
    folder = resolve_captioner(source)
    if not Path(folder).is_dir():
        raise UserError(
            f"{source}: lies on a hub; fetch it into a folder, evaluate it there and register that"
        )
    return folder


def _registered_before(
    client: Any, winner: Evaluation, present: str | None, asked: dict[str, str]
) -> Any:
    """Return the version that an earlier call made of a winner, or None.

    Args:
        client: MLflow's.
        winner: its evaluation.
        present: the champion now: if it is of this evaluation, it is the one, whatever it was
            evaluated against.
        asked: tags that another version must have, too, as it was decided by them. One that was
            champion and is not now is decided anew.
    """
    found = client.search_model_versions(
        f"name = '{MODEL}' and tags.`{EVALUATION}` = '{_digest(winner)}'"
    )
    for version in sorted(found, key=lambda version: int(version.version), reverse=True):
        is_same = asked.items() <= version.tags.items() and version.tags[DECISION] in (
            PENDING,
            CHALLENGER,
        )
        if is_same or str(version.version) == present:
            return version
    return None


def _decided(version: Any, promoted: bool) -> Decision:
    """Return the decision on a version as its tags tell it: what it was evaluated against may be no
    champion any more."""
    compared = json.loads(version.tags.get(COMPARISONS, "[]"))
    return Decision(promoted, version.tags.get(REASON, ""), [Comparison(**one) for one in compared])


def _digest(evaluation: Evaluation) -> str:
    return hashlib.sha256(json.dumps(evaluation.to_dict(), sort_keys=True).encode()).hexdigest()


def _policy(config: RegisterConfig) -> str:
    return json.dumps({field.name: getattr(config, field.name) for field in fields(Policy)})


def _make_version(
    config: RegisterConfig,
    winner: Evaluation,
    folder: str,
    run_id: str,
    against: str | None,
    tracking: MlflowTracking,
) -> Any:
    """Make the winner a version, its decision pending; return MLflow's `ModelVersion`."""
    card = render_card(winner, folder)
    # What takes long is done before the number is drawn, as others wait for the decision on it.
    model_id = log_model(MODEL, winner, folder, card, run_id, tracking)
    about = {"run_id": run_id, "model_id": model_id, "description": card[:LONGEST_CARD]}
    drawn = draw(
        tracking.client, MODEL, f"models:/{model_id}", _tags(winner, config, against), **about
    )
    shown = json.dumps(
        [{"name": MODEL, "version": int(drawn.version)}]
    )  # from the model to its version in MLflow
    tracking.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": shown})
    return drawn


def _decide_in_turn(
    client: Any, version: Any, against: str | None, decision: Decision
) -> tuple[Decision, str | None]:
    """Carry out the decision on a pending version in its turn; return it, and who was champion
    until then."""
    with turn(client, version):
        now = champion_version(client.tracking_uri)
        if now != against:
            decision = replace(decision, promote=False, reason=_outdated(now, against))
        settle(client, str(version.version), decision, now)
    return decision, now


def settle(client: Any, version: str, decision: Decision, champion: str | None) -> None:
    """Write the decision on a version into the registry.

    Args:
        client: MLflow's.
        version: which waited for it.
        decision: on it.
        champion: the version that serves until now.
    """
    _say(client, version, decision, champion)
    fate = CHAMPION if decision.promote else CHALLENGER
    require_turn(client, MODEL, version)
    # The alias before the tag that ends the others' wait: killed between the two, it is champion,
    # and they see so.
    client.set_registered_model_alias(MODEL, fate, version)
    client.set_model_version_tag(MODEL, version, DECISION, fate)


def _say(client: Any, version: str, decision: Decision, champion: str | None) -> None:
    """Tag a version with the reasons for the decision on it."""
    numbers = json.dumps([asdict(one) for one in decision.comparisons])
    tags = {REASON: decision.reason, COMPARISONS: numbers}
    if decision.promote and champion is not None:
        tags[REPLACED] = champion
    for name, value in tags.items():
        client.set_model_version_tag(MODEL, version, name, value)


def _outdated(now: str | None, evaluated_against: str | None) -> str:
    against = f"version {evaluated_against}" if evaluated_against else "none"
    if now is None:
        return (
            f"{against} is not the champion any more, against which this one was evaluated: "
            "evaluate them again"
        )
    return (
        f"version {now} became champion while this one was evaluated against {against}: evaluate "
        "them again"
    )


def _tags(winner: Evaluation, config: RegisterConfig, champion: str | None) -> dict[str, str]:
    return {
        "name": winner.name,
        "metric": config.metric,
        AGAINST: champion or "none",
        "scores": json.dumps(winner.scores),
        "intervals": json.dumps(winner.intervals),
        "split": winner.split,
        "images": str(winner.images),
        "data_fingerprint": winner.data_fingerprint or "",
        EVALUATION: _digest(winner),
        POLICY: _policy(config),
    }


def _winners_run(winner: Evaluation, tracking: MlflowTracking) -> str:
    """Return the run that trained the winner, or a new one if the server has none."""
    if winner.mlflow_run_id is not None and tracking.knows(winner.mlflow_run_id):
        return winner.mlflow_run_id
    with tracking.start(winner.name, None, params={}, tags={}) as run:
        assert run.run_id is not None
        return run.run_id


def _champion_result(config: RegisterConfig) -> EvaluationResult | None:
    """Return the result of the version that was champion when it was evaluated, or None if there
    was none.

    Raises:
        UserError: what was evaluated is no version of the model.
    """
    if config.champion_evaluation in (None, NO_CHAMPION):
        return None
    champion = EvaluationResult.read(config.champion_evaluation)
    evaluated = champion.evaluation.model
    if not evaluated.startswith(version_uri("")):
        raise UserError(
            f"{config.champion_evaluation}: evaluates {evaluated}, no version of {MODEL}: {REMEDY}"
        )
    return champion
