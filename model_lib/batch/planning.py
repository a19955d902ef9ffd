"""What is to be captioned: images listed once, in shards, without what is captioned already. Needs
no torch."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.batch.config import BatchConfig
from model_lib.batch.listing import ListedImage, list_images
from model_lib.batch.rows import read_shard
from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.errors import input_errors
from model_lib.io.validation import (
    read_record,
    require_columns,
    require_file_name,
    require_values,
)
from model_lib.model.sources import lasting_source, source_digest

ANOTHER_TIME = ("unreachable", "changed", "forbidden", "not_allowed", "missing")
"""Reasons that may be gone the next time: the store's, or what somebody has put right since."""


@dataclass(frozen=True)
class Shard:
    """Images that are captioned together."""

    file: str
    """Name of its Parquet file."""
    images: int


@dataclass(frozen=True)
class Plan:
    """What is to be captioned, by what, in which shards."""

    configuration: dict[str, Any]
    """The `BatchConfig`, its model named so that it means the same later."""
    listing: str
    """Name of the file that holds the shards' images."""
    shards: list[Shard]
    folder: str = ""
    """Where everything of this model and its options lies; not in the file."""

    @property
    def config(self) -> BatchConfig:
        return BatchConfig.from_options(**self.configuration)

    def images(self, index: int) -> list[ListedImage]:
        """Return the images of a shard."""
        uri = self.reference
        columns = {"uri": "text", "bytes": "int", "version": "text"}
        with (
            storage.open_file(uri) as file,
            input_errors(uri, "the listing of a plan that captioner batch wrote"),
        ):
            parquet = pq.ParquetFile(file)
            require_columns(parquet.schema_arrow, columns)
            table = parquet.read_row_group(index, columns=list(columns))
            require_values(table, list(columns))
            if table.num_rows != self.shards[index].images:
                rows = f"{table.num_rows} images, not {self.shards[index].images}"
                raise ValueError(f"row group {index} has {rows}")
            return [ListedImage(**row) for row in table.to_pylist()]

    @property
    def reference(self) -> str:
        """The listing's URI, by which a pipeline's steps tell each other which plan they mean."""
        return storage.join(self.folder, self.listing)

    def captions(self, shard: Shard) -> str:
        """Return the URI of a shard's captions."""
        return storage.join(self.folder, "captions", shard.file)

    def missing(self) -> list[int]:
        """Return the shards that are still to be captioned."""
        there = set(storage.list_names(storage.join(self.folder, "captions")))
        return [index for index, shard in enumerate(self.shards) if shard.file not in there]


def read_plan(folder: str) -> Plan:
    """Read the plan in `folder`; `UserError` if there is none."""
    uri, what = storage.join(folder, "plan.json"), "a plan that captioner batch wrote"
    made = replace(read_record(uri, Plan, what), folder=folder)
    with input_errors(uri, what):
        for name in (made.listing, *(shard.file for shard in made.shards)):
            require_file_name(name)
        try:
            made.config  # noqa: B018  refuses options that this version does not have
        except UserError as error:
            raise ValueError(str(error)) from error
    return made


def load_plan(reference: str) -> Plan:
    """Return the plan that a `reference` means; `UserError` if another run has planned in its
    folder since."""
    folder, _, listing = reference.rpartition("/")
    made = read_plan(folder)
    if made.listing != listing:
        raise UserError(f"{folder}: another run planned there since; start again once it has ended")
    return made


def resolved(config: BatchConfig) -> BatchConfig:
    """Return the configuration with its names so that they mean the same later: an alias as its
    version, for one."""
    return replace(
        config, model=lasting_source(config.model), images=storage.absolute(config.images)
    )


def folder_of(config: BatchConfig) -> str:
    """Return where everything of a `resolved` configuration's images, model and options lies.

    Raises:
        UserError: there is no such model.
    """
    name = re.sub(r"\W+", "-", "-".join(config.model.rstrip("/").split("/")[-2:])).strip("-")
    return storage.join(
        config.output, f"{name}-{config.key(source_digest(config.model) or '')[:8]}"
    )


def plan(config: BatchConfig, folder: str) -> Plan:
    """List the images once, and leave in the output what is to be done and what is done already.

    Args:
        config: as `resolved` returns it.
        folder: as `folder_of` returns it.

    Raises:
        UserError: there are no images, or the output cannot be written.
    """
    images = list_images(config)
    storage.require_writable(folder)
    wanted = {image.uri: image for image in images}
    before = read_plan(folder) if storage.exists(storage.join(folder, "plan.json")) else None
    kept = [] if before is None else _kept(before, wanted)
    groups = [*kept, *_split(list(wanted.values()), config)]
    listing = f"listing-{_digest([_digest(group) for group in groups])}.parquet"
    with storage.atomic_file(storage.join(folder, listing)) as part:
        schema = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("version", pa.string())])
        with pq.ParquetWriter(part, schema) as writer:
            for group in groups:
                writer.write_table(
                    pa.Table.from_pylist([asdict(image) for image in group], schema), len(group)
                )
    shards = [Shard(f"part-{_digest(group)}.parquet", len(group)) for group in groups]
    made = Plan(config.to_dict(), listing, shards, folder)
    document = {name: value for name, value in asdict(made).items() if name != "folder"}
    storage.write_json(storage.join(folder, "plan.json"), document)
    remove_stale_files(made)
    return made


def _digest(parts: Sequence[ListedImage | str]) -> str:
    return hashlib.sha256(json.dumps(list(parts), default=asdict).encode()).hexdigest()[:16]


def _split(images: list[ListedImage], config: BatchConfig) -> Iterator[list[ListedImage]]:
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


def _kept(before: Plan, wanted: dict[str, ListedImage]) -> list[list[ListedImage]]:
    """Return the shards of the plan before that stay, and take their images out of `wanted`.

    A shard that is not captioned stays if it is wanted as it was. One that is stays with the images
    that are still wanted and need not be tried another time: if that is not all, its file is
    written again with their rows, and if it is none, its file goes, as the same images may make the
    same shard again.
    """
    kept = []
    missing = set(before.missing())
    for index, shard in enumerate(before.shards):
        images = before.images(index)
        table = None if index in missing else read_shard(before.captions(shard))
        again = set() if table is None else _another_time(table)
        stay = [
            image for image in images if wanted.get(image.uri) == image and image.uri not in again
        ]
        if table is not None and not stay:
            storage.remove(before.captions(shard))
        if not stay or (table is None and stay != images):
            continue
        if stay != images and table is not None:
            uris = {image.uri for image in stay}
            rows = pa.array(uri in uris for uri in table["uri"].to_pylist())
            name = f"part-{_digest(stay)}.parquet"
            with storage.atomic_file(storage.join(before.folder, "captions", name)) as part:
                pq.write_table(table.filter(rows), part)
        for image in stay:
            del wanted[image.uri]
        kept.append(stay)
    return kept


def _another_time(table: pa.Table) -> set[str]:
    """Return the images whose row may be better the next time."""
    pairs = zip(table["uri"].to_pylist(), table["error"].to_pylist(), strict=True)
    return {uri for uri, error in pairs if error is not None and error.startswith(ANOTHER_TIME)}


def remove_stale_files(made: Plan) -> None:
    """Remove what plans before left, or their steps since: captions of shards that are no more, and
    their listings."""
    captions = storage.join(made.folder, "captions")
    known = {shard.file for shard in made.shards}
    for name in storage.list_names(captions):
        if name not in known and name.startswith("part-"):
            storage.remove(storage.join(captions, name))
    for name in storage.list_names(made.folder):
        if name.startswith("listing-") and name != made.listing:
            storage.remove(storage.join(made.folder, name))
