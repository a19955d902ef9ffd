"""The data set that ingest made: its manifest, and batches of images read from its Parquet shards.

A split's images are numbered in the order of its shards, and an epoch is an order: a list of
batches of those numbers that depends on the seed and the epoch alone. So a training run goes on at
any step by leaving out an order's start.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from model_lib.errors import UserError, WorkError, first_line
from model_lib.io import storage
from model_lib.io.cpus import cpu_count
from model_lib.io.images import ImageError, decode_image, to_pixels
from model_lib.io.validation import (
    input_errors,
    parse,
    require_columns,
    require_file_name,
    require_values,
)
from model_lib.progress import Progress

FORMAT_VERSION = 1
WINDOW = 4096
"""Rows held in memory and shuffled together: about 100 MB of images at 256 pixels."""
COLUMNS = {
    "image_id": "whole number",
    "file_name": "text",
    "image": "bytes",
    "captions": "list of texts",
}
"""Columns that are read; others may be there."""
Item = TypeVar("Item")
PREFETCH = 4
"""Batches that are read and decoded before they are asked for."""
CHUNK = 8 * 2**20
"""Bytes of a shard that are read and hashed at once."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file: `uri` is a name beside the manifest, or absolute in the folder that the
    manifest names."""

    uri: str
    split: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a data set."""

    format_version: int
    shards: list[Shard]
    counts: dict[str, int]
    """Number of images in each split."""
    quarantined: dict[str, int]
    """Number of images and captions in the quarantine, for each reason."""
    fingerprint: str
    configuration: dict[str, Any]
    uri: str
    """Folder of the shards when the manifest was written."""
    cleaned_captions: int = 0
    """Captions that were kept without their control characters."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def located(self, folder: str) -> Self:
        """Return the manifest with its shards' URIs made absolute under `folder`."""
        shards = [
            replace(s, uri=s.uri if "/" in s.uri else storage.join(folder, s.uri))
            for s in self.shards
        ]
        return replace(self, shards=shards)

    def require_split(self, split: str) -> None:
        """Raise `UserError` unless there are images in `split`."""
        if not self.counts.get(split):
            there = ", ".join(f"{name} ({count})" for name, count in self.counts.items())
            raise UserError(
                f"{self.uri}: has no {split} images, only {there}; ingest both: --dataset, or "
                "--split auto"
            )


def read_manifest(uri: str) -> Manifest:
    """Read the manifest at `uri` (the file, or the folder it lies in); its shards' URIs are made
    absolute.

    Raises:
        UserError: there is no manifest, or one of another format version.
    """
    file = (
        uri
        if uri.endswith(".json") or not storage.is_folder(uri)
        else storage.join(uri, "manifest.json")
    )
    if not storage.exists(file):
        raise UserError(f"{file}: no such data set; make one with captioner ingest")
    document = storage.read_json(file)
    with input_errors(file, "a manifest that captioner ingest wrote"):
        if document["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{file}: format version {document['format_version']} is not {FORMAT_VERSION}; "
                "ingest anew"
            )
        manifest = parse(Manifest, document)
        for shard in manifest.shards:
            require_file_name(shard.uri.removeprefix(f"{manifest.uri.rstrip('/')}/"))
    return manifest.located(file.rpartition("/")[0] or ".")


@dataclass(frozen=True)
class Batch:
    """Some images with their captions."""

    numbers: list[int]
    """Places of the images in the split."""
    image_ids: list[int]
    file_names: list[str]
    pixels: np.ndarray
    """RGB, uint8 [B, 3, size, size]."""
    captions: list[list[str]]
    jpegs: list[bytes]


BatchOrder = Sequence[np.ndarray]
"""For each batch the numbers of its images."""


class SplitReader:
    """Reads the images of one split of a data set, in batches.

    Args:
        manifest: the data set.
        split: "train", "val" or another that it has.
        size: side of the pixels in each batch.
        workers: threads that decode; 0: one a core.
        limit: know the first so many images only; 0: all.
    """

    def __init__(
        self, manifest: Manifest, split: str, *, size: int, workers: int = 0, limit: int = 0
    ) -> None:
        manifest.require_split(split)
        self.size, self.workers = size, workers or cpu_count()
        self.files = [_ShardReader(shard) for shard in manifest.shards if shard.split == split]
        self.groups = [(file, group) for file in self.files for group in range(len(file.rows))]
        counts = [file.rows[group] for file, group in self.groups]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        """Number of the first image of each row group, and their count."""
        rows = int(self.starts[-1])
        self.rows = min(rows, limit) if limit else rows

    def captions(self) -> list[list[str]]:
        """Return each image's captions, without reading images."""
        columns = (
            file.read(group, ["captions"])["captions"].to_pylist() for file, group in self.groups
        )
        return [captions for column in columns for captions in column][: self.rows]

    def in_order(self, batch_size: int) -> BatchOrder:
        """Return the order of the shards."""
        return _cut(np.arange(self.rows), batch_size)

    def shuffled(
        self, batch_size: int, seed: int, epoch: int, lengths: np.ndarray, sort_batches: int = 8
    ) -> BatchOrder:
        """Return the order of an epoch in which images of similar length come together.

        Row groups are shuffled, and images within a window of several groups, so that reading stays
        near in the files; then, a few batches at a time, neighbours in length make a batch, and the
        batches are shuffled again.

        Args:
            batch_size: images per batch; one of the last is smaller if they do not divide.
            seed: with the epoch, what the order depends on.
            epoch: from 0.
            lengths: of each image, for example its captions' tokens, int [rows].
            sort_batches: how many batches' worth of images are sorted together; 1: no image changes
                its batch.
        """
        rng = np.random.default_rng([seed, epoch])
        order = np.concatenate([rng.permutation(window) for window in self._windows(rng)])
        order = order[order < self.rows]
        batches: list[np.ndarray] = []
        for some in _cut(order, sort_batches * batch_size):
            near = _cut(some[np.argsort(lengths[some], kind="stable")], batch_size)
            batches += [near[place] for place in rng.permutation(len(near))]
        return batches

    def _windows(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        window: list[np.ndarray] = []
        for group in rng.permutation(len(self.groups)):
            window.append(np.arange(self.starts[group], self.starts[group + 1]))
            if sum(map(len, window)) >= WINDOW:
                yield np.concatenate(window)
                window = []
        if window:
            yield np.concatenate(window)

    def batches(
        self, order: BatchOrder, view: Callable[[Image.Image, int], np.ndarray] | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of an order, read and decoded ahead by threads.

        Args:
            order: whose images, and in which order.
            view: takes an image and its number to pixels, uint8 [3, size, size]; by default CLIP's
                view of it.
        """
        shown = view or (lambda image, number: to_pixels(image, self.size))

        def decoded(content: bytes, number: int) -> np.ndarray:
            try:
                return shown(
                    decode_image(content), number
                )  # ingest may have kept the original, of any kind
            except ImageError as error:
                file, _ = self.groups[int(np.searchsorted(self.starts, number, "right")) - 1]
                raise UserError(
                    f"{file.uri}: image {number} of its split is {error}; ingest anew"
                ) from error

        tables: OrderedDict[int, Any] = (
            OrderedDict()
        )  # row groups in use; an order stays within a few windows
        kept = max(4, int(3 * WINDOW * len(self.groups) / self.starts[-1]))

        def row(number: int, place: int) -> dict[str, Any]:
            inside = int(number - self.starts[place])
            return {name: tables[place][name][inside].as_py() for name in COLUMNS}

        def load(places: list[int]) -> None:
            for place in dict.fromkeys(places):
                if place not in tables:
                    file, group = self.groups[place]
                    tables[place] = file.read(group, list(COLUMNS))
                tables.move_to_end(place)
            while len(tables) > max(kept, len(set(places))):
                tables.popitem(last=False)

        def read() -> Iterator[Batch]:
            with ThreadPoolExecutor(self.workers) as pool:
                for numbers in order:
                    places = (np.searchsorted(self.starts, numbers, "right") - 1).tolist()
                    load(places)
                    rows = [row(*pair) for pair in zip(numbers.tolist(), places, strict=True)]
                    pixels = list(
                        pool.map(decoded, (one["image"] for one in rows), numbers.tolist())
                    )
                    yield Batch(
                        numbers=numbers.tolist(),
                        image_ids=[one["image_id"] for one in rows],
                        file_names=[one["file_name"] for one in rows],
                        pixels=np.stack(pixels),
                        captions=[one["captions"] for one in rows],
                        jpegs=[one["image"] for one in rows],
                    )

        return prefetch(read(), PREFETCH)


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def prefetch(source: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    """Yield what `source` yields, computed by a thread up to `depth` items before it is asked
    for."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, source, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, source, end))
            yield item


class _ShardReader:
    """One shard, read a row group at a time; each page is checked against its own checksum."""

    def __init__(self, shard: Shard) -> None:
        self.uri = shard.uri
        fs, path = storage.filesystem(shard.uri)
        _require_whole(shard)
        self.file = self._reading(
            lambda: pq.ParquetFile(
                fs.open(
                    path, "rb", cache_type="none"
                ),  # Parquet's reader knows what it needs, and asks for it at once
                pre_buffer=True,
                page_checksum_verification=True,
            )
        )
        metadata = self.file.metadata
        self.rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        with input_errors(self.uri, "a shard that captioner ingest wrote"):
            require_columns(self.file.schema_arrow, COLUMNS)
            if (self.rows and min(self.rows) < 1) or sum(self.rows) != shard.rows:
                raise ValueError(f"has {sum(self.rows)} rows, not the manifest's {shard.rows}")

    def read(self, group: int, columns: list[str]) -> pa.Table:
        """Return some columns of a row group.

        Raises:
            UserError: the shard is gone, or its content is damaged.
            WorkError: its store failed, and went on to for as long as it was asked again.
        """
        table = self._reading(lambda: self.file.read_row_group(group, columns=columns))
        with input_errors(self.uri, "a shard that captioner ingest wrote"):
            require_values(table, columns)
            if table.num_rows != self.rows[group]:
                raise ValueError(
                    f"row group {group} has {table.num_rows} rows, not {self.rows[group]}"
                )
        return table

    def _reading(self, read: Callable[[], Any]) -> Any:
        def attempt() -> Any:
            try:
                return read()
            except FileNotFoundError as error:
                raise UserError(
                    f"{self.uri}: the manifest names this shard, but it is not there; ingest anew"
                ) from error
            except (
                pa.ArrowException,
                UnicodeDecodeError,
                OSError,
            ) as error:  # a column's name may be no UTF-8
                # Parquet's reader says in an OSError what is wrong with a page or its header; one
                # of this machine's files has a number then, and a store that fails may pass.
                said = (
                    error.errno is None and storage.is_local(self.uri)
                    if isinstance(error, OSError)
                    else True
                )
                if said or "checksum" in str(error) or "deserialize" in str(error):
                    raise UserError(
                        f"{self.uri}: is damaged: {first_line(error)}; ingest anew"
                    ) from error
                raise

        try:
            return storage.retry_remote(self.uri, attempt)
        except OSError as error:
            raise WorkError(
                f"{self.uri}: cannot be read: {type(error).__name__}: {first_line(error)}"
            ) from error


def _require_whole(shard: Shard) -> None:
    fs, path = storage.filesystem(shard.uri)
    if not storage.exists(shard.uri):
        raise UserError(
            f"{shard.uri}: the manifest names this shard, but it is not there; ingest anew"
        )
    size = storage.retry_remote(shard.uri, lambda: fs.size(path))
    if size != shard.bytes:
        raise UserError(
            f"{shard.uri}: has {size} bytes, not the manifest's {shard.bytes}; ingest anew"
        )


def verify(shards: Sequence[Shard], name: str, workers: int = 0, shown: bool = True) -> None:
    """Read shards whole and compare them with the manifest, a progress line now and then.

    Args:
        shards: to be read.
        name: of the work that needs them, for the progress line.
        workers: threads that read; 0: one a core.
        shown: whether to show progress.

    Raises:
        UserError: a shard is gone, or is not the one that ingest wrote.
    """

    def digest(shard: Shard) -> str:
        fs, path = storage.filesystem(shard.uri)
        with fs.open(path, "rb", block_size=CHUNK, cache_type="readahead") as content:
            found = hashlib.sha256()
            while chunk := content.read(CHUNK):
                found.update(chunk)
        return found.hexdigest()

    def check(shard: Shard) -> None:
        _require_whole(shard)
        if storage.retry_remote(shard.uri, lambda: digest(shard)) != shard.sha256:
            raise UserError(
                f"{shard.uri}: does not have the manifest's sha256: it is damaged, or another; "
                "ingest anew"
            )

    threads = ThreadPoolExecutor(workers or cpu_count())
    with (
        threads,
        Progress(f"check data for {name}", len(shards), "shards", shown=shown) as progress,
    ):
        for _ in threads.map(check, shards):
            progress.advance()
