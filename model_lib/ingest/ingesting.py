"""Captions and their images, turned into Parquet shards and a manifest.

    captioner ingest --dataset coco --output data
    captioner ingest --annotations my.json --images my_images --output data

An image or caption that cannot be used goes to `quarantine.parquet` with its reason, and the rest
goes on. The same input and options give the same bytes, whatever the number of workers, also after
kills and restarts.
"""

import contextlib
import ctypes
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.data.shards import FORMAT_VERSION, SHARD, Manifest, Shard, read_manifest
from model_lib.errors import UserError, WorkError
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.datasets import read_listing
from model_lib.ingest.journal import Finished, Journal, sha256_of, shard_name
from model_lib.ingest.listing import Entry, Listing, Rejected
from model_lib.ingest.transcode import original, reduced
from model_lib.io import storage
from model_lib.io.cpus import cpu_count
from model_lib.io.errors import is_transient
from model_lib.io.images import ImageError
from model_lib.io.locks import output_lock
from model_lib.io.prefetch import prefetch_map
from model_lib.io.url_policy import UrlNotAllowed
from model_lib.io.validation import read_parquet
from model_lib.progress import Progress

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
QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("file_name", "reason", "detail")])
ROW_GROUP = 256
"""Images a row group: the unit that a training loader reads and shuffles by."""
PREFETCH_PER_WORKER = 32
"""Images that wait to be stored: enough for the threads to go on while a row group is written."""
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""mallopt's names: the size from which memory is mapped by itself, and how much is kept unused."""
Row = dict[str, Any]
"""Of `SCHEMA`, and the digest of its content."""


def ingest(config: IngestConfig) -> Manifest:
    """Write shards, quarantine and, last, the manifest; return the manifest.

    Raises:
        UserError: the input is invalid or has no usable image, or the output cannot be written.
        WorkError: a store failed, or another run is writing to the output.
    """
    _keep_memory()
    listing = read_listing(config)
    with output_lock(config.output):
        _require_no_loss(config.output, {entry.split for entry in listing.entries})
        return _ingest(config, listing)


def _require_no_loss(output: str, splits: set[str]) -> None:
    """Raise `UserError` if the output has a split that would be lost."""
    if not storage.exists(storage.join(output, "manifest.json")):
        return
    try:
        counts = read_manifest(output).counts
    except UserError:  # a damaged one is to be replaced
        return
    lost = ", ".join(f"{n:,} {split}" for split, n in counts.items() if split not in splits)
    if lost and splits:
        remedy = "ingest both lists at once (--train, --val), choose another output, or remove it"
        raise UserError(f"{output}: holds {lost} images, which would be lost; {remedy}")


def _keep_memory() -> None:
    """Let glibc keep what it frees: threads would wait for the pages of each image's new memory."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 2**20)


def _ingest(config: IngestConfig, listing: Listing) -> Manifest:
    if listing.has_auto_split:
        _hold_one_out(listing.entries, config)
    key = config.key(listing.digest(), str(FORMAT_VERSION), str(ROW_GROUP))
    journal = Journal(config.output, key)
    finished: dict[str, list[Finished]] = {}
    quarantine = list(listing.rejected)
    train_files: set[str] | None = None if listing.is_published else set()
    with Progress("ingest", len(listing.entries), "images") as progress:
        for split in sorted({entry.split for entry in listing.entries}):
            entries = [entry for entry in listing.entries if entry.split == split]
            writer = _SplitWriter(split, entries, train_files, config, journal, progress)
            writer.write()
            if writer.finished:
                finished[split] = writer.finished
            quarantine += [row for record in writer.finished for row in record.rejected]
            quarantine += writer.rejected
    reasons = dict(Counter(row.reason for row in quarantine))
    if not finished:
        raise UserError(_no_image(config.output, listing.uris, quarantine))
    rows = {split: sum(f.shard.rows for f in records) for split, records in finished.items()}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        shards=[record.shard for records in finished.values() for record in records],
        counts=rows,
        quarantined=reasons,
        fingerprint=_fingerprint(config, finished),
        configuration=config.to_dict(),
        uri=storage.absolute(config.output),
        cleaned_captions=listing.cleaned,
    )
    _write_manifest(config.output, manifest, quarantine)
    journal.close()
    return manifest


def _no_image(output: str, uris: Sequence[str], quarantine: Sequence[Rejected]) -> str:
    """Write the quarantine, unless the output is another data set's; return the message."""
    counts = Counter(row.reason for row in quarantine)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())
    message = f"{', '.join(uris)}: no usable image among {len(quarantine):,} rows"
    if not quarantine:
        return f"{message}: it is empty"
    message = f"{message} ({reasons}); the first: {quarantine[0].detail}"
    if storage.exists(storage.join(output, "manifest.json")):
        return message
    return f"{message}; all are in {_write_quarantine(output, quarantine)}"


def _hold_one_out(entries: list[Entry], config: IngestConfig) -> None:
    """Move the first usable image to val if none is there, as may be the case with few images."""
    if len(entries) < 2 or any(entry.split == "val" for entry in entries):
        return
    for number, entry in enumerate(entries):
        if not isinstance(_store(entry, config), Rejected):
            entries[number] = replace(entry, split="val")
            return


@dataclass
class _SplitWriter:
    """Writes the shards of a split that no earlier run finished."""

    split: str
    entries: list[Entry]
    train_files: set[str] | None
    """SHA-256 of the training images' files, to which the train split adds and which others leave
    out; None: splits may share files."""
    config: IngestConfig
    journal: Journal
    progress: Progress
    """Of all splits."""
    finished: list[Finished] = field(default_factory=list)
    end: int = 0
    """Number of entries that are stored or rejected."""
    rejected: list[Rejected] = field(default_factory=list)
    """Entries after the last finished shard that cannot be used."""

    def write(self) -> None:
        self.finished = list(self.journal.read(self.split, len(self.entries)))
        self.end = self.finished[-1].end if self.finished else 0
        self.progress.resume(self.end)
        if self.train_files is not None and self.split == "train":
            for record in self.finished:
                uri = storage.join(self.config.output, record.shard.uri)
                column = read_parquet(uri, {"sha256": "text"}, SHARD)["sha256"]
                self.train_files.update(column.to_pylist())
        rows = self._rows()
        for first in rows:
            self._write_shard(chain([first], rows))

    def _rows(self) -> Iterator[Row]:
        """Yield the rows of usable images, stored on threads, as codecs work outside the GIL."""
        workers = self.config.workers or cpu_count()
        store = partial(_store, config=self.config)
        entries = self.entries[self.end :]
        for result in prefetch_map(store, entries, workers, PREFETCH_PER_WORKER * workers):
            self.end += 1
            self.progress.advance()
            if isinstance(result, Rejected):
                self.rejected.append(result)
            elif self._is_duplicate(result["sha256"]):
                detail = "is the same file as a training image"
                self.rejected.append(Rejected(result["file_name"], "duplicate_of_train", detail))
            else:
                yield result

    def _is_duplicate(self, sha256: str) -> bool:
        """Return whether a file of another split is a training image's under another name."""
        if self.train_files is None:
            return False
        if self.split == "train":
            self.train_files.add(sha256)
            return False
        return sha256 in self.train_files

    def _write_shard(self, rows: Iterator[Row]) -> None:
        """Write rows to the next shard until it is full."""
        output, name = self.config.output, shard_name(self.split, len(self.finished))
        storage.remove(storage.join(output, "manifest.json"))  # a half-done ingest is no data set
        count = image_bytes = 0
        content = hashlib.sha256()
        # JPEG cannot be compressed, nor do images recur in a dictionary; the rest is small.
        options = {"compression": "none", "use_dictionary": ["split"], "write_page_checksum": True}
        with storage.atomic_file(storage.join(output, name)) as part:
            with pq.ParquetWriter(part, SCHEMA, **options) as writer:
                group: list[Row] = []
                for row in rows:
                    group.append(row)
                    count += 1
                    image_bytes += len(row["image"])
                    content.update(row["digest"].encode())
                    is_full = image_bytes >= self.config.shard_mb * 1_000_000
                    if is_full or len(group) == ROW_GROUP:
                        writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                        group = []
                    if is_full:
                        break
                if group:
                    writer.write_table(pa.Table.from_pylist(group, SCHEMA))
            shard = Shard(name, self.split, count, storage.file_size(part), sha256_of(part))
        record = Finished(shard, self.end, content.hexdigest(), self.rejected)
        self.journal.write(record)
        self.finished.append(record)
        self.rejected = []


def _store(entry: Entry, config: IngestConfig) -> Row | Rejected:
    """Read, decode, reduce and encode an image."""
    try:
        content = entry.source.read(entry.file_name)
        if config.store == "original":
            stored = original(content)
        else:
            stored = reduced(content, config.shortest_side, config.jpeg_quality)
    except UrlNotAllowed as error:
        return Rejected(entry.file_name, "not_allowed", str(error))
    except UserError as error:
        return Rejected(entry.file_name, "missing", str(error))
    except ImageError as error:
        return Rejected(entry.file_name, error.reason, error.detail)
    except WorkError as error:
        if is_transient(error):
            raise
        return Rejected(entry.file_name, "forbidden", str(error))
    sha256, captions = hashlib.sha256(content).hexdigest(), list(entry.captions)
    digest = hashlib.sha256(stored.content).hexdigest()
    return {
        "image_id": entry.image_id,
        "file_name": entry.file_name,
        "split": entry.split,
        "width": stored.width,
        "height": stored.height,
        "image": stored.content,
        "captions": captions,
        "sha256": sha256,
        "source": entry.source.uri(entry.file_name),
        "digest": repr((entry.image_id, entry.file_name, digest, sha256, captions)),
    }


def _write_quarantine(output: str, quarantine: Sequence[Rejected]) -> str:
    """Write the quarantine; return its URI."""
    uri = storage.join(output, "quarantine.parquet")
    with storage.atomic_file(uri) as part:
        rows = pa.Table.from_pylist([vars(row) for row in quarantine], QUARANTINE_SCHEMA)
        pq.write_table(rows, part)
    return uri


def _write_manifest(output: str, manifest: Manifest, quarantine: list[Rejected]) -> None:
    """Write quarantine and manifest; remove an earlier ingest's shards."""
    storage.remove(storage.join(output, "manifest.json"))
    _write_quarantine(output, quarantine)
    shards = {shard.uri for shard in manifest.shards}
    for name in storage.list_names(output):
        if re.fullmatch(r"(train|val|test)-\d{5}\.parquet", name) and name not in shards:
            storage.remove(storage.join(output, name))
    storage.write_json(storage.join(output, "manifest.json"), manifest.to_dict())
    if manifest.cleaned_captions:
        log.warning("%d captions lost control characters", manifest.cleaned_captions)


def _fingerprint(config: IngestConfig, finished: dict[str, list[Finished]]) -> str:
    """Digest the images, their captions and the options that shape them; not where they lie."""
    options = [config.split, config.store, config.shard_mb]
    if config.store == "reduced":
        options += [config.shortest_side, config.jpeg_quality]
    content = [(split, [record.content for record in r]) for split, r in finished.items()]
    return hashlib.sha256(repr((FORMAT_VERSION, options, content)).encode()).hexdigest()
