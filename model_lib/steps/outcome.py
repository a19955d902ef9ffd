"""What came of a pipeline's candidates: told on its page and in its MLflow run, and passed on to
what follows."""

from model_lib.errors import WorkError
from model_lib.evaluate.result import Evaluation
from model_lib.evaluate.scorecard import evaluation_metrics, evaluation_tags
from model_lib.registry.registry import Registered
from model_lib.registry.turns import CHAMPION
from model_lib.tracking.model_uris import MODEL, version_uri
from model_lib.tracking.server import Tracking


def decision_markdown(registered: Registered, tracking: Tracking) -> str:
    """Return the decision as Markdown for the pipeline's page, each candidate linked to its MLflow
    run."""
    names = [name for name, value in registered.candidates[0].items() if isinstance(value, float)]
    rows = [f"| candidate | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for candidate in registered.candidates:
        run_id = candidate["mlflow_run_id"]
        address = tracking.run_url(run_id) if run_id else None
        shown = f"[{candidate['name']}]({address})" if address else candidate["name"]
        rows.append(f"| {shown} | {' | '.join(f'{candidate[name]:.4f}' for name in names)} |")
    head = (
        f"## Version {registered.version} ({registered.winner}) "
        f"{registered.fate}\n\n{registered.reason}\n\n"
    )
    return head + "\n".join(rows) + "\n"


def tell_outcome(registered: Registered, tracking: Tracking) -> None:
    """Say in the pipeline's run what came of it: the decision, and the winner's scores, by which
    parents are sorted."""
    winner = Evaluation.read(registered.evaluation)
    tags = {
        "captioner.winner": registered.winner,
        "captioner.winner_run_id": winner.mlflow_run_id or "",
        "captioner.winner_model": version_uri(registered.version),
        "captioner.champion_model": version_uri(registered.champion_version)
        if registered.champion_version
        else "",
        "captioner.promoted": str(registered.promoted).lower(),
        "captioner.decision": registered.reason,
    }
    note = decision_markdown(registered, tracking)
    tracking.conclude(evaluation_metrics(winner), {**evaluation_tags(winner), **tags}, note)


def serving_model(registered: Registered) -> str:
    """Return the champion's model URI, for the steps that follow; `WorkError` if none serves."""
    if not registered.champion_version:
        raise WorkError(
            f"models:/{MODEL}@{CHAMPION}: nothing serves: the champion was taken away while its "
            "successor was evaluated, "
            f"and version {registered.version} is a challenger; submit the run again"
        )
    return version_uri(registered.champion_version)
