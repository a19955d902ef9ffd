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
import io
import logging
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.data.shards import FORMAT_VERSION, SHARD, Manifest, Shard, read_manifest
from model_lib.errors import UserError, WorkError
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.datasets import read_listing
from model_lib.ingest.journal import Finished, Journal, shard_name
from model_lib.ingest.listing import Entry, Listing, Rejected
from model_lib.io import storage
from model_lib.io.cpus import cpu_count
from model_lib.io.errors import is_transient
from model_lib.io.images import ImageError, decode_image
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


def ingest(config: IngestConfig, workers: int = 1) -> Manifest:
    """Write shards, quarantine and, last, the manifest; return the manifest.

    Args:
        config: of the data set.
        workers: how many write its shards: this one, and others by `help_ingest`. What these have
            not written, this one does.

    Raises:
        UserError: the input is invalid or has no usable image, or the output cannot be written.
        WorkError: a store failed, or another run is writing to the output.
    """
    _prepare(config)
    listing = read_listing(config)
    with output_lock(config.output, is_shared=workers > 1):
        _require_no_loss(config.output, {entry.split for entry in listing.entries})
        return _ingest(config, listing, workers)


def help_ingest(config: IngestConfig, worker: int, workers: int) -> None:
    """Write the shards of one of several workers, from 1 on, unless `ingest` ends before.

    Their bytes depend on nothing but the input, so it does not matter who writes a shard, nor
    whether two do.
    """
    _prepare(config)
    listing = read_listing(config)
    if listing.has_auto_split:
        _hold_one_out(listing.entries, config)
    journal = _journal(config, listing)
    first, others = _parts(listing, config.shard_images)
    parts = first if not listing.is_published else [*first, *others]
    entries = sum(len(part.entries) for part in parts[worker::workers])
    with Progress("ingest", entries, "images") as progress:
        writer = _ShardWriter(config, journal, progress)
        for part in parts[worker::workers]:
            if journal.is_closed():
                return
            writer.write(part)


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


def _prepare(config: IngestConfig) -> None:
    """Fail before the work if codecs are missing, which originals do without; and let glibc keep
    what it frees: threads would wait for the pages of each image's new memory."""
    if config.store == "reduced":
        from model_lib.ingest import transcode  # noqa: F401
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 2**20)


@dataclass(frozen=True)
class _Part:
    """The entries of a shard."""

    name: str
    """Of its file."""
    split: str
    entries: list[Entry]


def _parts(listing: Listing, size: int) -> tuple[list[_Part], list[_Part]]:
    """Return the parts of the training split and those of the others, each of `size` entries."""
    training: list[_Part] = []
    others: list[_Part] = []
    for split in sorted({entry.split for entry in listing.entries}):
        entries = [entry for entry in listing.entries if entry.split == split]
        for number, start in enumerate(range(0, len(entries), size)):
            part = _Part(shard_name(split, number), split, entries[start : start + size])
            (training if split == "train" else others).append(part)
    return training, others


def _journal(config: IngestConfig, listing: Listing) -> Journal:
    return Journal(config.output, config.key(listing.digest(), str(FORMAT_VERSION), str(ROW_GROUP)))


def _ingest(config: IngestConfig, listing: Listing, workers: int) -> Manifest:
    if listing.has_auto_split:
        _hold_one_out(listing.entries, config)
    journal = _journal(config, listing)
    training, others = _parts(listing, config.shard_images)
    finished: dict[str, Finished] = {}
    with Progress("ingest", len(listing.entries), "images") as progress:
        writer = _ShardWriter(config, journal, progress, replaces=True)
        for parts in (training, others):
            # Then those of the others, who are at work on these from the other end.
            rest = [part for number, part in enumerate(parts) if number % workers][::-1]
            finished |= {part.name: writer.write(part) for part in (*parts[::workers], *rest)}
            if parts is training and others and not listing.is_published:
                # Published splits stay whole, even if they share files.
                writer.train_files = _file_digests(config.output, finished.values())
    records = [finished[part.name] for part in (*training, *others)]
    quarantine = [*listing.rejected, *(row for record in records for row in record.rejected)]
    shards = sorted((record.shard for record in records if record.shard), key=lambda s: s.uri)
    if not shards:
        raise UserError(_no_image(config.output, listing.uris, quarantine))
    counts = Counter[str]()
    for shard in shards:
        counts[shard.split] += shard.rows
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        shards=shards,
        counts=dict(counts),
        quarantined=dict(Counter(row.reason for row in quarantine)),
        fingerprint=_fingerprint(config, finished),
        configuration=config.to_dict(),
        uri=storage.absolute(config.output),
        cleaned_captions=listing.cleaned,
    )
    _write_manifest(config.output, manifest, quarantine)
    journal.close(is_shared=workers > 1)
    return manifest


def _file_digests(output: str, records: Iterable[Finished]) -> set[str]:
    """Return the SHA-256 of the files of all images in some shards."""
    uris = [storage.join(output, record.shard.uri) for record in records if record.shard]
    columns = (read_parquet(uri, {"sha256": "text"}, SHARD)["sha256"] for uri in uris)
    return {digest for column in columns for digest in column.to_pylist()}


def _no_image(output: str, uris: Sequence[str], quarantine: Sequence[Rejected]) -> str:
    """Write the quarantine, unless the output is another data set's; return the message."""
    counts = Counter(row.reason for row in quarantine)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())
    message = f"{', '.join(uris)}: no usable image among {len(quarantine):,} rows"
    if not quarantine:
        return f"{message}: it is empty"
    message = f"{message} ({reasons}); the first: {quarantine[0].detail}"
    if counts.keys() == {"missing"}:
        message += "; give the folder or archive that the names are in as --images"
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
class _ShardWriter:
    """Writes the shards that no earlier run and no other worker finished."""

    config: IngestConfig
    journal: Journal
    progress: Progress
    replaces: bool = False
    """Whether the manifest of an earlier ingest is removed before a shard is written."""
    train_files: Container[str] = ()
    """SHA-256 of the training images' files, which others leave out."""

    def write(self, part: _Part) -> Finished:
        """Write a part's shard, if any of its images can be used."""
        record = self.journal.read(part.name)
        if record is not None:
            self.progress.resume(len(part.entries))
            return record
        rejected: list[Rejected] = []
        rows = self._rows(part, rejected)
        first = next(rows, None)
        if first is None:
            record = Finished(None, "", rejected)
        else:
            shard, content = self._write_rows(part, chain([first], rows))
            record = Finished(shard, content, rejected)
        self.journal.write(part.name, record)
        return record

    def _rows(self, part: _Part, rejected: list[Rejected]) -> Iterator[Row]:
        """Yield the rows of usable images, stored on threads, as codecs work outside the GIL."""
        workers = self.config.workers or cpu_count()
        store = partial(_store, config=self.config)
        for result in prefetch_map(store, part.entries, workers, PREFETCH_PER_WORKER * workers):
            self.progress.advance()
            if isinstance(result, Rejected):
                rejected.append(result)
            elif result["sha256"] in self.train_files:
                detail = "is the same file as a training image"
                rejected.append(Rejected(result["file_name"], "duplicate_of_train", detail))
            else:
                yield result

    def _write_rows(self, part: _Part, rows: Iterator[Row]) -> tuple[Shard, str]:
        """Write a shard; return it, and the digest of its rows."""
        output = self.config.output
        if self.replaces:
            storage.remove(storage.join(output, "manifest.json"))  # half an ingest is no data set
        count, content = 0, hashlib.sha256()
        # JPEG cannot be compressed, nor do images recur in a dictionary; the rest is small.
        options = {"compression": "none", "use_dictionary": ["split"], "write_page_checksum": True}
        with storage.atomic_file(storage.join(output, part.name)) as path:
            with _HashedFile(path) as file, pq.ParquetWriter(file, SCHEMA, **options) as writer:
                while group := list(islice(rows, ROW_GROUP)):
                    count += len(group)
                    for row in group:
                        content.update(row["digest"].encode())
                    writer.write_table(pa.Table.from_pylist(group, SCHEMA))
            sha256 = file.sha256.hexdigest()
            shard = Shard(part.name, part.split, count, storage.file_size(path), sha256)
        return shard, content.hexdigest()


class _HashedFile(io.BufferedWriter):
    """A local file, hashed while it is written."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return super().write(content)


def _store(entry: Entry, config: IngestConfig) -> Row | Rejected:
    """Read, decode, reduce and encode an image."""
    try:
        content = entry.source.read(entry.file_name)
        if config.store == "original":
            image, (width, height) = content, decode_image(content).size
        else:
            from model_lib.ingest.transcode import reduced

            image, width, height = reduced(content, config.shortest_side, config.jpeg_quality)
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
    digest = hashlib.sha256(image).hexdigest()
    return {
        "image_id": entry.image_id,
        "file_name": entry.file_name,
        "split": entry.split,
        "width": width,
        "height": height,
        "image": image,
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


def _fingerprint(config: IngestConfig, finished: Mapping[str, Finished]) -> str:
    """Digest the images, their captions and the options that shape them; not where they lie."""
    options = [config.split, config.store, config.shard_images]
    if config.store == "reduced":
        options += [config.shortest_side, config.jpeg_quality]
    content = [(name, finished[name].content) for name in sorted(finished)]
    return hashlib.sha256(repr((FORMAT_VERSION, options, content)).encode()).hexdigest()
