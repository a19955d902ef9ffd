"""The plan: the images, listed once and split into shards, without those already captioned.

Needs no torch.
"""

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model_lib.batch.config import BatchConfig
from model_lib.batch.listing import ImageTable, ListedImage, list_images
from model_lib.batch.rows import read_shard, write_table
from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.archives import SCHEMES
from model_lib.io.errors import input_errors
from model_lib.io.listings import find_files
from model_lib.io.validation import (
    read_record,
    require_columns,
    require_file_name,
    require_values,
)
from model_lib.model.sources import RIVAL, lasting_source, source_digest
from model_lib.progress import Progress

RETRIED = ("unreachable", "changed", "forbidden", "not_allowed", "missing")
"""Reasons that may have gone by the next run: the store's, or what somebody has put right."""
NO_PLACE = ("http://", "https://", *SCHEMES)
"""Beginnings of addresses beside which no file can be written."""
LONGEST_NAME = 24
"""Characters of a model's name in its folder's."""
COLUMNS = {"uri": "text", "bytes": "int", "version": "text", "name": "text"}
"""Columns of a listing."""
LISTING = "the listing of a plan that captioner batch wrote"
SCHEMA = pa.schema(
    [(name, pa.int64() if kind == "int" else pa.string()) for name, kind in COLUMNS.items()]
)


@dataclass(frozen=True)
class Shard:
    """Images that are captioned together."""

    file: str
    """Name of its Parquet file."""
    images: int


@dataclass(frozen=True)
class Plan:
    """The images to caption, in shards, and how."""

    configuration: dict[str, Any]
    """The `BatchConfig`, as `resolve` returns it."""
    model_files: str
    """As `model_files` returns it for the model."""
    listing: str
    """Name of the file that holds the shards' images."""
    shards: list[Shard]
    left_out: dict[str, int]
    """Counts of what is no image, as `list_images` returns them."""
    folder: str = ""
    """As `output_folder` returns it; not in the file."""

    @cached_property
    def config(self) -> BatchConfig:
        return BatchConfig.from_options(**self.configuration)

    @property
    def reference(self) -> str:
        """The listing's URI, by which a pipeline's steps name the plan."""
        return storage.join(self.folder, self.listing)

    @cached_property
    def _listing(self) -> pq.ParquetFile:
        """The listing, opened once, as its footer grows with the shards."""
        file = storage.open_file(self.reference)
        with input_errors(self.reference, LISTING):
            parquet = pq.ParquetFile(file)
            require_columns(parquet.schema_arrow, COLUMNS)
            return parquet

    def images(self, index: int) -> list[ListedImage]:
        """Return the images of a shard; one thread at a time may call it."""
        listing, count = self._listing, self.shards[index].images
        with input_errors(self.reference, LISTING):
            table = listing.read_row_group(index, columns=list(COLUMNS))
            require_values(table, list(COLUMNS))
            if table.num_rows != count:
                raise ValueError(f"row group {index} has {table.num_rows} images, not {count}")
        return list(map(ListedImage._make, zip(*table.to_pydict().values(), strict=True)))

    def captions_uri(self, index: int) -> str:
        """Return the URI of a shard's captions."""
        return storage.join(self.folder, "captions", self.shards[index].file)

    def missing(self) -> list[int]:
        """Return the indices of the shards that are not captioned yet."""
        files = set(storage.list_names(storage.join(self.folder, "captions")))
        return [index for index, shard in enumerate(self.shards) if shard.file not in files]


def read_plan(folder: str) -> Plan:
    """Read the plan in `folder`; `UserError` if there is none."""
    uri, what = storage.join(folder, "plan.json"), "a plan that captioner batch wrote"
    plan = replace(read_record(uri, Plan, what), folder=folder)
    with input_errors(uri, what):
        for name in (plan.listing, *(shard.file for shard in plan.shards)):
            require_file_name(name)
        try:
            plan.config  # noqa: B018  refuses options that this version does not have
        except UserError as error:
            raise ValueError(str(error)) from error
    return plan


def load_plan(reference: str) -> Plan:
    """Return the plan of a `Plan.reference`; `UserError` if another run planned there since."""
    folder, _, listing = reference.rpartition("/")
    plan = read_plan(folder)
    if plan.listing != listing:
        raise UserError(f"{folder}: another run planned there since; start again once it has ended")
    return plan


def resolve(config: BatchConfig) -> BatchConfig:
    """Return the configuration with sources that mean the same later: an alias as its version."""
    model, images = lasting_source(config.model), storage.absolute(config.images)
    return replace(config, model=model, images=images)


def output_folder(config: BatchConfig) -> str:
    """Return the folder for a resolved configuration's images, weights and options."""
    parts = config.model.rstrip("/").split("/")[-2:]
    name = re.sub(r"\W+", "-", "-".join(parts))[-LONGEST_NAME:].strip("-")
    key = config.key(source_digest(config.model) or "")
    return storage.join(config.output, f"{name}-{key[:8]}")


def model_files(model: str) -> str:
    """Return a digest of the listing of a model's folder, for steps to compare without reading it.

    It is that of an empty listing for a registry's version or a hub name.
    """
    files = find_files(model.removeprefix(RIVAL))
    return _digest([[path, info["size"], *storage.version(info)] for path, info in files.items()])


def write_plan(config: BatchConfig, folder: str) -> Plan:
    """List the images and write the plan; captions of an earlier plan that are still good stay.

    The memory that it takes grows by the names of the shards.

    Args:
        config: as `resolve` returns it.
        folder: as `output_folder` returns it.
    """
    images, left_out, shards = ImageTable(), Counter[str](), list[Shard]()
    images.add(_counted(list_images(config, left_out)))
    storage.require_writable(folder)
    if config.txt_beside:
        _require_texts_beside(config, next(iter(images)))
    groups = _split(images, config)
    if storage.exists(storage.join(folder, "plan.json")):
        groups = chain(_keep_captions(read_plan(folder), images), groups)
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch, "listing.parquet")
        with pq.ParquetWriter(part, SCHEMA, write_statistics=False) as writer:
            for group in groups:
                columns = dict(zip(COLUMNS, zip(*group, strict=True), strict=True))
                writer.write_table(pa.table(columns, SCHEMA), len(group))
                shards.append(Shard(f"part-{_digest(group)}.parquet", len(group)))
        listing = f"listing-{_digest([shard.file for shard in shards])}.parquet"
        storage.upload_file(str(part), storage.join(folder, listing))
    files_of_model = model_files(config.model)
    plan = Plan(config.to_dict(), files_of_model, listing, shards, dict(left_out), folder)
    document = asdict(plan)
    del document["folder"]
    storage.write_json(storage.join(folder, "plan.json"), document)
    remove_stale_files(plan)
    return plan


def _counted(images: Iterable[ListedImage]) -> Iterator[ListedImage]:
    """Yield images, and show how many they are."""
    with Progress("list", 0, "images") as progress:
        for image in images:
            progress.advance()
            yield image


def _require_texts_beside(config: BatchConfig, image: ListedImage) -> None:
    """Raise `UserError` if the image is in an archive or on the web, or the folder is not writable,
    rather than after the captioning."""
    if image.uri.startswith(NO_PLACE):
        problem = "no file can be written beside it; leave out --txt_beside"
        raise UserError(f"{image.uri}: {problem}")
    if storage.is_folder(config.images):
        storage.require_writable(config.images)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _split(images: Iterable[ListedImage], config: BatchConfig) -> Iterator[list[ListedImage]]:
    """Yield the images of each shard, split by count and by bytes."""
    group: list[ListedImage] = []
    size = 0
    for image in images:
        size += max(0, image.bytes)
        is_full = size > config.shard_mb * 1_000_000 or len(group) == config.shard_images
        if group and is_full:
            yield group
            group, size = [], max(0, image.bytes)
        group.append(image)
    if group:
        yield group


def _keep_captions(plan: Plan, current: ImageTable) -> Iterator[list[ListedImage]]:
    """Yield the images of each shard of an earlier plan that stays, and remove them from `current`.

    A shard without captions stays if its images are all unchanged. Of a captioned one, the rows of
    unchanged images stay, except errors to be retried; if these are not all, they are written to a
    new file. A file of which nothing stays is removed, as a new shard of the same images would have
    its name.
    """
    missing = set(plan.missing())
    # Those to be captioned come last, so that workers get as many of them each.
    for index in sorted(range(len(plan.shards)), key=missing.__contains__):
        images = plan.images(index)
        kept = [image for image in images if current.holds(image)]
        if index in missing:
            kept = kept if kept == images else []
        else:
            table = read_shard(plan.captions_uri(index))
            rows = zip(table["uri"].to_pylist(), table["error"].to_pylist(), strict=True)
            retried = {uri for uri, error in rows if (error or "").startswith(RETRIED)}
            kept = [image for image in kept if image.uri not in retried]
            if not kept:
                storage.remove(plan.captions_uri(index))
            elif kept != images:
                is_kept = pc.is_in(table["uri"], pa.array([image.uri for image in kept]))
                name = f"part-{_digest(kept)}.parquet"
                uri = storage.join(plan.folder, "captions", name)
                write_table(table.filter(is_kept), uri)
        if kept:
            current.remove(kept)
            yield kept


def remove_stale_files(plan: Plan) -> None:
    """Remove captions and listings of earlier plans and their steps."""
    current = {plan.listing, *(shard.file for shard in plan.shards)}
    for folder in (plan.folder, storage.join(plan.folder, "captions")):
        for name in storage.list_names(folder):
            if name.startswith(("part-", "listing-")) and name not in current:
                storage.remove(storage.join(folder, name))
