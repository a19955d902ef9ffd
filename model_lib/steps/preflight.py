"""Checks of everything that a pipeline needs, before it starts; one message names all problems.

Each check runs in a thread of its own, because a bucket or server that cannot be reached tends not
to answer at all. Together they take less than a minute.
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
from model_lib.io.hub import pin_revision
from model_lib.model.sources import is_hub_name
from model_lib.presets import PRESETS
from model_lib.registry.config import Policy
from model_lib.registry.model_uris import require_version
from model_lib.train.config import TrainConfig
from model_lib.train.trainjob import Machines, require_trainer

Check = Callable[[], None]
"""Raises an error if something is missing."""
TOKENIZER_FILES = ("tokenizer.", "vocab.", "spiece.", "sentencepiece.")
"""Beginnings of the names of files of which one makes a tokenizer."""
TIMEOUT = 40.0
"""Seconds after which a check without an answer counts as failed."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Everything that a pipeline needs; empty strings are left out."""

    dataset: str = ""
    """Folder or URI in COCO's layout, or with its archives, to read."""
    folders: Sequence[str] = ()
    """Folders or URIs to read."""
    outputs: Sequence[str] = ()
    """Folders or URIs to write."""
    weights: Sequence[str] = ()
    """Models: hub names, folders, URIs or `models:/…`."""
    tokenizers: Sequence[str] = ()
    """Tokenizers: hub names, folders or URIs."""
    candidates: Sequence[TrainConfig] = ()
    """Candidates to train."""
    machines: Machines | None = None
    """Machines on which each is trained; more than one need Kubeflow Trainer."""
    pairs: Mapping[str, str] = field(default_factory=dict)
    """Parameters by name: either all are set or none."""
    secret: str = "captioner"
    """Name of the Kubernetes secret with the steps' variables."""
    keys: Sequence[str] = ()
    """Keys that the secret must have."""
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)


def training_sources(candidates: Sequence[TrainConfig]) -> tuple[list[str], list[str]]:
    """Return the sources of the weights and of the tokenizers from which candidates start."""
    weights: set[str] = set()
    tokenizers: set[str] = set()
    for config in candidates:
        parts = PRESETS[config.preset]
        if config.init_from is not None:
            weights.add(config.init_from)
        elif parts.vision is not None and parts.decoder is not None:
            weights |= {config.vision or parts.vision, config.decoder or parts.decoder}
            tokenizers.add(config.tokenizer or config.decoder or parts.decoder)
    return sorted(weights), sorted(tokenizers)


def require_evaluation(policy: Policy, **evaluating: Any) -> None:
    """Raise `UserError` if the options of evaluating are out of range, or do not give the deciding
    score."""
    options = {name: value for name, value in evaluating.items() if value != ""}
    config = EvaluateConfig.from_options(model="-", data="-", output="-", **options)
    if policy.metric == "SPICE":
        message = "is not computed in a pipeline; choose another score"
        raise UserError(f"register_metric SPICE: {message}")
    if policy.metric.endswith("CLIPScore") and config.clip is None:
        raise UserError(f"register_metric {policy.metric}: needs eval_clip")


def preflight(needs: Needs) -> None:
    """Check everything that is needed.

    Raises:
        UserError: something is missing; the message names all of it.
        WorkError: nothing is known to be missing, but a server failed or did not answer, which may
            pass.
    """
    secret = f"secret {needs.secret}: no key"
    missing = [
        f"{secret} {key} in the pipeline's namespace, or none that the steps read"
        for key in needs.keys
        if not needs.environment.get(key)
    ]
    if any(needs.pairs.values()):
        missing += [f"{name}: is empty" for name, value in needs.pairs.items() if not value]
    problems = _run_checks(_checks(needs))
    if missing or problems:
        is_mistake = missing or any(isinstance(problem, UserError) for problem in problems)
        message = "; ".join([*missing, *map(str, problems)])
        raise UserError(message) if is_mistake else WorkError(message)


def _checks(needs: Needs) -> dict[str, Check]:
    checks: dict[str, Check] = {
        "MLflow": partial(_tracking, needs.environment.get("MLFLOW_TRACKING_URI"))
    }
    if needs.dataset:
        checks[f"reading {needs.dataset}"] = partial(_dataset, needs.dataset)
    for folder in filter(None, needs.folders):
        checks[f"reading {folder}"] = partial(_readable, folder)
    for output in filter(None, needs.outputs):
        checks[f"writing to {output}"] = partial(storage.require_writable, output)
    for source in filter(None, needs.weights):
        checks[f"weights {source}"] = partial(_weights, source)
    for source in needs.tokenizers:
        checks[f"tokenizer {source}"] = partial(_tokenizer, source)
    if needs.machines is not None and needs.machines.nodes > 1:
        checks["Kubeflow Trainer"] = partial(require_trainer, needs.candidates, needs.machines)
    return checks


def _run_checks(checks: Mapping[str, Check]) -> list[Exception]:
    """Run all checks at the same time; return their errors."""
    problems: dict[str, Exception | None] = {
        name: WorkError(f"{name}: no answer within {TIMEOUT:.0f} seconds") for name in checks
    }

    def attempt(name: str, check: Check) -> None:
        try:
            check()
            problems[name] = None
        except (UserError, WorkError) as error:
            problems[name] = error
        except Exception as error:  # of any driver
            problems[name] = WorkError(f"{name}: {type(error).__name__}: {first_line(error)}")

    # Daemons: one that hangs must not keep the step from ending.
    threads = [threading.Thread(target=attempt, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [problem for problem in problems.values() if problem is not None]


def _readable(folder: str) -> None:
    if not storage.exists(folder):
        raise UserError(f"{folder}: not there, or these credentials may not see it")


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


def _weights(source: str) -> None:
    if source.startswith("models:/"):
        require_version(source)
    elif is_hub_name(source):
        pin_revision(source)
    else:
        names = storage.list_names(source)
        has_weights = any(name.endswith(".safetensors") for name in names)
        if "config.json" not in names or not has_weights:
            raise UserError(f"{source}: holds no model (config.json and safetensors weights)")


def _tokenizer(source: str) -> None:
    if is_hub_name(source):
        pin_revision(source)
    elif not any(name.startswith(TOKENIZER_FILES) for name in storage.list_names(source)):
        files = "tokenizer.json, or vocab.json and merges.txt"
        raise UserError(f"{source}: holds no tokenizer ({files})")
