"""The MLflow model registry: the registered model `captioner`, its versions, and the aliases that say which serves.

`champion` serves; `challenger` is the latest candidate that did not win.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from model_lib.config import RegisterConfig
from model_lib.errors import UserError
from model_lib.judgement import Evaluation, Judgement
from model_lib.promotion import Decision, Policy, choose_winner, decide
from model_lib.sources import resolve_captioner
from model_lib.tracking import MlflowTracking, Tracking, require_mlflow

MODEL = "captioner"
CHAMPION = "champion"
CHALLENGER = "challenger"


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
    candidates: list[dict[str, Any]]
    """Every candidate's name, scores and MLflow run."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def version_uri(version: str) -> str:
    """Return the model URI of a version, which names it for good."""
    return f"models:/{MODEL}/{version}"


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


def pin_version(source: str) -> str:
    """Return `models:/NAME/VERSION` for `models:/NAME@ALIAS`, and other sources unchanged."""
    import mlflow
    from mlflow.exceptions import MlflowException

    if not source.startswith("models:/") or "@" not in source:
        return source
    name, alias = source.removeprefix("models:/").split("@", 1)
    try:
        return f"models:/{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        raise _unknown(source) from error


def require_version(source: str) -> None:
    """Raise `UserError` unless the registry has the model of a `models:/…` URI."""
    import mlflow
    from mlflow.exceptions import MlflowException

    name, _, version = pin_version(source).removeprefix("models:/").partition("/")
    try:
        mlflow.MlflowClient().get_model_version(name, version)
    except MlflowException as error:
        raise _unknown(source) from error


def _unknown(source: str) -> UserError:
    import mlflow

    return UserError(f"{source}: not in the model registry at {mlflow.get_tracking_uri()}; register a model first")


def download_model(source: str) -> str:
    """Return a local folder with the captioner of a `models:/…` URI; `UserError` if the registry has none."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=source))
    except MlflowException as error:
        raise _unknown(source) from error
    for config in sorted(folder.glob("artifacts/*/config.json")):
        return str(config.parent)
    raise UserError(f"{source}: is a registered model, but not a captioner")


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
    present = champion_version(tracking.uri)
    champion = _champion_judgement(config, present)
    policy = Policy(**{f.name: getattr(config, f.name) for f in fields(Policy)})
    decision = decide(champion, best, policy)
    version = _log_version(winner, folder, decision, config, tracking)
    client = mlflow.MlflowClient(tracking.uri)
    if champion_version(tracking.uri) != present:
        raise UserError(f"the champion changed from version {present} while version {version} was judged; run again")
    client.set_registered_model_alias(MODEL, CHAMPION if decision.promote else CHALLENGER, version)
    return Registered(
        winner=winner.name,
        version=version,
        promoted=decision.promote,
        reason=decision.reason,
        champion_version=version if decision.promote else str(present or ""),
        evaluation=config.evaluations[next(n for n, one in enumerate(candidates) if one is best)],
        candidates=[
            {"name": e.name, **e.scores, "CIDEr_shuffled": e.shuffled_cider, "mlflow_run_id": e.mlflow_run_id}
            for e in (candidate.evaluation for candidate in candidates)
        ],
    )


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


def _log_version(
    winner: Evaluation, folder: str, decision: Decision, config: RegisterConfig, tracking: MlflowTracking
) -> str:
    """Log the winner's model to its own MLflow run as a new version of the registered model."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    run_id = winner.mlflow_run_id
    if run_id is None or not tracking.knows(run_id):
        with tracking.start(winner.name, None, params={}, tags={}) as run:
            run_id = run.run_id
    mlflow.set_tracking_uri(tracking.uri)
    here = Path(__file__).parent
    versions = {"mlflow": mlflow.__version__, **winner.packages}
    strings = Schema([ColSpec("string")])  # a column without a name takes lists and data frames alike
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name=MODEL,
            python_model=str(here / "serving.py"),
            artifacts={"model": folder},
            code_paths=[str(here)],
            pip_requirements=[f"{package}=={at}" for package, at in versions.items()],
            signature=ModelSignature(inputs=strings, outputs=strings),
        )
    tags = {
        "name": winner.name,
        "metric": config.metric,
        "decision": decision.reason,
        "scores": json.dumps(winner.scores),
        "split": winner.split,
        "pictures": str(winner.pictures),
        "data_fingerprint": winner.data_fingerprint or "",
    }
    return str(mlflow.register_model(logged.model_uri, MODEL, tags=tags).version)
