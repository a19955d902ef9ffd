"""Candidates' configurations: from a pipeline's parameters to documents with an output for each."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model_lib.data.shards import read_manifest
from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.options import require
from model_lib.train.config import TrainConfig, pin_sources, resolve


def require_same_data(data: str, fingerprint: str) -> None:
    """Raise `UserError` if the data set at `data` is not the one that this run ingested."""
    present = read_manifest(data).fingerprint
    if present != fingerprint:
        raise UserError(
            f"{data}: holds data {present[:12]} instead of the {fingerprint[:12]} that this run "
            "ingested; another run wrote there since: give each run a data_output of its own"
        )


def candidate_configs(candidates: Any, **common: Any) -> list[TrainConfig]:
    """Return each candidate's configuration, with placeholders for data and output.

    Args:
        candidates: options of each candidate, which override the common ones.
        common: options from the pipeline's form; 0 and "" stand for None, the preset's value.

    Raises:
        UserError: an option is unknown or out of range, or two candidates have one name.
    """
    is_list = isinstance(candidates, list) and len(candidates) > 0
    if not is_list or not all(isinstance(candidate, dict) for candidate in candidates):
        example = '[{"name": "a", "learning_rate": 1e-3}]'
        raise UserError(f"candidates: expected a JSON list of objects, {example}")
    form = {name: value for name, value in common.items() if value}
    configs = []
    for candidate in candidates:
        for name in ("data", "output"):
            message = f"candidate {candidate}: {name} is set by the pipeline; leave it out"
            require(name not in candidate, message)
        options = form | candidate | {"data": "-", "output": "-"}
        configs.append(TrainConfig.from_options(**options))
    names = [config.name for config in configs]
    message = f"candidates: each needs a name of its own, not {', '.join(names)}"
    require(len(set(names)) == len(names), message)
    return configs


def configure_candidates(
    data: str,
    fingerprint: str,
    root: str,
    cache_key: str,
    candidates: list[dict[str, Any]],
    **common: Any,
) -> list[dict[str, Any]]:
    """Return each candidate's configuration as a document {"fingerprint", "options", "cache_key"}.

    The name of its output, in the folder `root`, contains a hash of its options and data. A retry
    and a rerun find the same checkpoints; another configuration or other data does not. With
    another `cache_key` Kubeflow Pipelines does not take steps from its cache. See
    `candidate_configs` for the candidates.
    """
    documents = []
    for config in candidate_configs(candidates, **common):
        config = pin_sources(resolve(config))
        output = storage.join(root, f"{config.name}-{config.key(fingerprint)}")
        options = replace(config, data=data, output=output).to_dict()
        options = {name: value for name, value in options.items() if value is not None}
        documents.append({"fingerprint": fingerprint, "options": options, "cache_key": cache_key})
    return documents


def candidate_config(document: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration in a candidate's document; `UserError` if its data set changed."""
    config = TrainConfig.from_options(**document["options"])
    require_same_data(config.data, document["fingerprint"])
    return config
