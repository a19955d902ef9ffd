"""The outcome of a pipeline's candidates, for its page, its MLflow run and the steps after it."""

from model_lib.errors import WorkError
from model_lib.evaluate.result import Evaluation
from model_lib.evaluate.scorecard import evaluation_metrics, evaluation_tags
from model_lib.registry.model_uris import CHAMPION, MODEL, version_uri
from model_lib.registry.registry import Registered
from model_lib.tracking.server import MlflowTracking


def decision_markdown(registered: Registered, tracking: MlflowTracking) -> str:
    """Return the decision as Markdown for the pipeline's page, each candidate linked to its MLflow
    run."""
    names = [name for name, value in registered.candidates[0].items() if isinstance(value, float)]
    rows = [f"| candidate | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for candidate in registered.candidates:
        run_id = candidate["mlflow_run_id"]
        address = tracking.run_url(run_id) if run_id else None
        title = f"[{candidate['name']}]({address})" if address else candidate["name"]
        rows.append(f"| {title} | {' | '.join(f'{candidate[name]:.4f}' for name in names)} |")
    heading = f"## Version {registered.version} ({registered.winner}) {registered.outcome}"
    return "\n\n".join([heading, registered.reason, "\n".join(rows)]) + "\n"


def log_outcome(registered: Registered, tracking: MlflowTracking) -> None:
    """Add the decision and the winner's scores to the pipeline's MLflow run."""
    winner, champion = Evaluation.read(registered.evaluation), registered.champion_version
    tags = {
        "captioner.winner": registered.winner,
        "captioner.winner_run_id": winner.mlflow_run_id or "",
        "captioner.winner_model": version_uri(registered.version),
        "captioner.champion_model": champion and version_uri(champion),
        "captioner.promoted": str(registered.promoted).lower(),
        "captioner.decision": registered.reason,
    }
    note = decision_markdown(registered, tracking)
    metrics, tags = evaluation_metrics(winner), {**evaluation_tags(winner), **tags}
    tracking.conclude(metrics, tags, note, winner.mlflow_run_id)


def serving_model(registered: Registered) -> str:
    """Return the champion's model URI for the steps that follow; `WorkError` if there is none."""
    if not registered.champion_version:
        raise WorkError(
            f"models:/{MODEL}@{CHAMPION}: there is no champion: it was removed while its successor "
            f"was evaluated, and version {registered.version} is a challenger; submit the run again"
        )
    return version_uri(registered.champion_version)
