"""What the pipeline does with candidates: configurations from loose options, keyed places, the decision's words."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model_lib import storage
from model_lib.data.shards import read_manifest
from model_lib.errors import UserError, WorkError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.evaluate.evaluation import evaluate
from model_lib.evaluate.judgement import Evaluation
from model_lib.evaluate.scorecard import evaluation_metrics, evaluation_tags
from model_lib.model.sources import lasting_source
from model_lib.registry.config import NO_CHAMPION
from model_lib.registry.registry import Registered, champion_version
from model_lib.registry.turns import CHAMPION
from model_lib.steps.preflight import check_candidates
from model_lib.tracking.model_uris import MODEL, version_uri
from model_lib.tracking.server import NO_TRACKING, Tracking, require_mlflow
from model_lib.train.config import TrainConfig


def require_same_data(data: str, fingerprint: str) -> None:
    """Raise `UserError` if the data set at `data` is not the one that this run ingested."""
    found = read_manifest(data).fingerprint
    if found != fingerprint:
        raise UserError(
            f"{data}: holds data {found[:12]} instead of the {fingerprint[:12]} that this run ingested; another run "
            "wrote there since: give each run a data_output of its own"
        )


def configure_candidates(
    data: str, fingerprint: str, root: str, candidates: list[dict[str, Any]], **common: Any
) -> list[dict[str, Any]]:
    """Return each candidate's configuration as a document: `{"fingerprint", "options"}`.

    Its output is keyed by what shapes the result, so that a retry and a rerun find the same checkpoints, and another
    configuration or other data never does.

    Args:
        data: the data set's manifest.
        fingerprint: the data set's.
        root: folder or URI under which candidates are kept.
        candidates: each one's own options, over the common ones.
        common: options of all candidates; empty strings stand for None.

    Raises:
        UserError: an option is unknown or out of range.
    """
    documents = []
    for config in check_candidates(candidates, **common):
        if config.start is not None:
            config = replace(config, start=lasting_source(config.start))
        output = storage.join(root, f"{config.name}-{config.key(fingerprint)}")
        options = replace(config, data=data, output=output).to_dict()
        documents.append({"fingerprint": fingerprint, "options": {k: v for k, v in options.items() if v is not None}})
    return documents


def candidate_config(document: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration in a candidate's document; `UserError` if its data set is not the same any more."""
    config = TrainConfig.from_options(**document["options"])
    require_same_data(config.data, document["fingerprint"])
    return config


def judge_model(model: str, data: str, root: str, tracking: Tracking, **options: Any) -> tuple[Evaluation, str]:
    """Judge a model; return the evaluation and its folder under `root`, keyed by data and options."""
    config = EvaluateConfig.from_options(model=model, data=data, output=root, **options)
    folder = storage.join(root, f"evaluation-{config.key(read_manifest(data).fingerprint)}")
    return evaluate(EvaluateConfig.from_options(model=model, data=data, output=folder, **options), tracking), folder


def judge_champion(data: str, root: str, tracking: Tracking, **options: Any) -> str:
    """Judge the present champion on `data`; return its evaluation's folder, or none if there is no champion yet."""
    version = champion_version(require_mlflow(tracking).uri)
    if version is None:
        return NO_CHAMPION
    return judge_model(version_uri(version), data, storage.join(root, "champions"), NO_TRACKING, **options)[1]


def decision_markdown(registered: Registered, tracking: Tracking) -> str:
    """Return the decision as Markdown for the pipeline's page, each candidate linked to its MLflow run."""
    names = [name for name, value in registered.candidates[0].items() if isinstance(value, float)]
    rows = [f"| candidate | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for candidate in registered.candidates:
        run_id = candidate["mlflow_run_id"]
        address = tracking.run_url(run_id) if run_id else None
        shown = f"[{candidate['name']}]({address})" if address else candidate["name"]
        rows.append(f"| {shown} | {' | '.join(f'{candidate[name]:.4f}' for name in names)} |")
    head = f"## Version {registered.version} ({registered.winner}) {registered.fate}\n\n{registered.reason}\n\n"
    return head + "\n".join(rows) + "\n"


def tell_outcome(registered: Registered, tracking: Tracking) -> None:
    """Say in the pipeline's run what came of it: the decision, and the winner's scores, by which parents are sorted."""
    winner = Evaluation.read(registered.evaluation)
    tags = {
        "captioner.winner": registered.winner,
        "captioner.winner_run_id": winner.mlflow_run_id or "",
        "captioner.winner_model": version_uri(registered.version),
        "captioner.champion_model": version_uri(registered.champion_version) if registered.champion_version else "",
        "captioner.promoted": str(registered.promoted).lower(),
        "captioner.decision": registered.reason,
    }
    note = decision_markdown(registered, tracking)
    tracking.conclude(evaluation_metrics(winner), {**evaluation_tags(winner), **tags}, note)


def serving_model(registered: Registered) -> str:
    """Return the champion's model URI, for the steps that follow; `WorkError` if none serves."""
    if not registered.champion_version:
        raise WorkError(
            f"models:/{MODEL}@{CHAMPION}: nothing serves: the champion was taken away while its successor was judged, "
            f"and version {registered.version} is a challenger; submit the run again"
        )
    return version_uri(registered.champion_version)
