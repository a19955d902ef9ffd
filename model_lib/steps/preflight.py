"""Checks of everything that a pipeline needs, before it starts; one message names all problems.

Each check runs in a thread of its own, because a bucket or server that cannot be reached tends not
to answer at all. Together they take less than a minute.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from model_lib.errors import UserError, WorkError, first_line
from model_lib.ingest.datasets import require_sources
from model_lib.io import storage
from model_lib.io.errors import is_transient
from model_lib.io.hub import pin_revision
from model_lib.model.sources import RIVAL, is_hub_name
from model_lib.presets import PRESETS
from model_lib.registry.model_uris import require_version
from model_lib.steps.form import Form
from model_lib.tracking.server import require_scheme
from model_lib.train.config import TrainConfig
from model_lib.train.trainjob import Machines, require_trainer

Check = Callable[[], None]
"""Raises an error if something is missing."""
T = TypeVar("T")
TOKENIZER_FILES = ("tokenizer.", "vocab.", "spiece.", "sentencepiece.")
"""Beginnings of the names of files of which one makes a tokenizer."""
TIMEOUT = 40.0
"""Seconds after which a check without an answer counts as failed."""


def preflight(
    form: Form,
    *,
    output: str,
    model: str = "",
    machines: Machines | None = None,
    secret: str = "",
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Check everything that a pipeline needs.

    Args:
        form: its parameters.
        output: folder or URI that it writes to.
        model: to caption with: a hub name, folder, URI or `models:/…`; "": one that is trained.
        machines: on which each candidate is trained; more than one need Kubeflow Trainer.
        secret: the Kubernetes secret with the steps' variables.
        environment: this step's variables.

    Raises:
        UserError: something is missing; the message names all of it.
        WorkError: nothing is known to be missing, but a server failed or did not answer, which may
            pass.
    """
    missing = []
    uri = environment.get("MLFLOW_TRACKING_URI")
    if not uri and "KFP_WORKFLOW" in environment:  # else the store would be lost with the pod
        missing += [f"secret {secret}: no key MLFLOW_TRACKING_URI in the pipeline's namespace"]
    sources, tokenizers = training_sources(form.candidates)
    checks: dict[str, Check] = {"MLflow": partial(_tracking, uri)}
    if form.ingest is not None:
        checks["reading the data"] = partial(require_sources, form.ingest)
    if form.batch is not None:
        checks[f"reading {form.batch.images}"] = partial(_readable, form.batch.images)
    checks[f"writing to {output}"] = partial(storage.require_writable, output)
    for source in filter(None, (model, form.evaluation.clip, *sources)):
        checks[f"weights {source}"] = partial(_weights, source)
    for source in tokenizers:
        checks[f"tokenizer {source}"] = partial(_tokenizer, source)
    if machines is not None and machines.nodes > 1:
        checks["Kubeflow Trainer"] = partial(require_trainer, form.candidates, machines)
    results = run_checks(checks, TIMEOUT).values()
    problems = [result for result in results if isinstance(result, Exception)]
    if missing or problems:
        is_mistake = missing or any(isinstance(problem, UserError) for problem in problems)
        message = "; ".join([*missing, *map(str, problems)])
        raise UserError(message) if is_mistake else WorkError(message)


def training_sources(candidates: Sequence[TrainConfig]) -> tuple[list[str], list[str]]:
    """Return the sources of the weights and of the tokenizers from which candidates start."""
    weights: set[str] = set()
    tokenizers: set[str] = set()
    for config in candidates:
        preset = PRESETS[config.preset]
        if config.init_from is not None:
            weights.add(config.init_from)
        elif preset.vision is not None and preset.decoder is not None:
            weights |= {config.vision or preset.vision, config.decoder or preset.decoder}
            tokenizers.add(config.tokenizer or config.decoder or preset.decoder)
    return sorted(weights), sorted(tokenizers)


def run_checks(checks: Mapping[str, Callable[[], T]], seconds: float) -> dict[str, T | Exception]:
    """Run all checks at the same time; return what each returns or raises, or a `WorkError` for one
    that takes longer than `seconds`."""
    results: dict[str, T | Exception] = {
        name: WorkError(f"{name}: no answer within {seconds:.0f} seconds") for name in checks
    }

    def attempt(name: str, check: Callable[[], T]) -> None:
        try:
            results[name] = check()
        except (UserError, WorkError) as error:
            results[name] = error
        except Exception as error:  # of any driver
            results[name] = WorkError(f"{name}: {type(error).__name__}: {first_line(error)}")

    # Daemons: one that hangs must not keep the step from ending.
    threads = [threading.Thread(target=attempt, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(results)


def _readable(folder: str) -> None:
    if not storage.exists(folder):
        raise UserError(f"{folder}: not there, or these credentials may not see it")


def _tracking(uri: str | None) -> None:
    """Ask MLflow for its experiments."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if not uri:
        return  # the embedded store
    require_scheme(uri)
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        kind = WorkError if is_transient(error) else UserError
        raise kind(f"MLflow at {uri}: {first_line(error)}") from error


def _weights(source: str) -> None:
    source = source.removeprefix(RIVAL)
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
