"""The plan: the images, listed once and split into shards, without those already captioned.

Needs no torch.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.batch.config import BatchConfig
from model_lib.batch.listing import ListedImage, list_images
from model_lib.batch.rows import read_shard
from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.errors import input_errors
from model_lib.io.validation import read_record, require_columns, require_file_name, require_values
from model_lib.model.sources import lasting_source, source_digest

RETRIED = ("unreachable", "changed", "forbidden", "not_allowed", "missing")
"""Reasons that may have gone by the next run: the store's, or what somebody has put right."""
COLUMNS = {"uri": "text", "bytes": "int", "version": "text"}
"""Columns of a listing."""


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
    folder: str = ""
    """As `output_folder` returns it; not in the file."""

    @cached_property
    def config(self) -> BatchConfig:
        return BatchConfig.from_options(**self.configuration)

    @property
    def reference(self) -> str:
        """The listing's URI, by which a pipeline's steps name the plan."""
        return storage.join(self.folder, self.listing)

    def images(self, index: int) -> list[ListedImage]:
        """Return the images of a shard."""
        uri, what = self.reference, "the listing of a plan that captioner batch wrote"
        with storage.open_file(uri) as file, input_errors(uri, what):
            parquet = pq.ParquetFile(file)
            require_columns(parquet.schema_arrow, COLUMNS)
            table = parquet.read_row_group(index, columns=list(COLUMNS))
            require_values(table, list(COLUMNS))
            if table.num_rows != (count := self.shards[index].images):
                raise ValueError(f"row group {index} has {table.num_rows} images, not {count}")
            return [ListedImage(**row) for row in table.to_pylist()]

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
    """Return the plan that a `Plan.reference` names.

    Raises:
        UserError: another run has planned in its folder since.
    """
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
    """Return the folder for a resolved configuration's images, weights and options.

    Raises:
        UserError: there is no such model.
    """
    name = "-".join(config.model.rstrip("/").split("/")[-2:])
    name = re.sub(r"\W+", "-", name).strip("-")
    key = config.key(source_digest(config.model) or "")
    return storage.join(config.output, f"{name}-{key[:8]}")


def model_files(model: str) -> str:
    """Return a digest of the listing of a model's folder: steps compare it, and read no weights.

    It is that of an empty listing for a registry's version or a hub name.
    """
    files = storage.find_files(model)
    return _digest([[path, info["size"], *storage.version(info)] for path, info in files.items()])


def write_plan(config: BatchConfig, folder: str) -> Plan:
    """List the images and write the plan; captions of an earlier plan that are still good stay.

    Args:
        config: as `resolve` returns it.
        folder: as `output_folder` returns it.

    Raises:
        UserError: there are no images, or the output cannot be written.
    """
    images = list_images(config)
    storage.require_writable(folder)
    groups: list[list[ListedImage]] = []
    if storage.exists(storage.join(folder, "plan.json")):
        groups += _keep_captions(read_plan(folder), images)
    kept = {image.uri for group in groups for image in group}
    groups += _split((image for image in images if image.uri not in kept), config)
    listing = f"listing-{_digest([_digest(group) for group in groups])}.parquet"
    schema = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("version", pa.string())])
    with (
        storage.atomic_file(storage.join(folder, listing)) as part,
        pq.ParquetWriter(part, schema) as writer,
    ):
        for group in groups:
            table = pa.Table.from_pylist([asdict(image) for image in group], schema)
            writer.write_table(table, len(group))
    shards = [Shard(f"part-{_digest(group)}.parquet", len(group)) for group in groups]
    plan = Plan(config.to_dict(), model_files(config.model), listing, shards, folder)
    document = {name: value for name, value in asdict(plan).items() if name != "folder"}
    storage.write_json(storage.join(folder, "plan.json"), document)
    remove_stale_files(plan)
    return plan


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts), default=asdict).encode()).hexdigest()[:16]


def _split(images: Iterable[ListedImage], config: BatchConfig) -> Iterator[list[ListedImage]]:
    """Split images into shards by count and by bytes."""
    group: list[ListedImage] = []
    size = 0
    for image in images:
        size += max(0, image.bytes)
        if group and (len(group) == config.shard_images or size > config.shard_mb * 1_000_000):
            yield group
            group, size = [], max(0, image.bytes)
        group.append(image)
    if group:
        yield group


def _keep_captions(plan: Plan, listed: list[ListedImage]) -> Iterator[list[ListedImage]]:
    """Yield the images of each shard of an earlier plan that stays.

    A shard without captions stays if its images are all listed as they were. Of a captioned one,
    the rows of images that are listed as they were stay, but for errors to be retried; if that is
    not all, they are written to a new file. A file of which nothing stays is removed, as a new
    shard of the same images would have its name.
    """
    current, missing = set(listed), set(plan.missing())
    for index in range(len(plan.shards)):
        images = plan.images(index)
        if index in missing:
            if current.issuperset(images):
                yield images
            continue
        table = read_shard(plan.captions_uri(index))
        errors = dict(zip(table["uri"].to_pylist(), table["error"].to_pylist(), strict=True))
        retried = {uri for uri, error in errors.items() if (error or "").startswith(RETRIED)}
        kept = [image for image in images if image in current and image.uri not in retried]
        if not kept:
            storage.remove(plan.captions_uri(index))
            continue
        if kept != images:
            uris = {image.uri for image in kept}
            rows = pa.array(uri in uris for uri in table["uri"].to_pylist())
            uri = storage.join(plan.folder, "captions", f"part-{_digest(kept)}.parquet")
            with storage.atomic_file(uri) as part:
                pq.write_table(table.filter(rows), part)
        yield kept


def remove_stale_files(plan: Plan) -> None:
    """Remove captions and listings that earlier plans left, or their steps since."""
    captions = storage.join(plan.folder, "captions")
    current = {plan.listing, *(shard.file for shard in plan.shards)}
    for folder, prefix in ((captions, "part-"), (plan.folder, "listing-")):
        for name in storage.list_names(folder):
            if name.startswith(prefix) and name not in current:
                storage.remove(storage.join(folder, name))
