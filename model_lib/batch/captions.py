"""Captioning a plan's shards: images are prefetched, and files are written whole or not at all."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import islice, tee

import numpy as np
import pyarrow as pa

from model_lib import __version__
from model_lib.batch.config import BatchConfig
from model_lib.batch.listing import ListedImage
from model_lib.batch.planning import Plan, load_plan, model_files
from model_lib.batch.rows import FIELDS, METADATA_KEY, SEVERAL, Row, write_table
from model_lib.data.shards import Preprocess
from model_lib.errors import UserError, WorkError
from model_lib.ingest.image_source import Folder
from model_lib.io import storage
from model_lib.io.archives import read_image
from model_lib.io.background import Background
from model_lib.io.cpus import cpu_count
from model_lib.io.errors import http_status
from model_lib.io.images import ImageError, decode_image, require_readable
from model_lib.io.prefetch import PREFETCH, prefetch_map
from model_lib.io.url_policy import UrlNotAllowed
from model_lib.model.captioning import ImageCaptioner
from model_lib.model.rivals import load_captioner
from model_lib.progress import Progress
from model_lib.scores.cider import consensus

Loaded = tuple[Row, np.ndarray | None]
"""An image's row so far, and its pixels unless it cannot be used."""
RETRY_SECONDS = 60.0
"""Seconds for which reading an image is retried while its store fails."""


def caption_shards(plan: Plan, indices: Sequence[int], model: ImageCaptioner) -> None:
    """Caption the images of some shards and write their files.

    The model waits neither for images, which are prefetched, those of the next shards too, nor for
    files, which are written on another thread.
    """
    config = plan.config
    schema = pa.schema([*FIELDS, *(SEVERAL if config.decode.num_captions > 1 else [])])
    images = (image for index in indices for image in plan.images(index))
    folder = Folder(config.images.rpartition("/")[0], config.images, RETRY_SECONDS)
    load = partial(_load, preprocess=model.preprocess, folder_of_list=folder)
    workers, depth = config.workers or 2 * cpu_count(), PREFETCH * config.batch_size
    loaded = prefetch_map(load, images, workers, depth)
    counts = [plan.shards[index].images for index in indices]
    progress = Progress("caption", sum(counts), "images")
    with progress, Background() as writing, closing(loaded):
        captioned = _caption(loaded, counts, model, config)
        began = time.monotonic()
        for index, count in zip(indices, counts, strict=True):
            rows = []
            for row in islice(captioned, count):
                rows.append(row)
                progress.advance()
            _rank(rows, config.rank)
            seconds, began = time.monotonic() - began, time.monotonic()
            metadata = {"version": __version__, "seconds": round(seconds, 3)}
            metadata["configuration"] = plan.configuration
            annotated = schema.with_metadata({METADATA_KEY: json.dumps(metadata)})
            table = pa.Table.from_pylist(rows, annotated)
            writing.start(partial(write_table, table, plan.captions_uri(index)))


def _caption(
    loaded: Iterator[Loaded], counts: Sequence[int], model: ImageCaptioner, config: BatchConfig
) -> Iterator[Row]:
    """Yield the rows of loaded images with their captions.

    A shard of `counts` images begins a batch, so that its captions are the same, also drawn ones,
    whichever shards came before.
    """
    size = config.batch_size
    sizes = [min(size, count - start) for count in counts for start in range(0, count, size)]
    batches, ahead = tee(list(islice(loaded, size)) for size in sizes)
    good = ([pixels for _, pixels in batch if pixels is not None] for batch in ahead)
    captioned = model.caption_batches(good, config.decode)
    for captions_of_batch, batch in zip(map(iter, captioned), batches, strict=True):
        for row, pixels in batch:
            row |= {"model": config.model, "captioned_at": datetime.now(UTC)}
            if pixels is not None:
                captions = next(captions_of_batch)
                row["captions"] = [caption.text for caption in captions]
                row["scores"] = [caption.score for caption in captions]
                row |= {"status": "ok", "caption": row["captions"][0], "score": row["scores"][0]}
            yield row


def _rank(rows: Sequence[Row], rank: str | None) -> None:
    """Put the best of each image's captions first, and the others after it, by what `rank` says."""
    captioned = [row for row in rows if row["status"] == "ok"]
    if rank is None or not captioned:
        return
    if rank == "consensus":
        all_merits = consensus([row["captions"] for row in captioned])
    else:
        all_merits = [row["scores"] for row in captioned]
    for row, merits in zip(captioned, all_merits, strict=True):
        order = sorted(range(len(merits)), key=lambda n: (-merits[n], -row["scores"][n]))
        for name in ("captions", "scores"):
            row[name] = [row[name][n] for n in order]
        row |= {"caption": row["captions"][0], "score": row["scores"][0]}


def _load(image: ListedImage, preprocess: Preprocess, folder_of_list: Folder) -> Loaded:
    """Read and decode an image."""
    row: Row = {"uri": image.uri, "status": "error"}
    try:
        require_readable(image.bytes)
        if image.is_from_list:
            content = folder_of_list.read(image.name)
        else:
            content = read_image(image.uri, RETRY_SECONDS)
        row["bytes"] = len(content)
        if _changed(image, content):
            raise ImageError("changed", "is another file than was listed; the next run captions it")
        decoded = decode_image(content)
        row |= {"width": decoded.width, "height": decoded.height}
        return row, preprocess(decoded)
    except ImageError as error:
        row["error"] = str(error)
    except (UserError, WorkError) as error:
        row["error"] = f"{_reason(error)}: {error}"
    return row, None


def _changed(image: ListedImage, content: bytes) -> bool:
    """Return whether the image is not the one that was listed, by its size or local file's time."""
    if image.is_from_list:
        return False
    if len(content) != image.bytes:
        return True
    try:
        return storage.is_local(image.uri) and image.version != str(os.stat(image.uri).st_mtime)
    except OSError:  # removed since it was read
        return True


def _reason(error: UserError | WorkError) -> str:
    if isinstance(error, UrlNotAllowed):
        return "not_allowed"
    cause = error.__cause__
    # gcsfs's 403 is an OSError without a number.
    forbidden = http_status(cause) == 403 or str(cause).startswith("Forbidden")
    if forbidden or isinstance(cause, PermissionError):
        return "forbidden"
    return "missing" if isinstance(error, UserError) else "unreachable"


def caption_part(reference: str, worker: int, workers: int) -> int:
    """Caption a worker's shards of the plan with this `reference`; return how many were missing.

    The model is loaded once. A worker that is started again goes on with what is missing.

    Raises:
        UserError: the model's files have changed since, or another run has planned.
    """
    plan = load_plan(reference)
    indices = [index for index in plan.missing() if index % workers == worker]
    if indices:
        model = load_model(plan.config)
        if model_files(plan.config.model) != plan.model_files:
            message = "has changed since the images were planned; start again"
            raise UserError(f"{plan.config.model}: {message}")
        caption_shards(plan, indices, model)
    return len(indices)


def load_model(config: BatchConfig) -> ImageCaptioner:
    return load_captioner(config.model, config.device, config.precision, config.prompt)
