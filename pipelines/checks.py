"""What a pipeline's first step would refuse among its parameters, checked before anything is
uploaded; needs no server and no kfp."""

from collections.abc import Callable, Mapping
from typing import Any

from model_lib.batch.config import BatchConfig
from model_lib.ingest.config import ingest_config
from model_lib.registry.config import Policy
from model_lib.steps.candidates import candidate_configs
from model_lib.steps.preflight import require_evaluation
from model_lib.train.trainjob import Machines

Parameters = Mapping[str, Any]


def _stage(parameters: Parameters, prefix: str) -> dict[str, Any]:
    """Return a stage's parameters without their prefix."""
    return {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}


def _check_training(parameters: Parameters) -> None:
    ingest_config(**_stage(parameters, "data_"), options=parameters["ingest_options"])
    training = _stage(parameters, "train_")
    for name in ("checkpoint_uri", "cache_key"):
        training.pop(name, None)
    gpu = {name: value for name, value in parameters.items() if name.startswith("gpu_")}
    secret = {"secret_name": parameters["secret_name"], "secret_variables": {}}
    Machines(nodes=training.pop("nodes"), image="-", cpu=1, memory=1, **gpu, **secret)
    candidate_configs(training.pop("candidates"), **training)
    require_evaluation(Policy(**_stage(parameters, "register_")), **_stage(parameters, "eval_"))


def _check_captioning(parameters: Parameters) -> None:
    captioning = _stage(parameters, "caption_")
    options = captioning.pop("options")
    BatchConfig.from_options(**{**captioning, **options})


CHECKS: dict[str, Callable[[Parameters], None]] = {
    "train_captioner": _check_training,
    "caption_bucket": _check_captioning,
}
"""By the pipeline's name; each takes all parameters, and raises `UserError`."""
