"""Captioning a plan's shards: images are read and decoded ahead, and each shard's file is whole or
not there."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_lib import __version__
from model_lib.batch.config import BatchConfig
from model_lib.batch.listing import ListedImage
from model_lib.batch.planning import Plan, folder_of, load_plan
from model_lib.batch.rows import ABOUT, FIELDS, SEVERAL
from model_lib.errors import UserError, WorkError
from model_lib.io import storage
from model_lib.io.background import Background
from model_lib.io.cpus import cpu_count
from model_lib.io.images import ImageError, decode_image, read_image, require_readable, to_pixels
from model_lib.io.prefetch import PREFETCH, prefetch_map
from model_lib.io.url_policy import UrlNotAllowed, require_allowed, store_of
from model_lib.progress import Progress

if TYPE_CHECKING:
    from model_lib.model.captioner import Captioner

RETRY_SECONDS = 60.0
"""Seconds for which an image is asked for again while its store fails."""


def caption_shards(made: Plan, indices: Sequence[int], model: "Captioner") -> None:
    """Caption the images of some shards and write their files, each whole or not at all.

    Images are fetched and decoded ahead on threads, into the next shards too, and files are written
    on another, so that the model waits for neither.
    """
    config = made.config
    schema = pa.schema([*FIELDS, *(SEVERAL if config.num_captions > 1 else [])])
    total = sum(made.shards[index].images for index in indices)
    with Progress("caption", total, "images") as progress, Background() as writing:
        began = time.monotonic()
        for index, rows in _captioned(made, indices, model, progress):
            seconds, began = time.monotonic() - began, time.monotonic()
            about = {
                "version": __version__,
                "seconds": round(seconds, 3),
                "configuration": made.configuration,
            }
            table = pa.Table.from_pylist(rows, schema.with_metadata({ABOUT: json.dumps(about)}))
            writing.start(partial(_write, table, made.captions(made.shards[index])))


def _write(table: pa.Table, uri: str) -> None:
    with storage.atomic_file(uri) as part:
        pq.write_table(table, part)


def _captioned(
    made: Plan, indices: Sequence[int], model: "Captioner", progress: Progress
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield each shard's rows, in order."""
    config = made.config
    images = (image for index in indices for image in made.images(index))
    load = partial(_load, size=model.image_size, source=config.images)
    workers, depth = config.workers or 2 * cpu_count(), PREFETCH * config.batch_size
    with closing(prefetch_map(load, images, workers, depth)) as loaded:
        for index in indices:
            rows: list[dict[str, Any]] = []
            while left := made.shards[index].images - len(rows):
                batch = list(islice(loaded, min(config.batch_size, left)))
                rows += _caption_batch(batch, model, config)
                progress.advance(len(batch))
            yield index, rows


def _caption_batch(
    loaded: list[tuple[dict[str, Any], np.ndarray | None]], model: "Captioner", config: BatchConfig
) -> list[dict[str, Any]]:
    from model_lib.model.captioning import caption_pixels

    good = [pixels for _, pixels in loaded if pixels is not None]
    captioned = iter(caption_pixels(model, np.stack(good), config) if good else [])
    rows = []
    for row, pixels in loaded:
        if pixels is not None:
            captions = next(captioned)
            if config.rank:
                captions = sorted(captions, key=lambda caption: -caption.score)
            row.update(status="ok", caption=captions[0].text, score=captions[0].score)
            row.update(
                captions=[one.text for one in captions], scores=[one.score for one in captions]
            )
        rows.append({**row, "model": config.model, "captioned_at": datetime.now(UTC)})
    return rows


def _load(listed: ListedImage, size: int, source: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """Read and decode one image: its row so far, and its pixels unless it cannot be used."""
    row: dict[str, Any] = {"uri": listed.uri, "status": "error"}
    try:
        if listed.is_from_list:
            _require_listed(listed.uri, source)
        require_readable(listed.bytes)
        content = read_image(listed.uri, RETRY_SECONDS, redirects=not listed.is_from_list)
        row["bytes"] = len(content)
        if _changed(listed, content):
            raise ImageError("changed", "is another file than was listed; the next run captions it")
        image = decode_image(content)
        row.update(width=image.width, height=image.height)
        return row, to_pixels(image, size)
    except ImageError as error:
        row["error"] = str(error)
    except (UserError, WorkError) as error:
        row["error"] = f"{_reason(error)}: {error}"
    return row, None


def _require_listed(uri: str, source: str) -> None:
    """Raise `UrlNotAllowed` if a list in a store names an image that is elsewhere."""
    if not storage.is_local(source):
        require_allowed(uri, store_of(source))


def _changed(image: ListedImage, content: bytes) -> bool:
    """Whether an image is not the one that was listed: by its size and, here, by its time."""
    if image.bytes >= 0 and len(content) != image.bytes:
        return True
    if not image.version or not storage.is_local(image.uri):
        return False
    try:
        return image.version != str(os.stat(image.uri).st_mtime)
    except OSError:  # gone since it was read
        return True


def _reason(error: UserError | WorkError) -> str:
    cause = error.__cause__
    if isinstance(error, UrlNotAllowed):
        return "not_allowed"
    if (
        isinstance(cause, PermissionError)
        or getattr(cause, "status", None) == 403
        or "Forbidden" in str(cause)
    ):
        return "forbidden"
    return "missing" if isinstance(error, UserError) else "unreachable"


def caption_planned(reference: str, index: int) -> None:
    """Caption one shard of the plan that `reference` means, unless its file is there.

    Raises:
        UserError: the model is another than the one that the images were planned for, or the plan
            is out of date.
    """
    made = load_plan(reference)
    if index in made.missing():
        if PurePosixPath(folder_of(made.config)).name != PurePosixPath(made.folder).name:
            raise UserError(
                f"{made.config.model}: is another model than was planned with; start again"
            )
        caption_shards(made, [index], load_model(made.config))


def load_model(config: BatchConfig) -> "Captioner":
    from model_lib.model.captioner import Captioner

    return Captioner.from_pretrained(config.model, device=config.device, precision=config.precision)
