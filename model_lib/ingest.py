"""Captions in COCO's format and their pictures, turned into Parquet shards and a manifest.

    captioner ingest --dataset coco --output data
    captioner ingest --annotations my.json --images my_pictures --output data

A picture that cannot be used goes to `quarantine.parquet` with its reason and the rest goes on. The same input and
options give the same bytes, whatever the number of workers.
"""

import hashlib
import io
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib import storage
from model_lib.config import IngestConfig
from model_lib.errors import UserError
from model_lib.pictures import PictureError, open_picture, shrink
from model_lib.progress import Progress
from model_lib.shards import FORMAT_VERSION, Manifest, Shard

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("split", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("sha256", pa.string()),
        ("source", pa.string()),
    ]
)
QUARANTINE_SCHEMA = pa.schema([("file_name", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
ROW_GROUP = 256
"""Pictures a row group: the unit that a training loader reads and shuffles by."""


@dataclass(frozen=True)
class Entry:
    """One picture to ingest: its place and its captions."""

    image_id: int
    file_name: str
    split: str
    uri: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Rejected:
    """A row of the quarantine."""

    file_name: str
    reason: str
    detail: str


def read_captions(uri: str) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """Read a COCO captions file: its images (id, file name), and each image id's captions in the order of their ids.

    Raises:
        UserError: the file is missing, not JSON, or not COCO captions.
    """
    document = storage.read_json(uri)
    try:
        images = [(_integer(image["id"]), _text(image["file_name"])) for image in document["images"]]
        captions: dict[int, list[str]] = {image_id: [] for image_id, _ in images}
        for note in sorted(document["annotations"], key=lambda note: _integer(note["id"])):
            text = " ".join(_text(note["caption"]).split())
            if text:
                captions.setdefault(_integer(note["image_id"]), []).append(text)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{uri}: is not COCO captions ({type(error).__name__}: {error}); expected "
            '{"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}'
        ) from error
    return images, captions


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _entries(annotations: str, images_uri: str, split: str) -> Iterator[Entry | Rejected]:
    """Yield what a captions file lists, by image id; `UserError` if a file name leaves the folder of pictures."""
    images, captions = read_captions(annotations)
    for image_id, name in images:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or path.parts[:1] == () or ":" in path.parts[0]:
            raise UserError(
                f"{annotations}: file_name {name!r} of image {image_id} leaves the image folder; "
                "make it relative to --images"
            )
    seen = set()
    for image_id, name in sorted(images):
        if image_id in seen:
            yield Rejected(name, "duplicate_id", f"image id {image_id} occurs more than once in {annotations}")
        elif not captions[image_id]:
            yield Rejected(name, "no_captions", f"{annotations} has no caption for image id {image_id}")
        else:
            where = split if split != "auto" else _auto_split(image_id)
            yield Entry(image_id, name, where, storage.join(images_uri, name), tuple(captions[image_id]))
        seen.add(image_id)
    strangers = len(captions.keys() - seen)
    if strangers:
        log.warning("%s: captions of %d image ids without an image are left out", annotations, strangers)


def _auto_split(image_id: int) -> str:
    return "val" if hashlib.sha256(str(image_id).encode()).digest()[0] < 26 else "train"  # 26 of 256: a tenth


def _inputs(config: IngestConfig) -> Iterable[tuple[str, list[Entry | Rejected]]]:
    """Return each annotations file's name and list, all read before anything is written."""
    if config.dataset is None:
        assert config.annotations is not None and config.images is not None
        if not storage.is_folder(config.images):
            raise UserError(f"{config.images}: no such folder of pictures")
        return [(config.annotations, list(_entries(config.annotations, config.images, config.split)))]
    inputs = []
    for split in ("train", "val"):
        annotations = storage.join(config.dataset, "annotations", f"captions_{split}2017.json")
        images = storage.join(config.dataset, f"{split}2017")
        for uri, there in ((annotations, storage.exists), (images, storage.is_folder)):
            if not there(uri):
                raise UserError(f"{uri}: not found; --dataset expects COCO's layout, else use --annotations, --images")
        inputs.append((annotations, list(_entries(annotations, images, split))))
    return inputs


def _store(entry: Entry, config: IngestConfig) -> dict[str, Any] | Rejected:
    """Read, decode, reduce and encode one picture; return its row or why it has none."""
    try:
        content = storage.read_bytes(entry.uri)
        image = shrink(open_picture(content), config.shortest_side)
    except UserError as error:
        return Rejected(entry.file_name, "missing", str(error))
    except PictureError as error:
        return Rejected(entry.file_name, error.reason, error.detail)
    encoded = io.BytesIO()
    try:
        image.save(encoded, "JPEG", quality=config.jpeg_quality)
    except (OSError, ValueError) as error:  # JPEG ends at 65,535 pixels a side
        return Rejected(entry.file_name, "not_storable", f"{image.width}x{image.height} as JPEG: {error}")
    return {
        "image_id": entry.image_id,
        "file_name": entry.file_name,
        "split": entry.split,
        "width": image.width,
        "height": image.height,
        "image": encoded.getvalue(),
        "captions": list(entry.captions),
        "sha256": hashlib.sha256(content).hexdigest(),
        "source": entry.uri,
    }


def _in_order(entries: Iterable[Entry], config: IngestConfig) -> Iterator[dict[str, Any] | Rejected]:
    """Store entries on threads (Pillow works outside the interpreter's lock), results in order, memory bounded."""
    workers = config.workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future] = deque()
        for entry in entries:
            pending.append(pool.submit(_store, entry, config))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _ShardWriter:
    """Writes the rows of one split to shards of about `shard_mb`, a row group at a time."""

    def __init__(self, config: IngestConfig, split: str) -> None:
        self.config, self.split = config, split
        self.shards: list[Shard] = []
        self.rows: list[dict] = []
        self.bytes = 0
        self.content = hashlib.sha256()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        image = hashlib.sha256(row["image"]).hexdigest()
        self.content.update(repr((row["image_id"], row["file_name"], image, row["captions"])).encode())
        self.bytes += len(row["image"])
        if self.bytes >= self.config.shard_mb * 1_000_000:
            self.close()

    def close(self) -> None:
        """Write the collected rows as one shard."""
        if not self.rows:
            return
        name = f"{self.split}-{len(self.shards):05d}.parquet"
        with storage.whole_file(storage.join(self.config.output, name)) as part:
            table = pa.Table.from_pylist(self.rows, SCHEMA)
            pq.write_table(table, part, row_group_size=ROW_GROUP, compression="zstd", write_page_checksum=True)
            with Path(part).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.path.getsize(part)
        self.shards.append(Shard(uri=name, split=self.split, rows=len(self.rows), bytes=size, sha256=digest))
        self.rows, self.bytes = [], 0


def ingest(config: IngestConfig) -> Manifest:
    """Write shards, quarantine and, last, the manifest; return the manifest.

    Raises:
        UserError: the input is not COCO captions, has no usable picture, or the output cannot be written.
    """
    inputs = _inputs(config)
    storage.require_writable(config.output)
    storage.remove(storage.join(config.output, "manifest.json"))  # a half-done ingest is not a data set
    total = sum(isinstance(entry, Entry) for _, entries in inputs for entry in entries)
    writers: dict[str, _ShardWriter] = {}
    quarantine: list[Rejected] = []
    with Progress("ingest", total, "pictures") as progress:
        for _, entries in inputs:
            quarantine += [entry for entry in entries if isinstance(entry, Rejected)]
            for result in _in_order((entry for entry in entries if isinstance(entry, Entry)), config):
                progress.advance()
                if isinstance(result, Rejected):
                    quarantine.append(result)
                else:
                    writers.setdefault(result["split"], _ShardWriter(config, result["split"])).add(result)
    for writer in writers.values():
        writer.close()
    shards = [shard for split in sorted(writers) for shard in writers[split].shards]
    if not shards:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in Counter(row.reason for row in quarantine).items())
        names = ", ".join(annotations for annotations, _ in inputs)
        raise UserError(f"{names}: no usable picture among {len(quarantine)} listed ({reasons or 'the list is empty'})")
    rows = [vars(row) for row in quarantine]
    with storage.whole_file(storage.join(config.output, "quarantine.parquet")) as part:
        pq.write_table(pa.Table.from_pylist(rows, QUARANTINE_SCHEMA), part)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        shards=shards,
        counts={split: sum(shard.rows for shard in writers[split].shards) for split in sorted(writers)},
        quarantined=dict(Counter(row.reason for row in quarantine)),
        fingerprint=_fingerprint(config, writers),
        configuration=config.to_dict(),
        uri=storage.absolute(config.output),
    )
    storage.write_json(storage.join(config.output, "manifest.json"), manifest.to_dict())
    return manifest


def _fingerprint(config: IngestConfig, writers: dict[str, _ShardWriter]) -> str:
    """Digest the pictures, their captions and the options that shaped them, not where they came from or lie."""
    shaping = (config.split, config.shortest_side, config.jpeg_quality, config.shard_mb)
    content = [(split, writers[split].content.hexdigest()) for split in sorted(writers)]
    return hashlib.sha256(repr((FORMAT_VERSION, shaping, content)).encode()).hexdigest()
