"""The pipelines' parameters as the configurations of their stages.

Each JSON object of further options is checked by its stage's own dataclass: by `captioner submit`,
by preflight, and by the step itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from model_lib.batch.config import BatchConfig
from model_lib.errors import UserError
from model_lib.evaluate.config import EvaluateConfig
from model_lib.ingest.config import IngestConfig
from model_lib.io import storage
from model_lib.options import StageConfig, require
from model_lib.registry.config import RegisterConfig
from model_lib.train.config import TrainConfig

MOST_WORKERS = 64
"""Iterations of a loop for which Argo's workflow stays small enough; see docs/scale.md."""
UNKNOWN = "-"
"""In place of a path that an earlier step makes."""
Options = Mapping[str, Any]
C = TypeVar("C", bound=StageConfig)


def _configure(cls: type[C], parameter: str, options: Options, **own: Any) -> C:
    """Return a stage's configuration; errors name the pipeline's parameter.

    Args:
        cls: the stage's dataclass.
        parameter: the one that holds `options`.
        options: the user's.
        own: options that the pipeline sets itself.
    """
    for name in own:
        message = f"{parameter}: {name} is set by the pipeline; leave it out"
        require(name not in options, message)
    try:
        return cls.from_options(**own, **options)
    except UserError as error:
        message = str(error).removeprefix(f"{cls.__name__}: ")
        raise UserError(f"{parameter}: {message}") from error


def ingest_config(data: str, output: str, options: Options) -> IngestConfig:
    dataset = {"dataset": data} if data else {}
    output = storage.join(output, "data")
    return _configure(IngestConfig, "ingest_options", options, **dataset, output=output)


def candidate_configs(candidates: Any, preset: str, options: Options) -> list[TrainConfig]:
    """Return each candidate's configuration, with placeholders for data and output.

    Args:
        candidates: a name and options of each, which override `options`.
        preset: of all, unless a candidate has its own.
        options: of all.

    Raises:
        UserError: an option is unknown or out of range, or two candidates have one name.
    """
    is_list = isinstance(candidates, list) and len(candidates) > 0
    if not is_list or not all(isinstance(candidate, dict) for candidate in candidates):
        example = '[{"name": "a", "learning_rate": 1e-3}]'
        raise UserError(f"candidates: expected a JSON list of objects, {example}")
    require("preset" not in options, "train_options: preset is a parameter of its own")
    own = {"data": UNKNOWN, "output": UNKNOWN}
    _configure(TrainConfig, "train_options", options, preset=preset, **own)
    configs = [
        _configure(TrainConfig, f"candidate {c}", {"preset": preset, **options, **c}, **own)
        for c in candidates
    ]
    names = [config.name for config in configs]
    message = f"candidates: each needs a name of its own, not {', '.join(names)}"
    require(len(set(names)) == len(names), message)
    return configs


def evaluate_config(
    options: Options, model: str = UNKNOWN, data: str = UNKNOWN, output: str = UNKNOWN
) -> EvaluateConfig:
    own = {"model": model, "data": data, "output": output}
    return _configure(EvaluateConfig, "eval_options", options, **own)


def register_config(
    options: Options, evaluations: Sequence[str] = (UNKNOWN,), champion: str = UNKNOWN
) -> RegisterConfig:
    own = {"evaluations": tuple(evaluations), "champion_evaluation": champion}
    return _configure(RegisterConfig, "register_options", options, **own)


def batch_config(images: str, output: str, model: str, options: Options) -> BatchConfig:
    own = {"images": images, "output": output, "model": model}
    return _configure(BatchConfig, "caption_options", options, **own)


@dataclass(frozen=True)
class Form:
    """What a pipeline is to do."""

    ingest: IngestConfig | None
    candidates: list[TrainConfig]
    batch: BatchConfig | None
    evaluation: EvaluateConfig


def read_form(
    *,
    output: str,
    images: str,
    caption_options: Options,
    caption_workers: int,
    model: str = UNKNOWN,
    data: str = "",
    ingest_options: Options = {},  # noqa: B006  never changed
    ingest_workers: int = 1,
    preset: str = "",
    candidates: Any = None,
    train_options: Options = {},  # noqa: B006
    eval_options: Options = {},  # noqa: B006
    register_options: Options = {},  # noqa: B006
) -> Form:
    """Return a pipeline's parameters as configurations; those of training are there if `preset` is.

    Raises:
        UserError: an option is unknown or out of range, or does not fit the others.
    """
    for name, workers in (("caption", caption_workers), ("ingest", ingest_workers)):
        is_possible = 1 <= workers <= MOST_WORKERS
        require(is_possible, f"{name}_workers: {workers} is not from 1 to {MOST_WORKERS}")
    evaluation = evaluate_config(eval_options)
    metric = register_config(register_options).metric
    message = f"register_options: metric {metric} is not computed in a pipeline; choose another"
    require(metric != "SPICE", message)
    has_clip = evaluation.clip is not None or not metric.endswith("CLIPScore")
    require(has_clip, f"register_options: metric {metric} needs clip in eval_options")
    if preset:
        configs = candidate_configs(candidates, preset, train_options)
        ingest = ingest_config(data, output, ingest_options)
        output = storage.join(output, "captions")
    else:
        configs, ingest = [], None
    batch = batch_config(images, output, model, caption_options) if images else None
    return Form(ingest, configs, batch, evaluation)
