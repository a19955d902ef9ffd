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
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.data.shards import FORMAT_VERSION, SHARD, Manifest, Shard
from model_lib.errors import UserError, WorkError
from model_lib.ingest.annotations import Entry, Listing, Rejected, read_listing
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.journal import Finished, Journal, sha256_of, shard_name
from model_lib.ingest.transcode import original, reduced
from model_lib.io import storage
from model_lib.io.cpus import cpu_count
from model_lib.io.errors import is_transient
from model_lib.io.images import ImageError
from model_lib.io.locks import output_lock
from model_lib.io.prefetch import prefetch_map
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
Result = tuple[Row, str] | Rejected
"""An image's row with the digest of its content, or the reason why it has none."""


def ingest(config: IngestConfig) -> Manifest:
    """Write shards, quarantine and, last, the manifest; return the manifest.

    Raises:
        UserError: the input is not what it should be, has no usable image, or the output cannot be
            written.
        WorkError: a store failed, or another run is writing to the output.
    """
    _keep_memory()
    listing = read_listing(config)
    with output_lock(config.output):
        return _ingest(config, listing)


def _keep_memory() -> None:
    """Let glibc keep what it frees: else each image's pixels are new memory, whose pages threads
    queue up for."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 2**20)


def _ingest(config: IngestConfig, listing: Listing) -> Manifest:
    own_splits = config.annotations is not None and config.split == "auto"
    if own_splits:
        _hold_one_out(listing.entries, config)
    key = config.key(listing.digest(), str(FORMAT_VERSION), str(ROW_GROUP))
    journal = Journal(config.output, key)
    splits: dict[str, list[Entry]] = {}
    for entry in listing.entries:
        splits.setdefault(entry.split, []).append(entry)
    finished: dict[str, list[Finished]] = {}
    # Published splits stay whole, whatever files are in them twice.
    train_files: set[str] | None = set() if own_splits else None
    quarantine = list(listing.rejected)
    with Progress("ingest", len(listing.entries), "images") as progress:
        for split, entries in sorted(splits.items()):
            shards, rejected = _write_split(split, entries, train_files, config, journal, progress)
            quarantine += rejected
            if shards:
                finished[split] = shards
    reasons = dict(Counter(row.reason for row in quarantine))
    if not finished:
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        raise UserError(
            f"{', '.join(listing.uris)}: no usable image among {len(quarantine)} listed "
            f"({counts or 'the list is empty'})"
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        shards=[record.shard for records in finished.values() for record in records],
        counts={
            split: sum(record.shard.rows for record in records)
            for split, records in finished.items()
        },
        quarantined=reasons,
        fingerprint=_fingerprint(config, finished),
        configuration=config.to_dict(),
        uri=storage.absolute(config.output),
        cleaned_captions=listing.cleaned,
    )
    _write_manifest(config.output, manifest, quarantine)
    journal.close()
    return manifest


def _hold_one_out(entries: list[Entry], config: IngestConfig) -> None:
    """Move the first usable image to val if none is there, as may be the case with few images."""
    if len(entries) < 2 or any(entry.split == "val" for entry in entries):
        return
    for number, entry in enumerate(entries):
        if not isinstance(_store(entry, config), Rejected):
            entries[number] = replace(entry, split="val")
            return


def _write_split(
    split: str,
    entries: list[Entry],
    train_files: set[str] | None,
    config: IngestConfig,
    journal: Journal,
    progress: Progress,
) -> tuple[list[Finished], list[Rejected]]:
    """Write the missing shards of a split; return all of them, and the images that are in none.

    Args:
        split: its name.
        entries: its images.
        train_files: SHA-256 of the training images' files, to which the train split adds and which
            others leave out; None: splits may share files.
        config: of the ingest.
        journal: of its finished shards.
        progress: of all splits.
    """
    finished = list(journal.read(split, len(entries)))
    start = finished[-1].end if finished else 0
    progress.resume(start)
    if train_files is not None and split == "train":
        for record in finished:
            uri = storage.join(config.output, record.shard.uri)
            train_files.update(read_parquet(uri, {"sha256": "text"}, SHARD)["sha256"].to_pylist())

    def store_all() -> Iterator[tuple[int, Result]]:
        for number, result in enumerate(_in_order(entries[start:], config), start):
            progress.advance()
            yield number, result if train_files is None else _reject_shared(result, train_files)

    results, rejected = store_all(), list[Rejected]()
    while written := _write_shard(results, rejected, split, len(finished), config):
        journal.write(written)
        finished.append(written)
        rejected = []
    return finished, [row for record in finished for row in record.rejected] + rejected


def _in_order(entries: Iterable[Entry], config: IngestConfig) -> Iterator[Result]:
    """Store entries on threads, as codecs work outside the interpreter's lock."""
    workers = config.workers or cpu_count()
    store = partial(_store, config=config)
    return prefetch_map(store, entries, workers, PREFETCH_PER_WORKER * workers)


def _store(entry: Entry, config: IngestConfig) -> Result:
    """Read, decode, reduce and encode an image."""
    try:
        content = entry.source.read(entry.file_name)
        if config.store == "original":
            stored = original(content)
        else:
            stored = reduced(content, config.shortest_side, config.jpeg_quality)
    except UserError as error:
        return Rejected(entry.file_name, "missing", str(error))
    except ImageError as error:
        return Rejected(entry.file_name, error.reason, error.detail)
    except WorkError as error:
        if is_transient(error):
            raise
        return Rejected(entry.file_name, "forbidden", str(error))
    row = {
        "image_id": entry.image_id,
        "file_name": entry.file_name,
        "split": entry.split,
        "width": stored.width,
        "height": stored.height,
        "image": stored.content,
        "captions": list(entry.captions),
        "sha256": hashlib.sha256(content).hexdigest(),
        "source": entry.uri,
    }
    digest = hashlib.sha256(stored.content).hexdigest()
    return row, repr((entry.image_id, entry.file_name, digest, row["sha256"], row["captions"]))


def _reject_shared(result: Result, train_files: set[str]) -> Result:
    """Reject an image of another split whose file is a training image's under another name."""
    if isinstance(result, Rejected):
        return result
    row, _ = result
    if row["split"] == "train":
        train_files.add(row["sha256"])
    elif row["sha256"] in train_files:
        detail = "is the same file as a training image"
        return Rejected(row["file_name"], "duplicate_of_train", detail)
    return result


def _write_shard(
    results: Iterator[tuple[int, Result]],
    rejected: list[Rejected],
    split: str,
    number: int,
    config: IngestConfig,
) -> Finished | None:
    """Write the next shard of a split; None if no usable image is left. Add to `rejected`."""
    name = shard_name(split, number)
    first = next(results, None)
    while first is not None and isinstance(first[1], Rejected):
        rejected.append(first[1])
        first = next(results, None)
    if first is None:
        return None
    # A half-done ingest is not a data set.
    storage.remove(storage.join(config.output, "manifest.json"))
    with storage.atomic_file(storage.join(config.output, name)) as part:
        writer = _ShardWriter(part)
        for index, result in chain([first], results):
            end = index + 1
            if isinstance(result, Rejected):
                rejected.append(result)
                continue
            writer.add(*result)
            if writer.image_bytes >= config.shard_mb * 1_000_000:
                break
        shard = writer.finish(name, split)
    return Finished(shard, end, writer.content.hexdigest(), rejected)


class _ShardWriter:
    """Writes a shard to a local path, a row group at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Images are all different: a dictionary of them would only be thrown away.
        self.writer = pq.ParquetWriter(
            path, SCHEMA, compression="zstd", use_dictionary=["split"], write_page_checksum=True
        )
        self.group: list[Row] = []
        self.rows = self.image_bytes = 0
        self.content = hashlib.sha256()

    def add(self, row: Row, digest: str) -> None:
        self.group.append(row)
        self.rows += 1
        self.image_bytes += len(row["image"])
        self.content.update(digest.encode())
        if len(self.group) == ROW_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        table = pa.Table.from_pylist(self.group, SCHEMA)
        self.writer.write_table(table, row_group_size=ROW_GROUP)
        self.group = []

    def finish(self, name: str, split: str) -> Shard:
        """Complete the file and return its entry in the manifest."""
        if self.group:
            self._write_group()
        self.writer.close()
        size = storage.file_size(self.path)
        return Shard(name, split, self.rows, size, sha256_of(self.path))


def _write_manifest(output: str, manifest: Manifest, quarantine: list[Rejected]) -> None:
    """Write quarantine and manifest; remove an earlier ingest's shards, which readers of *.parquet
    would take for this one's."""
    storage.remove(storage.join(output, "manifest.json"))
    with storage.atomic_file(storage.join(output, "quarantine.parquet")) as part:
        rows = pa.Table.from_pylist([vars(row) for row in quarantine], QUARANTINE_SCHEMA)
        pq.write_table(rows, part)
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
