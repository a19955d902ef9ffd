"""The MLflow model registry: the registered model `captioner`, its versions, and the aliases that say which serves.

`champion` serves; `challenger` is the latest candidate that did not win.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from model_lib import storage
from model_lib.errors import UserError
from model_lib.evaluate.judgement import Evaluation, Judgement
from model_lib.evaluate.report import render_report
from model_lib.model.sources import resolve_captioner
from model_lib.registry.config import RegisterConfig
from model_lib.registry.packaging import LONGEST_CARD, log_model, render_card
from model_lib.registry.promotion import Decision, Policy, choose_winner, decide
from model_lib.registry.turns import CHAMPION, DECISION, REASON, draw, turn
from model_lib.tracking.model_uris import MODEL, version_uri
from model_lib.tracking.server import MlflowTracking, Tracking, require_mlflow

CHALLENGER = "challenger"
EVALUATION = "evaluation"
"""Tag of a version: sha256 of the evaluation that it was registered by."""
REPLACED = "replaced"
"""Tag of a version that became champion: the version that was it before."""


@dataclass(frozen=True)
class Registered:
    """What registering came to."""

    winner: str
    version: str
    promoted: bool
    reason: str
    champion_version: str
    evaluation: str
    """Folder of the winner's evaluation."""
    page: str
    """The HTML page of the decision."""
    candidates: list[dict[str, Any]]
    """Every candidate's name, scores and MLflow run."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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

    Raises:
        UserError: evaluations are missing or cannot be compared, or the champion was not judged.
    """
    import mlflow

    tracking = require_mlflow(tracking)
    candidates = [Judgement.read(folder) for folder in config.evaluations]
    best = choose_winner(candidates, config.metric)
    winner = best.evaluation
    folder = resolve_captioner(winner.model)
    client = mlflow.MlflowClient(tracking.uri)
    present = champion_version(tracking.uri)
    before = _registered_before(client, winner, present)
    if before is not None:
        present = before.tags.get(REPLACED)
    champion = _champion_judgement(config, present)
    policy = Policy(**{f.name: getattr(config, f.name) for f in fields(Policy)})
    decision = decide(champion, best, policy)
    run_id = _winners_run(winner, tracking)
    if before is None:
        version, decision, now = _make_version(config, winner, folder, run_id, present, decision, tracking)
    else:
        version, now = str(before.version), present
        _say(client, version, decision, present)  # it is champion already: another may become it at this moment
        client.set_model_version_tag(MODEL, version, DECISION, CHAMPION)
    judged = config.evaluations[next(n for n, one in enumerate(candidates) if one is best)]
    others = [one for one in candidates if one is not best]
    trained = (one.evaluation for one in candidates)
    curves = {one.name: tracking.curves(one.mlflow_run_id) for one in trained if one.mlflow_run_id is not None}
    page = render_report(best, others=others, champion=champion, decision=decision, curves=curves).encode()
    storage.write_bytes(storage.join(judged, "decision.html"), page)
    tracking.add(run_id, {}, {}, {"evaluation/decision.html": page})
    return Registered(
        winner=winner.name,
        version=version,
        promoted=decision.promote,
        reason=decision.reason,
        champion_version=version if decision.promote else str(now or ""),
        evaluation=judged,
        page=storage.join(judged, "decision.html"),
        candidates=[
            {"name": e.name, **e.scores, "CIDEr_shuffled": e.shuffled_cider, "mlflow_run_id": e.mlflow_run_id}
            for e in (candidate.evaluation for candidate in candidates)
        ],
    )


def _registered_before(client: Any, winner: Evaluation, champion: str | None) -> Any:
    """Return the champion if an earlier call for the same winner made it so and was killed, maybe half-way; or None."""
    if champion is None:
        return None
    found = client.get_model_version(MODEL, champion)
    return found if found.tags.get(EVALUATION) == _digest(winner) else None


def _digest(evaluation: Evaluation) -> str:
    return hashlib.sha256(json.dumps(evaluation.to_dict(), sort_keys=True).encode()).hexdigest()


def _make_version(
    config: RegisterConfig,
    winner: Evaluation,
    folder: str,
    run_id: str,
    present: str | None,
    decision: Decision,
    tracking: MlflowTracking,
) -> tuple[str, Decision, str | None]:
    """Make the winner a version and decide on it in its turn; return both, and who was champion until then."""
    import mlflow

    client = mlflow.MlflowClient(tracking.uri)
    card = render_card(winner, folder)
    # What takes long is done before the number is drawn, as others wait for the decision on it.
    model_id = log_model(MODEL, winner, folder, card, run_id, tracking)
    about = {"run_id": run_id, "model_id": model_id, "description": card[:LONGEST_CARD]}
    drawn = draw(client, MODEL, f"models:/{model_id}", _tags(winner, config, present), **about)
    version = str(drawn.version)
    with turn(client, drawn):
        now = champion_version(tracking.uri)
        if now != present:
            decision = replace(decision, promote=False, reason=_outdated(now, present))
        settle(client, version, decision, now)
    shown = json.dumps([{"name": MODEL, "version": int(version)}])  # from the model to its version in MLflow's pages
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": shown})
    return version, decision, now


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
    # The alias before the tag that ends the others' wait: killed between the two, it is champion, and they see so.
    client.set_registered_model_alias(MODEL, fate, version)
    client.set_model_version_tag(MODEL, version, DECISION, fate)


def _say(client: Any, version: str, decision: Decision, champion: str | None) -> None:
    """Tag a version with the reasons for the decision on it."""
    numbers = json.dumps([asdict(one) for one in decision.comparisons])
    tags = {REASON: decision.reason, "comparisons": numbers}
    if decision.promote and champion is not None:
        tags[REPLACED] = champion
    for name, value in tags.items():
        client.set_model_version_tag(MODEL, version, name, value)


def _outdated(now: str | None, judged_against: str | None) -> str:
    against = f"version {judged_against}" if judged_against else "none"
    if now is None:
        return f"{against} is not the champion any more, against which this one was judged: judge them again"
    return f"version {now} became champion while this one was judged against {against}: judge them again"


def _tags(winner: Evaluation, config: RegisterConfig, champion: str | None) -> dict[str, str]:
    return {
        "name": winner.name,
        "metric": config.metric,
        "judged_against": champion or "none",
        "scores": json.dumps(winner.scores),
        "intervals": json.dumps(winner.intervals),
        "split": winner.split,
        "pictures": str(winner.pictures),
        "data_fingerprint": winner.data_fingerprint or "",
        EVALUATION: _digest(winner),
    }


def _winners_run(winner: Evaluation, tracking: MlflowTracking) -> str:
    """Return the run that trained the winner, or a new one if the server has none."""
    if winner.mlflow_run_id is not None and tracking.knows(winner.mlflow_run_id):
        return winner.mlflow_run_id
    with tracking.start(winner.name, None, params={}, tags={}) as run:
        assert run.run_id is not None
        return run.run_id


def _champion_judgement(config: RegisterConfig, version: str | None) -> Judgement | None:
    """Return the present champion's judgement; `UserError` if it was not judged, or another version was."""
    if version is None:
        return None
    remedy = f"captioner evaluate --model {version_uri(version)} --data … --output …, then --champion_evaluation"
    if not config.champion_evaluation:
        raise UserError(f"there is a champion, version {version}, to be judged on the same data first: {remedy}")
    champion = Judgement.read(config.champion_evaluation)
    judged = champion.evaluation.model
    if judged != version_uri(version):
        raise UserError(
            f"{config.champion_evaluation}: judges {judged}, but the champion is version {version}: {remedy}"
        )
    return champion
