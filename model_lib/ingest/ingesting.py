"""Captions and their images, turned into Parquet shards and a manifest.

    captioner ingest --dataset coco --output data
    captioner ingest --annotations my.json --images my_images --output data

What cannot be used goes to `quarantine.parquet` with its reason and the rest goes on. The same
input and options give the same bytes, whatever the number of workers, and however often it was
killed in between.
"""

import contextlib
import ctypes
import hashlib
import logging
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
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
QUARANTINE_SCHEMA = pa.schema(
    [("file_name", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
ROW_GROUP = 256
"""Images a row group: the unit that a training loader reads and shuffles by."""
PREFETCH = 32
"""Images a worker that may wait until those before them are stored: enough to go on while a row
group is written."""
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""mallopt's names: from which size on memory comes from the system by itself, and how much may lie
unused."""
Row = dict[str, Any]
Result = tuple[Row, str] | Rejected
"""An image's row with the digest of its content, or why it has none."""


def _store(entry: Entry, config: IngestConfig) -> Result:
    """Read, decode, reduce and encode one image."""
    try:
        content = entry.place.read(entry.file_name)
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


def _in_order(entries: Iterable[Entry], config: IngestConfig) -> Iterator[Result]:
    """Store entries on threads (codecs work outside the interpreter's lock), results in order,
    memory bounded."""
    workers = config.workers or cpu_count()
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future] = deque()
    try:
        for entry in entries:
            pending.append(pool.submit(_store, entry, config))
            if len(pending) > PREFETCH * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _ShardWriter:
    """A shard that is being written, a row group at a time.

    Args:
        path: to write to.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        # Images are all different: a dictionary of them would only be thrown away.
        self.writer = pq.ParquetWriter(
            path, SCHEMA, compression="zstd", use_dictionary=["split"], write_page_checksum=True
        )
        self.group: list[Row] = []
        self.rows = self.images = 0
        self.content = hashlib.sha256()

    def add(self, row: Row, digest: str) -> None:
        self.group.append(row)
        self.rows += 1
        self.images += len(row["image"])
        self.content.update(digest.encode())
        if len(self.group) == ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        if self.group:
            self.writer.write_table(
                pa.Table.from_pylist(self.group, SCHEMA), row_group_size=ROW_GROUP
            )
            self.group = []

    def close(self, uri: str, split: str) -> Shard:
        """Finish the file and return what the manifest says of it."""
        self.flush()
        self.writer.close()
        size = self.path.stat().st_size
        return Shard(uri=uri, split=split, rows=self.rows, bytes=size, sha256=sha256_of(self.path))


def _write_shard(
    results: Iterator[tuple[int, Result]],
    rejected: list[Rejected],
    name: str,
    split: str,
    config: IngestConfig,
) -> Finished | None:
    """Write the next shard of a split, or return None if no usable image is left; add to `rejected`
    on the way."""
    for first in results:  # a shard without rows is none
        if not isinstance(first[1], Rejected):
            break
        rejected.append(first[1])
    else:
        return None
    storage.remove(
        storage.join(config.output, "manifest.json")
    )  # a half-done ingest is not a data set
    with storage.atomic_file(storage.join(config.output, name)) as part:
        file = _ShardWriter(part)
        for place, result in chain([first], results):
            end = place + 1
            if isinstance(result, Rejected):
                rejected.append(result)
                continue
            file.add(*result)
            if file.images >= config.shard_mb * 1_000_000:
                break
        shard = file.close(name, split)
    return Finished(shard, end, file.content.hexdigest(), list(rejected))


def _write_split(
    split: str,
    entries: list[Entry],
    learned: set[str] | None,
    config: IngestConfig,
    journal: Journal,
    progress: Progress,
) -> tuple[list[Finished], list[Rejected]]:
    """Write the shards of a split that are not there yet; return all of them, and what could not be
    used.

    Args:
        split: its name.
        entries: its images.
        learned: SHA-256 of the training images' files, to which those are added and from which
            others are kept apart; None where the splits are somebody else's.
        config: of the ingest.
        journal: of what is there.
        progress: of all splits.
    """
    finished = list(journal.read(split, len(entries)))
    start = finished[-1].end if finished else 0
    progress.resume(start)
    if learned is not None and split == "train":
        learned |= _learned_before(config.output, finished)

    def counted() -> Iterator[tuple[int, Result]]:
        for place, result in enumerate(_in_order(entries[start:], config), start):
            progress.advance()
            yield place, result if learned is None else _kept_apart(result, learned)

    results, rejected = counted(), list[Rejected]()
    while (
        made := _write_shard(results, rejected, shard_name(split, len(finished)), split, config)
    ) is not None:
        journal.write(made)
        finished.append(made)
        rejected.clear()
    return finished, [row for one in finished for row in one.rejected] + rejected


def _kept_apart(result: Result, learned: set[str]) -> Result:
    """Return an image's row, or why it has none: it is of another split, and is learned under
    another name."""
    if isinstance(result, Rejected):
        return result
    row, _ = result
    if row["split"] == "train":
        learned.add(row["sha256"])
    elif row["sha256"] in learned:
        return Rejected(
            row["file_name"], "duplicate_of_train", "is the same file as a training image"
        )
    return result


def _learned_before(output: str, finished: list[Finished]) -> set[str]:
    """Return the SHA-256 of each image's file in shards that are there."""
    uris = [storage.join(output, shard.shard.uri) for shard in finished]
    tables = (read_parquet(uri, {"sha256": "text"}, SHARD) for uri in uris)
    return {digest for table in tables for digest in table["sha256"].to_pylist()}


def ingest(config: IngestConfig) -> Manifest:
    """Write shards, quarantine and, last, the manifest; return the manifest.

    Raises:
        UserError: the input is not what it should be, has no usable image, or the output cannot be
            written.
    """
    _keep_memory()
    listing = read_listing(config)
    with output_lock(config.output):
        return _ingest(config, listing)


def _hold_one_out(entries: list[Entry], config: IngestConfig) -> None:
    """Let the first image that can be used be for validation if none is, as of few images none may
    be."""
    if len(entries) > 1 and all(entry.split != "val" for entry in entries):
        usable = (
            place
            for place, entry in enumerate(entries)
            if not isinstance(_store(entry, config), Rejected)
        )
        if (place := next(usable, None)) is not None:
            entries[place] = replace(entries[place], split="val")


def _ingest(config: IngestConfig, listing: Listing) -> Manifest:
    by_name = config.annotations is not None and config.split == "auto"
    if by_name:
        _hold_one_out(listing.entries, config)
    journal = Journal(
        config.output, config.key(listing.digest(), str(FORMAT_VERSION), str(ROW_GROUP))
    )
    splits: dict[str, list[Entry]] = {}
    for entry in listing.entries:
        splits.setdefault(entry.split, []).append(entry)
    finished: dict[str, list[Finished]] = {}
    learned: set[str] | None = (
        set() if by_name else None
    )  # a file may have two names, of which one is to learn from
    quarantine = list(listing.rejected)
    with Progress("ingest", len(listing.entries), "images") as progress:
        for split in sorted(splits):
            made, rejected = _write_split(split, splits[split], learned, config, journal, progress)
            quarantine += rejected
            if made:
                finished[split] = made
    reasons = dict(Counter(row.reason for row in quarantine))
    if not finished:
        said = (
            ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
            or "the list is empty"
        )
        raise UserError(
            f"{', '.join(listing.names)}: no usable image among {len(quarantine)} listed ({said})"
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        shards=[one.shard for made in finished.values() for one in made],
        counts={split: sum(one.shard.rows for one in made) for split, made in finished.items()},
        quarantined=reasons,
        fingerprint=_fingerprint(config, finished),
        configuration=config.to_dict(),
        uri=storage.absolute(config.output),
        cleaned_captions=listing.cleaned,
    )
    _conclude(config.output, manifest, quarantine)
    journal.close()
    return manifest


def _keep_memory() -> None:
    """Let glibc keep what it frees: else each image's pixels are new memory, whose pages threads
    queue up for."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 2**20)


def _conclude(output: str, manifest: Manifest, quarantine: list[Rejected]) -> None:
    """Write quarantine and manifest; remove an earlier ingest's shards, which whoever reads
    *.parquet would take."""
    storage.remove(storage.join(output, "manifest.json"))
    with storage.atomic_file(storage.join(output, "quarantine.parquet")) as part:
        pq.write_table(
            pa.Table.from_pylist([vars(row) for row in quarantine], QUARANTINE_SCHEMA), part
        )
    named = {shard.uri for shard in manifest.shards}
    for name in storage.list_names(output):
        if re.fullmatch(r"(train|val|test)-\d{5}\.parquet", name) and name not in named:
            storage.remove(storage.join(output, name))
    storage.write_json(storage.join(output, "manifest.json"), manifest.to_dict())
    if manifest.cleaned_captions:
        log.warning("%d captions lost control characters", manifest.cleaned_captions)


def _fingerprint(config: IngestConfig, finished: dict[str, list[Finished]]) -> str:
    """Digest the images, their captions and the options that shaped them, not where they came from
    or lie."""
    shaping = [config.split, config.store, config.shard_mb]
    if config.store == "reduced":
        shaping += [config.shortest_side, config.jpeg_quality]
    content = [(split, [one.content for one in made]) for split, made in finished.items()]
    return hashlib.sha256(repr((FORMAT_VERSION, shaping, content)).encode()).hexdigest()
