"""Pictures that are learned from and judged on: scores on them say nothing, and are refused."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from model_lib import storage
from model_lib.data.shards import Manifest, read_manifest
from model_lib.errors import UserError
from model_lib.records import believing, require_columns

log = logging.getLogger(__name__)
COLUMNS = {"image_id": "whole number", "file_name": "text", "sha256": "text"}
COCO_NAME = re.compile(r"(?:COCO_\w+_)?(\d{12})\.\w+")
"""How COCO names its files, and all who cut it up: by their id in twelve digits."""
NAMED = 3
"""Pictures that a message names."""


def require_unseen(record: Mapping[str, Any], judged: Manifest, split: str) -> None:
    """Raise `UserError` if a model learned pictures of `judged`'s split; judging on what was learned may be meant.

    Args:
        record: what training wrote beside the model.
        judged: the data that the model is judged on.
        split: of `judged`.
    """
    data, fingerprint = record.get("configuration", {}).get("data"), record.get("data_fingerprint")
    if data is None or split == "train" or fingerprint == judged.fingerprint:
        return  # ingest keeps the splits of one data set apart
    try:
        training = read_manifest(data)
    except UserError as error:
        log.info("whether the model has learned its %s pictures cannot be told: %s", split, error)
        return
    if training.fingerprint == fingerprint:
        require_apart(training, judged, split)


def require_apart(training: Manifest, judged: Manifest, split: str) -> None:
    """Raise `UserError` if a picture of `judged`'s split is among `training`'s training pictures.

    Pictures are the same if their files are; and, where one data set has Karpathy's splits, if COCO's ids are, which
    both have in their files' names.

    Args:
        training: the data that a model learns from.
        judged: the data that it is judged on, which may be the same.
        split: of `judged`.
    """
    by_id = any(manifest.configuration.get("karpathy") for manifest in (training, judged))
    held_out = {mark: name for name, marks in _pictures(judged, split, by_id) for mark in marks}
    leaked: dict[str, None] = {}  # in their order
    for name, marks in _pictures(training, "train", by_id):
        if any(mark in held_out for mark in marks):
            leaked[name] = None
    if leaked:
        names = ", ".join(list(leaked)[:NAMED]) + (", …" if len(leaked) > NAMED else "")
        raise UserError(
            f"{training.uri}: leaks: {len(leaked):,} of its training pictures ({names}) are {split} pictures of "
            f"{judged.uri}; train on splits that keep them apart, such as ingest --karpathy makes"
        )


def _pictures(manifest: Manifest, split: str, by_id: bool) -> Iterator[tuple[str, list[str | int]]]:
    """Yield each picture's name and what it is known by."""
    for shard in manifest.shards:
        if shard.split == split:
            for row in storage.retrying(shard.uri, lambda uri=shard.uri: _read(uri)):  # type: ignore[misc]
                coco = COCO_NAME.fullmatch(PurePosixPath(row["file_name"]).name)
                is_cocos = by_id and coco is not None and int(coco[1]) == row["image_id"]
                yield row["file_name"], [row["sha256"], *([row["image_id"]] if is_cocos else [])]


def _read(uri: str) -> list[dict]:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file, believing(uri, "a shard that captioner ingest wrote"):
        parquet = pq.ParquetFile(file)
        require_columns(parquet.schema_arrow, COLUMNS)
        return parquet.read(columns=list(COLUMNS)).to_pylist()
