"""Candidates' configurations: from a pipeline's parameters, checked, and as documents with a keyed
place for each."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model_lib.data.shards import read_manifest
from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.model.sources import lasting_source
from model_lib.train.config import TrainConfig, resolve


def require_same_data(data: str, fingerprint: str) -> None:
    """Raise `UserError` if the data set at `data` is not the one that this run ingested."""
    found = read_manifest(data).fingerprint
    if found != fingerprint:
        raise UserError(
            f"{data}: holds data {found[:12]} instead of the {fingerprint[:12]} that this run "
            "ingested; another run "
            "wrote there since: give each run a data_output of its own"
        )


def candidate_configs(candidates: Any, **common: Any) -> list[TrainConfig]:
    """Return each candidate's configuration, with placeholders for data and output.

    Args:
        candidates: each one's own options, over the common ones.
        common: options from the pipeline's form; 0 and "" stand for None, the preset's value.

    Raises:
        UserError: an option is unknown or out of range, or two candidates have one name.
    """
    if (
        not isinstance(candidates, list)
        or not candidates
        or not all(isinstance(c, dict) for c in candidates)
    ):
        raise UserError(
            'candidates: expected a JSON list of objects, [{"name": "a", "learning_rate": 1e-3}]'
        )
    form = {name: value for name, value in common.items() if value}
    configs = []
    for candidate in candidates:
        for fixed in ("data", "output"):
            if fixed in candidate:
                raise UserError(
                    f"candidate {candidate}: {fixed} is set by the pipeline; leave it out"
                )
        options = form | candidate | {"data": "-", "output": "-"}
        configs.append(TrainConfig.from_options(**options))
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise UserError(f"candidates: each needs a name of its own, not {', '.join(names)}")
    return configs


def configure_candidates(
    data: str,
    fingerprint: str,
    root: str,
    cache_key: str,
    candidates: list[dict[str, Any]],
    **common: Any,
) -> list[dict[str, Any]]:
    """Return each candidate's configuration as a document: `{"fingerprint", "options",
    "cache_key"}`.

    Its output is keyed by what shapes the result, so that a retry and a rerun find the same
    checkpoints, and another configuration or other data never does.

    Args:
        data: the data set's manifest.
        fingerprint: the data set's.
        root: folder or URI under which candidates are kept.
        cache_key: any text; another one lets Kubeflow Pipelines, which looks at the document, run
            the steps again.
        candidates: each one's own options, over the common ones.
        common: see `candidate_configs`.

    Raises:
        UserError: an option is unknown or out of range.
    """
    documents = []
    for config in candidate_configs(candidates, **common):
        if config.init_from is not None:
            config = replace(config, init_from=lasting_source(config.init_from))
        config = resolve(config)
        output = storage.join(root, f"{config.name}-{config.key(fingerprint)}")
        options = replace(config, data=data, output=output).to_dict()
        given = {name: value for name, value in options.items() if value is not None}
        documents.append({"fingerprint": fingerprint, "options": given, "cache_key": cache_key})
    return documents


def candidate_config(document: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration in a candidate's document; `UserError` if its data set is not the
    same any more."""
    config = TrainConfig.from_options(**document["options"])
    require_same_data(config.data, document["fingerprint"])
    return config
