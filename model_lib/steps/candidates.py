"""Candidates' configurations: from a pipeline's parameters to documents with an output for each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from model_lib.data.shards import read_manifest
from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.train.config import TrainConfig, pin_sources, resolve


def require_same_data(data: str, fingerprint: str) -> None:
    """Raise `UserError` if the data set at `data` is not the one that this run ingested."""
    present = read_manifest(data).fingerprint
    if present != fingerprint:
        raise UserError(
            f"{data}: holds data {present[:12]} instead of the {fingerprint[:12]} that this run "
            "ingested; another run wrote there since: give each run an output of its own"
        )


def configure_candidates(
    configs: Sequence[TrainConfig], data: str, fingerprint: str, root: str
) -> list[dict[str, Any]]:
    """Return each candidate's configuration as a document {"fingerprint", "options"}.

    The name of its output, in the folder `root`, contains a hash of its options and data. A retry
    and a rerun find the same checkpoints; another configuration or other data does not.
    """
    documents = []
    for config in configs:
        config = pin_sources(resolve(config))
        output = storage.join(root, f"{config.name}-{config.key(fingerprint)}")
        options = replace(config, data=data, output=output).to_dict()
        options = {name: value for name, value in options.items() if value is not None}
        documents.append({"fingerprint": fingerprint, "options": options})
    return documents


def candidate_config(document: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration in a candidate's document; `UserError` if its data set changed."""
    config = TrainConfig.from_options(**document["options"])
    require_same_data(config.data, document["fingerprint"])
    return config
