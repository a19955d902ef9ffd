"""What the pipeline does with candidates: configurations from loose options, keyed places, the decision's words."""

from collections.abc import Mapping
from typing import Any

from model_lib import storage
from model_lib.config import EvaluateConfig, TrainConfig
from model_lib.errors import UserError
from model_lib.evaluation import Evaluation, evaluate
from model_lib.registry import Registered, champion_version, version_uri
from model_lib.shards import read_manifest
from model_lib.tracking import NO_TRACKING, Tracking, require_mlflow


def candidate_config(data: str, root: str, candidate: Mapping[str, Any], **common: Any) -> TrainConfig:
    """Return a candidate's training configuration; its output is keyed by what shapes the result.

    A retry and a rerun therefore find the same checkpoints, and another configuration or other data never does.

    Args:
        data: the data set's manifest.
        root: folder or URI under which candidates are kept.
        candidate: its own options, over the common ones.
        common: options of all candidates; empty strings stand for None.

    Raises:
        UserError: an option is unknown or out of range.
    """
    options = {name: value for name, value in {**common, **candidate}.items() if value != ""}
    for fixed in ("data", "output"):
        if fixed in candidate:
            raise UserError(f"candidate {candidate}: {fixed} is set by the pipeline; leave it out")
    config = TrainConfig.from_options(data=data, output=root, **options)
    key = config.key(read_manifest(data).fingerprint)
    return TrainConfig.from_options(data=data, output=storage.join(root, f"{config.name}-{key}"), **options)


def judge_model(model: str, data: str, root: str, tracking: Tracking, **options: Any) -> tuple[Evaluation, str]:
    """Judge a model; return the evaluation and its folder under `root`, keyed by data and options."""
    config = EvaluateConfig.from_options(model=model, data=data, output=root, **options)
    folder = storage.join(root, f"evaluation-{config.key(read_manifest(data).fingerprint)}")
    return evaluate(EvaluateConfig.from_options(model=model, data=data, output=folder, **options), tracking), folder


def judge_champion(data: str, root: str, tracking: Tracking, **options: Any) -> str:
    """Judge the present champion on `data`; return its evaluation's folder, or "" if there is no champion yet."""
    version = champion_version(require_mlflow(tracking).uri)
    if version is None:
        return ""
    return judge_model(version_uri(version), data, storage.join(root, "champions"), NO_TRACKING, **options)[1]


def decision_markdown(registered: Registered) -> str:
    """Return the decision as Markdown for the pipeline's page."""
    names = [name for name in registered.candidates[0] if name != "name"]  # the same for all that were comparable
    rows = [f"| candidate | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for candidate in registered.candidates:
        rows.append(f"| {candidate['name']} | {' | '.join(f'{candidate[name]:.4f}' for name in names)} |")
    fate = "is the new champion" if registered.promoted else f"did not replace version {registered.champion_version}"
    head = f"## Version {registered.version} ({registered.winner}) {fate}\n\n{registered.reason}\n\n"
    return head + "\n".join(rows) + "\n"
