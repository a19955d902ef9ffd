"""Images that a model was trained on and is evaluated on: scores on them mean nothing."""

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
"""COCO's file names, which hold the image's id in twelve digits, in all data sets made from it."""
NAMED = 3
"""Images that a message names."""


def require_unseen(record: Mapping[str, Any], evaluated: Manifest, split: str) -> None:
    """Raise `UserError` if a model was trained on images of `evaluated`'s split.

    Its own training split may be evaluated on purpose.

    Args:
        record: the training record beside the model.
        evaluated: the data that the model is evaluated on.
        split: of `evaluated`.
    """
    data, fingerprint = record.get("configuration", {}).get("data"), record.get("data_fingerprint")
    if data is None or split == "train" or fingerprint == evaluated.fingerprint:
        return  # ingest keeps the splits of one data set apart
    try:
        training = read_manifest(data)
    except UserError as error:
        log.info("whether the model was trained on its %s images is unknown: %s", split, error)
        return
    if training.fingerprint == fingerprint:
        require_apart(training, evaluated, split)


def require_apart(training: Manifest, evaluated: Manifest, split: str) -> None:
    """Raise `UserError` if an image of `evaluated`'s split is among `training`'s training images.

    Images are the same if their files are. Where one data set has Karpathy's splits, they are also
    the same if COCO's ids are, which the files' names hold.

    Args:
        training: the data that a model is trained on.
        evaluated: the data that it is evaluated on, which may be the same.
        split: of `evaluated`.
    """
    by_id = any(manifest.configuration.get("karpathy") for manifest in (training, evaluated))
    held_out = {key for _, keys in _images(evaluated, split, by_id) for key in keys}
    train = _images(training, "train", by_id)
    leaked = list(dict.fromkeys(name for name, keys in train if held_out.intersection(keys)))
    if leaked:
        names = ", ".join(leaked[:NAMED]) + (", …" if len(leaked) > NAMED else "")
        raise UserError(
            f"{training.uri}: leaks: {len(leaked):,} of its training images ({names}) are {split} "
            f"images of {evaluated.uri}; train on splits that keep them apart, such as those of "
            "ingest --karpathy"
        )


def _images(manifest: Manifest, split: str, by_id: bool) -> Iterator[tuple[str, list[str | int]]]:
    """Yield each image's name, and its file's digest and COCO's id, by which it is recognised."""
    for shard in manifest.shards:
        if shard.split != split:
            continue
        for row in read_parquet(shard.uri, COLUMNS, SHARD).to_pylist():
            keys = [row["sha256"]]
            coco = COCO_NAME.fullmatch(PurePosixPath(row["file_name"]).name)
            if by_id and coco is not None and int(coco[1]) == row["image_id"]:
                keys.append(row["image_id"])
            yield row["file_name"], keys
