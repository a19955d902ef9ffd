"""Captioning a folder, a bucket or a list of pictures: plan, caption each shard, merge.

    <output>/<model>-<key>/plan.json            what captions, and the shards
                           listing-….parquet    the pictures of each shard, a row group each
                           captions/*.parquet   one file a shard, written whole or not at all
                           summary.json         counts a status and reason
                           report.html          the same for people, with pictures
             latest.json                        the last summary

Every picture listed has exactly one row, with a status. Started again, only pictures that are new or changed, or whose
store failed the last time, are captioned; rows of pictures that are listed no more go. Another model, another version
of it or other options have a folder of their own. A shard's file is named after the pictures that it holds, so that it
is there, or it is not.
"""

import hashlib
import itertools
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_lib import __version__, allowing, storage
from model_lib.background import Background
from model_lib.config import BatchConfig
from model_lib.errors import UserError, WorkError
from model_lib.listing import Picture, list_pictures
from model_lib.pictures import PictureError, open_picture, require_readable, to_pixels
from model_lib.progress import Progress
from model_lib.records import as_record, believing, require_columns, require_name

if TYPE_CHECKING:
    from model_lib.model import Captioner

AHEAD = 4
"""Batches that are read and decoded before the model asks for them."""
PATIENCE = 60.0
"""Seconds for which a picture is asked for again while its store fails."""
ANOTHER_TIME = ("unreachable", "changed")
"""Reasons that may be gone the next time."""
FIELDS = [
    ("uri", pa.string()),
    ("status", pa.string()),
    ("caption", pa.string()),
    ("score", pa.float32()),
    ("error", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("bytes", pa.int64()),
    ("model", pa.string()),
    ("captioned_at", pa.timestamp("us", tz="UTC")),
]
SEVERAL = [("captions", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
"""Columns that there are besides when a picture gets several captions."""
ABOUT = b"captioner"
"""Key of a Parquet file's metadata: what made it, as JSON."""


@dataclass(frozen=True)
class Shard:
    """Pictures that are captioned together."""

    file: str
    """Name of its Parquet file."""
    pictures: int


@dataclass(frozen=True)
class Plan:
    """What is to be captioned, by what, in which shards."""

    folder: str
    """Where everything of this model and its options lies."""
    configuration: dict[str, Any]
    """The `BatchConfig`, its model named so that it means the same later."""
    listing: str
    """Name of the file that holds the shards' pictures."""
    shards: list[Shard]

    @property
    def config(self) -> BatchConfig:
        return BatchConfig.from_options(**self.configuration)

    def pictures(self, index: int) -> list[Picture]:
        """Return the pictures of a shard."""
        uri = storage.join(self.folder, self.listing)
        fs, path = storage.filesystem(uri)

        def read() -> list[dict[str, Any]]:
            with fs.open(path, "rb") as file:
                parquet = pq.ParquetFile(file)
                require_columns(parquet.schema_arrow, {"uri": "text", "bytes": "whole number", "version": "text"})
                return list(parquet.read_row_group(index).to_pylist())

        with believing(uri, "the listing of a plan that captioner batch wrote"):
            pictures = [as_record(Picture, row) for row in storage.patiently(uri, read)]
            if len(pictures) != self.shards[index].pictures:
                raise ValueError(f"row group {index} has {len(pictures)} pictures, not {self.shards[index].pictures}")
        return pictures

    def captions(self, shard: Shard) -> str:
        """Return the URI of a shard's captions."""
        return storage.join(self.folder, "captions", shard.file)

    def missing(self) -> list[int]:
        """Return the shards that are still to be captioned."""
        there = set(storage.list_names(storage.join(self.folder, "captions")))
        return [index for index, shard in enumerate(self.shards) if shard.file not in there]


def read_plan(folder: str) -> Plan:
    """Read the plan in `folder`; `UserError` if there is none."""
    uri = storage.join(folder, "plan.json")
    document = storage.patiently(uri, lambda: storage.read_json(uri))
    with believing(uri, "a plan that captioner batch wrote"):
        made = as_record(Plan, {**document, "folder": folder})
        for name in (made.listing, *(shard.file for shard in made.shards)):
            require_name(name)
        try:
            made.config  # noqa: B018  refuses options that this version does not have
        except UserError as error:
            raise ValueError(str(error)) from error
        return made


# ---- plan ------------------------------------------------------------------------------------------------------------


def resolved(config: BatchConfig) -> BatchConfig:
    """Return the configuration with its model named so that it means the same later: an alias as its version."""
    from model_lib.sources import lasting_source

    return replace(config, model=lasting_source(config.model))


def folder_of(config: BatchConfig) -> str:
    """Return where everything of a `resolved` configuration's model and options lies."""
    name = re.sub(r"\W+", "-", "-".join(config.model.rstrip("/").split("/")[-2:])).strip("-")
    return storage.join(config.output, f"{name}-{config.key()[:8]}")


def plan(config: BatchConfig) -> Plan:
    """List the pictures once, and leave in the output what is to be done and what is done already. Needs no torch.

    Args:
        config: as `resolved` returns it.

    Raises:
        UserError: there are no pictures, or the output cannot be written.
    """
    pictures = list_pictures(config)
    folder = folder_of(config)
    storage.require_writable(folder)
    wanted = {picture.uri: picture for picture in pictures}
    kept = _kept(folder, wanted) if storage.exists(storage.join(folder, "plan.json")) else []
    groups = [*kept, *_split(list(wanted.values()), config)]
    listing = f"listing-{_digest([_digest(group) for group in groups])}.parquet"
    with storage.whole_file(storage.join(folder, listing)) as part:
        schema = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("version", pa.string())])
        with pq.ParquetWriter(part, schema) as writer:
            for group in groups:
                writer.write_table(pa.Table.from_pylist([asdict(picture) for picture in group], schema), len(group))
    shards = [Shard(f"part-{_digest(group)}.parquet", len(group)) for group in groups]
    made = Plan(folder, config.to_dict(), listing, shards)
    document = {name: value for name, value in asdict(made).items() if name != "folder"}
    storage.write_json(storage.join(folder, "plan.json"), document)
    _remove_strangers(made)
    return made


def _digest(parts: Sequence[Picture | str]) -> str:
    return hashlib.sha256(json.dumps(list(parts), default=asdict).encode()).hexdigest()[:16]


def _split(pictures: list[Picture], config: BatchConfig) -> Iterator[list[Picture]]:
    """Split pictures into shards by count and by bytes."""
    group: list[Picture] = []
    size = 0
    for picture in pictures:
        size += max(0, picture.bytes)
        if group and (len(group) == config.shard_pictures or size > config.shard_mb * 1_000_000):
            yield group
            group, size = [], max(0, picture.bytes)
        group.append(picture)
    if group:
        yield group


def _kept(folder: str, wanted: dict[str, Picture]) -> list[list[Picture]]:
    """Return the shards of the plan before that stay, and take their pictures out of `wanted`.

    A shard that is not captioned stays if it is wanted as it was. One that is stays with the pictures that are still
    wanted and need not be tried another time: if that is not all, its file is written again with their rows.
    """
    before, kept = read_plan(folder), []
    missing = set(before.missing())
    for index, shard in enumerate(before.shards):
        pictures = before.pictures(index)
        table = None if index in missing else read_shard(before.captions(shard))
        again = set() if table is None else _another_time(table)
        stay = [picture for picture in pictures if wanted.get(picture.uri) == picture and picture.uri not in again]
        if not stay or (table is None and stay != pictures):
            continue
        if stay != pictures and table is not None:
            rows = pa.array(uri in {picture.uri for picture in stay} for uri in table["uri"].to_pylist())
            name = f"part-{_digest(stay)}.parquet"
            with storage.whole_file(storage.join(folder, "captions", name)) as part:
                pq.write_table(table.filter(rows), part)
        for picture in stay:
            del wanted[picture.uri]
        kept.append(stay)
    return kept


def _another_time(table: pa.Table) -> set[str]:
    """Return the pictures whose row may be better the next time."""
    pairs = zip(table["uri"].to_pylist(), table["error"].to_pylist(), strict=True)
    return {uri for uri, error in pairs if error is not None and error.startswith(ANOTHER_TIME)}


def _remove_strangers(made: Plan) -> None:
    """Remove what plans before left: captions of shards that are no more, and their listings."""
    captions = storage.join(made.folder, "captions")
    known = {shard.file for shard in made.shards}
    for name in storage.list_names(captions):
        if name not in known and name.startswith("part-"):
            storage.remove(storage.join(captions, name))
    for name in storage.list_names(made.folder):
        if name.startswith("listing-") and name != made.listing:
            storage.remove(storage.join(made.folder, name))


# ---- caption ---------------------------------------------------------------------------------------------------------


def caption_shards(made: Plan, indices: Sequence[int], model: "Captioner") -> None:
    """Caption the pictures of some shards and write their files, each whole or not at all.

    Pictures are fetched and decoded ahead on threads, into the next shards too, and files are written on another, so
    that the model waits for neither.
    """
    config = made.config
    schema = pa.schema([*FIELDS, *(SEVERAL if config.num_captions > 1 else [])])
    total = sum(made.shards[index].pictures for index in indices)
    with Progress("caption", total, "pictures") as progress, Background() as writing:
        began = time.monotonic()
        for index, rows in _captioned(made, indices, model, progress):
            seconds, began = time.monotonic() - began, time.monotonic()
            about = {"version": __version__, "seconds": round(seconds, 3), "configuration": made.configuration}
            table = pa.Table.from_pylist(rows, schema.with_metadata({ABOUT: json.dumps(about)}))
            writing.start(partial(_write, table, made.captions(made.shards[index])))


def _write(table: pa.Table, uri: str) -> None:
    with storage.whole_file(uri) as part:
        pq.write_table(table, part)


def _captioned(
    made: Plan, indices: Sequence[int], model: "Captioner", progress: Progress
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield each shard's rows, in order."""
    config = made.config
    with ThreadPoolExecutor(config.workers or 2 * (os.cpu_count() or 1)) as pool:
        pictures = (picture for index in indices for picture in made.pictures(index))
        loading = (pool.submit(_load, picture, model.image_size, config.images) for picture in pictures)
        ahead = deque(itertools.islice(loading, AHEAD * config.batch_size))
        for index in indices:
            rows: list[dict[str, Any]] = []
            while len(rows) < made.shards[index].pictures:
                count = min(config.batch_size, made.shards[index].pictures - len(rows))
                batch = [ahead.popleft() for _ in range(count)]
                ahead.extend(itertools.islice(loading, count))
                rows += _caption_batch(batch, model, config)
                progress.advance(count)
            yield index, rows


def _caption_batch(batch: list[Future], model: "Captioner", config: BatchConfig) -> list[dict[str, Any]]:
    from model_lib.captioning import caption_pixels

    loaded = [future.result() for future in batch]
    good = [pixels for _, pixels in loaded if pixels is not None]
    captioned = iter(caption_pixels(model, np.stack(good), config) if good else [])
    rows = []
    for row, pixels in loaded:
        if pixels is not None:
            captions = next(captioned)
            if config.rank:
                captions = sorted(captions, key=lambda caption: -caption.score)
            row.update(status="ok", caption=captions[0].text, score=captions[0].score)
            row.update(captions=[one.text for one in captions], scores=[one.score for one in captions])
        rows.append({**row, "model": config.model, "captioned_at": datetime.now(UTC)})
    return rows


def _load(picture: Picture, size: int, source: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """Read and decode one picture: its row so far, and its pixels unless it cannot be used."""
    row: dict[str, Any] = {"uri": picture.uri, "status": "error"}
    try:
        allowing.require_listed(picture.uri, source)
        require_readable(os.stat(picture.uri).st_size if _is_here(picture.uri) else picture.bytes)
        content = storage.patiently(picture.uri, lambda: storage.read_bytes(picture.uri), PATIENCE)
        row["bytes"] = len(content)
        if _changed(picture, content):
            raise PictureError("changed", "is another file than was listed; the next run captions it")
        image = open_picture(content)
        row.update(width=image.width, height=image.height)
        return row, to_pixels(image, size)
    except PictureError as error:
        row["error"] = str(error)
    except (UserError, WorkError) as error:
        row["error"] = f"{_reason(error)}: {error}"
    return row, None


def _is_here(uri: str) -> bool:
    return storage.is_local(uri) and os.path.isfile(uri)


def _changed(picture: Picture, content: bytes) -> bool:
    """Whether a picture is not the one that was listed: by its size and, here, by its time."""
    if picture.bytes >= 0 and len(content) != picture.bytes:
        return True
    if not picture.version or not storage.is_local(picture.uri):
        return False
    return picture.version != str(os.stat(picture.uri).st_mtime)


def _reason(error: UserError | WorkError) -> str:
    cause = error.__cause__
    if isinstance(error, allowing.NotAllowed):
        return "not_allowed"
    if isinstance(cause, PermissionError) or getattr(cause, "status", None) == 403 or "Forbidden" in str(cause):
        return "forbidden"
    return "missing" if isinstance(error, UserError) else "unreachable"


def caption_planned(folder: str, index: int) -> None:
    """Caption one shard of the plan in `folder`, unless its file is there."""
    made = read_plan(folder)
    if index in made.missing():
        caption_shards(made, [index], load_model(made.config))


def load_model(config: BatchConfig) -> "Captioner":
    from model_lib.model import Captioner

    return Captioner.from_pretrained(config.model, device=config.device, precision=config.precision)


def read_shard(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Return the rows of a shard's file."""
    fs, path = storage.filesystem(uri)

    def read() -> pa.Table:
        with fs.open(path, "rb") as file:
            # Not pq.read_table: on an open file it leaves threads that abort the process at its exit (pyarrow 25).
            return pq.ParquetFile(file).read(columns=columns)

    with believing(uri, "captions that captioner batch wrote"):
        table = storage.patiently(uri, read)
        wanted = {"uri": "text", "status": "text", "caption": "text", "score": "number", "error": "text"}
        require_columns(table.schema, {name: kind for name, kind in wanted.items() if not columns or name in columns})
        table.validate(full=True)
    return table
