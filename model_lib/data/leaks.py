"""Images that are learned from and evaluated on: scores on them say nothing, and are refused."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from model_lib.data.shards import SHARD, Manifest, read_manifest
from model_lib.errors import UserError
from model_lib.io.validation import read_parquet

log = logging.getLogger(__name__)
COLUMNS = {"image_id": "int", "file_name": "text", "sha256": "text"}
COCO_NAME = re.compile(r"(?:COCO_\w+_)?(\d{12})\.\w+")
"""How COCO names its files, and all who cut it up: by their id in twelve digits."""
NAMED = 3
"""Images that a message names."""


def require_unseen(record: Mapping[str, Any], evaluated: Manifest, split: str) -> None:
    """Raise `UserError` if a model learned images of `evaluated`'s split; evaluating on what was
    learned may be meant.

    Args:
        record: what training wrote beside the model.
        evaluated: the data that the model is evaluated on.
        split: of `evaluated`.
    """
    data, fingerprint = record.get("configuration", {}).get("data"), record.get("data_fingerprint")
    if data is None or split == "train" or fingerprint == evaluated.fingerprint:
        return  # ingest keeps the splits of one data set apart
    try:
        training = read_manifest(data)
    except UserError as error:
        log.info("whether the model has learned its %s images cannot be told: %s", split, error)
        return
    if training.fingerprint == fingerprint:
        require_apart(training, evaluated, split)


def require_apart(training: Manifest, evaluated: Manifest, split: str) -> None:
    """Raise `UserError` if an image of `evaluated`'s split is among `training`'s training images.

    Images are the same if their files are; and, where one data set has Karpathy's splits, if COCO's
    ids are, which both have in their files' names.

    Args:
        training: the data that a model learns from.
        evaluated: the data that it is evaluated on, which may be the same.
        split: of `evaluated`.
    """
    by_id = any(manifest.configuration.get("karpathy") for manifest in (training, evaluated))
    held_out = {mark: name for name, marks in _images(evaluated, split, by_id) for mark in marks}
    leaked: dict[str, None] = {}  # in their order
    for name, marks in _images(training, "train", by_id):
        if any(mark in held_out for mark in marks):
            leaked[name] = None
    if leaked:
        names = ", ".join(list(leaked)[:NAMED]) + (", …" if len(leaked) > NAMED else "")
        raise UserError(
            f"{training.uri}: leaks: {len(leaked):,} of its training images ({names}) are {split} "
            "images of "
            f"{evaluated.uri}; train on splits that keep them apart, such as ingest --karpathy "
            "makes"
        )


def _images(manifest: Manifest, split: str, by_id: bool) -> Iterator[tuple[str, list[str | int]]]:
    """Yield each image's name and what it is known by."""
    for shard in manifest.shards:
        if shard.split == split:
            for row in read_parquet(shard.uri, COLUMNS, SHARD).to_pylist():
                coco = COCO_NAME.fullmatch(PurePosixPath(row["file_name"]).name)
                is_cocos = by_id and coco is not None and int(coco[1]) == row["image_id"]
                yield row["file_name"], [row["sha256"], *([row["image_id"]] if is_cocos else [])]
