"""What a pipeline needs, checked before anything is started: all that is missing is named at once,
within a minute.

Every check is tried even if others failed, each in a thread of its own, because a bucket or server
that cannot be reached tends not to answer at all.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from model_lib.errors import UserError, WorkError, first_line
from model_lib.evaluate.config import EvaluateConfig
from model_lib.ingest.annotations import coco_2017
from model_lib.io import storage
from model_lib.io.errors import is_transient
from model_lib.presets import PRESETS
from model_lib.registry.config import Policy
from model_lib.train.config import TrainConfig
from model_lib.train.trainjob import Machines, require_trainer

TIMEOUT = 40.0
"""Seconds after which a check that has no answer counts as failed."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What must be there before a pipeline starts; empty strings are left out."""

    dataset: str = ""
    """Folder or URI in COCO's layout, or with its archives, that is read."""
    folders: Sequence[str] = ()
    """Folders or URIs that are read."""
    outputs: Sequence[str] = ()
    """Folders or URIs that are written."""
    weights: Sequence[str] = ()
    """Models: hub names, folders, URIs or `models:/…`."""
    tokenizers: Sequence[str] = ()
    """Tokenizers that lie apart from their models: hub names, folders or URIs."""
    candidates: Sequence[TrainConfig] = ()
    """Candidates that are trained …"""
    machines: Machines | None = None
    """… and the machines that train each: more than one need Kubeflow Trainer."""
    pairs: Mapping[str, str] = field(default_factory=dict)
    """Parameters by name, of which all or none are to be given."""
    secret: str = "captioner"
    """Name of the Kubernetes secret from which the steps' environment comes …"""
    keys: Sequence[str] = ()
    """… and the keys that it must have."""
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


def training_sources(candidates: Sequence[TrainConfig]) -> tuple[list[str], list[str]]:
    """Return the sources of the weights, and of the tokenizers apart, that the candidates start
    from."""
    weights: set[str] = set()
    tokenizers: set[str] = set()
    for config in candidates:
        parts = PRESETS[config.preset]
        if config.init_from is not None:
            weights.add(config.init_from)
        elif parts.vision is not None and parts.decoder is not None:
            weights |= {config.vision or parts.vision, config.decoder or parts.decoder}
            tokenizers |= {config.tokenizer} if config.tokenizer else set()
    return sorted(weights), sorted(tokenizers)


def require_evaluation(policy: Policy, **evaluating: Any) -> None:
    """Raise `UserError` if the options of evaluating are out of range, or do not give the score
    that decides."""
    given = {name: value for name, value in evaluating.items() if value != ""}
    config = EvaluateConfig.from_options(model="-", data="-", output="-", **given)
    if policy.metric == "SPICE":
        raise UserError(
            "register_metric SPICE: is not computed in a pipeline; choose another score"
        )
    if policy.metric.endswith("CLIPScore") and config.clip is None:
        raise UserError(f"register_metric {policy.metric}: needs eval_clip")


def preflight(needs: Needs) -> None:
    """Check everything that is needed.

    Raises:
        UserError: something is missing; the message names all of it.
        WorkError: nothing is known to be missing, but a server failed or did not answer, which may
            pass.
    """
    trainer: list[tuple[str, Callable[[], None]]] = []
    if needs.machines is not None and needs.machines.nodes > 1:
        trainer = [("Kubeflow Trainer", partial(require_trainer, needs.candidates, needs.machines))]
    checks: list[tuple[str, Callable[[], str | None]]] = [
        ("MLflow", partial(_tracking, needs.environment.get("MLFLOW_TRACKING_URI"))),
        *(
            [(f"reading {needs.dataset}", partial(_dataset, needs.dataset))]
            if needs.dataset
            else []
        ),
        *((f"reading {folder}", partial(_readable, folder)) for folder in needs.folders if folder),
        *(
            (f"writing to {output}", partial(storage.require_writable, output))
            for output in needs.outputs
            if output
        ),
        *((f"weights {source}", partial(_weights, source)) for source in needs.weights if source),
        *((f"tokenizer {source}", partial(_tokenizer, source)) for source in needs.tokenizers),
        *trainer,
    ]
    missing = [
        f"secret {needs.secret}: no key {key} in the pipeline's namespace, or none that the steps "
        "read"
        for key in needs.keys
        if not needs.environment.get(key)
    ]
    if any(needs.pairs.values()):
        missing += [f"{name}: is empty" for name, value in needs.pairs.items() if not value]
    outcomes: list[UserError | WorkError | None] = [
        WorkError(f"{name}: no answer within {TIMEOUT:.0f} seconds") for name, _ in checks
    ]

    def attempt(number: int, name: str, check: Callable[[], str | None]) -> None:
        try:
            problem = check()
            outcomes[number] = UserError(problem) if problem else None
        except (UserError, WorkError) as error:
            outcomes[number] = error
        except Exception as error:  # whatever a driver raises: its reason is the answer
            outcomes[number] = WorkError(f"{name}: {type(error).__name__}: {first_line(error)}")

    # Daemons, so that one which hangs does not keep the step from ending.
    threads = [
        threading.Thread(target=attempt, args=(number, *check), daemon=True)
        for number, check in enumerate(checks)
    ]
    deadline = time.monotonic() + TIMEOUT
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    problems = [outcome for outcome in outcomes if outcome is not None]
    if missing or problems:
        is_mistake = missing or any(isinstance(problem, UserError) for problem in problems)
        raise (UserError if is_mistake else WorkError)("; ".join([*missing, *map(str, problems)]))


def _readable(folder: str) -> str | None:
    return (
        None
        if storage.exists(folder)
        else f"{folder}: not there, or these credentials may not see it"
    )


def _dataset(dataset: str) -> None:
    for split in ("train", "val"):
        coco_2017(dataset, split)


def _tracking(uri: str | None) -> None:
    """Ask MLflow for its experiments."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if not uri:
        return  # the embedded store
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        kind = WorkError if is_transient(error) else UserError
        raise kind(f"MLflow at {uri}: {first_line(error)}") from error


def _weights(source: str) -> str | None:
    if source.startswith("models:/"):
        from model_lib.registry.model_uris import require_version

        require_version(source)
        return None
    if "://" not in source and not storage.exists(source):
        return _on_hub(source)
    names = storage.list_names(source)
    whole = "config.json" in names and any(name.endswith(".safetensors") for name in names)
    return None if whole else f"{source}: holds no model (config.json and safetensors weights)"


def _tokenizer(source: str) -> str | None:
    if "://" not in source and not storage.exists(source):
        return _on_hub(source)
    names = set(storage.list_names(source))
    whole = "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names
    return (
        None
        if whole
        else f"{source}: holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)"
    )


def _on_hub(name: str) -> str | None:
    """Ask the hub for a repository's configuration."""
    from huggingface_hub import file_exists
    from huggingface_hub.errors import RepositoryNotFoundError

    remedy = "mirror it into the bucket and name that URI, or let the cluster reach the hub"
    try:
        found = file_exists(name, "config.json")
    except RepositoryNotFoundError:
        return (
            f"{name}: no such folder, and no such model on the hub (or HF_TOKEN may not read it); "
            f"{remedy}"
        )
    except Exception as error:
        raise WorkError(
            f"{name}: the hub cannot be reached ({type(error).__name__}); {remedy}"
        ) from error
    return None if found else f"{name}: that hub repository holds no model"
