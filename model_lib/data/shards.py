"""The data set that ingest wrote: its manifest, and batches of images from its Parquet shards.

A split's images are numbered in the order of its shards. An epoch is an order: a list of batches of
those numbers that depends on the seed and the epoch alone, so a training run resumes at any step by
skipping the start of an order.
"""

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.cpus import cpu_count
from model_lib.io.errors import input_errors
from model_lib.io.images import ImageError, decode_image
from model_lib.io.prefetch import PREFETCH, prefetch_map
from model_lib.io.validation import (
    read_record,
    require_columns,
    require_file_name,
    require_values,
)
from model_lib.progress import Progress
from model_lib.tracking.runs import RunData

FORMAT_VERSION = 1
WINDOW = 4096
"""Images that are shuffled together: about 100 MB at 256 pixels."""
COLUMNS = {"image_id": "int", "file_name": "text", "image": "bytes", "captions": "list of text"}
"""Columns that are read, of those that a shard has."""
CHUNK = 8 * 2**20
"""Bytes of a shard that are read and hashed at once."""
MANIFEST = "a manifest that captioner ingest wrote; ingest anew"
SHARD = "a shard that captioner ingest wrote; ingest anew"

T = TypeVar("T")
Preprocess = Callable[[Image.Image], np.ndarray]
"""From an RGB image to what a model takes, for example uint8 [3, size, size]."""
View = Callable[[Image.Image, int], np.ndarray]
"""The same from an image and its number in the split."""
BatchOrder = Sequence[np.ndarray]
"""The numbers of each batch's images, int [B]."""


@dataclass(frozen=True)
class Shard:
    """A Parquet file, named by its name beside the manifest, or by its URI there."""

    uri: str
    split: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A data set's `manifest.json`."""

    format_version: int
    shards: list[Shard]
    counts: dict[str, int]
    """Number of images in each split."""
    quarantined: dict[str, int]
    """Number of rows in the quarantine, for each reason."""
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
        uris = [s.uri if "/" in s.uri else storage.join(folder, s.uri) for s in self.shards]
        shards = [replace(shard, uri=uri) for shard, uri in zip(self.shards, uris, strict=True)]
        return replace(self, shards=shards)

    def as_input(self, uri: str, split: str, context: str) -> RunData:
        """Return a split as the input of a run; `uri` is where the manifest was read."""
        source = self.configuration.get("dataset") or uri.removesuffix("/manifest.json")
        name = storage.absolute(source).rpartition("/")[2]
        uri = storage.absolute(uri)
        images = self.counts.get(split, 0)
        return RunData(f"{name}-{split}", self.fingerprint, uri, context, images)

    def require_split(self, split: str) -> None:
        """Raise `UserError` unless there are images in `split`."""
        if not self.counts.get(split):
            splits = ", ".join(f"{name} ({count})" for name, count in self.counts.items())
            raise UserError(
                f"{self.uri}: has no {split} images, only {splits}; ingest both, with --train and "
                "--val, or with --split auto"
            )


def read_manifest(uri: str) -> Manifest:
    """Read the manifest at `uri`, the file or its folder; its shards' URIs are made absolute.

    Raises:
        UserError: there is no manifest, or one of another format version.
    """
    is_file = uri.endswith(".json") or not storage.is_folder(uri)
    file = uri if is_file else storage.join(uri, "manifest.json")
    if not storage.exists(file):
        raise UserError(f"{file}: no such data set; make one with captioner ingest")
    manifest = read_record(file, Manifest, MANIFEST)
    version = manifest.format_version
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format version {version} is not {FORMAT_VERSION}; ingest anew")
    with input_errors(file, MANIFEST):
        for shard in manifest.shards:
            require_file_name(shard.uri.removeprefix(f"{manifest.uri.rstrip('/')}/"))
    return manifest.located(file.rpartition("/")[0] or ".")


@dataclass(frozen=True)
class Batch:
    """Images with their captions, all lists in the same order."""

    numbers: list[int]
    """Of the images in the split."""
    image_ids: list[int]
    file_names: list[str]
    pixels: list[np.ndarray]
    """What `preprocess` makes of each image."""
    captions: list[list[str]]
    files: list[bytes]
    """The images as they are stored."""


class SplitReader:
    """Reads the images of one split of a data set, in batches.

    Args:
        manifest: the data set.
        split: "train", "val" or another that it has.
        preprocess: the model's; None: no images are read.
        workers: threads that read and decode; 0: one a core.
        limit: number of images that are read, from the first on; 0: all.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        preprocess: Preprocess | None = None,
        *,
        workers: int = 0,
        limit: int = 0,
    ) -> None:
        manifest.require_split(split)
        self.preprocess = preprocess
        self.workers = workers or cpu_count()
        files = [_ShardReader(shard) for shard in manifest.shards if shard.split == split]
        self.groups = [(file, group) for file in files for group in range(len(file.rows))]
        counts = [file.rows[group] for file, group in self.groups]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        """Number of the first image of each row group, and their count."""
        rows = int(self.starts[-1])
        self.rows = min(rows, limit or rows)
        self.lock = threading.Lock()
        """Parquet's reader prefetches for one caller at a time."""

    def captions(self) -> list[list[str]]:
        """Return each image's captions, without reading images."""
        with self.lock:
            tables = [file.read(group, ["captions"]) for file, group in self.groups]
        return [texts for table in tables for texts in table["captions"].to_pylist()][: self.rows]

    def in_order(self, batch_size: int) -> BatchOrder:
        """Return the order of the shards."""
        return _split(np.arange(self.rows), batch_size)

    def shuffled(
        self, batch_size: int, seed: int, epoch: int, lengths: np.ndarray, sort_batches: int = 8
    ) -> BatchOrder:
        """Return the order of an epoch in which images of similar length come together.

        Row groups are shuffled, and images within a window of several groups, so that reading stays
        near in the files; then, a few batches at a time, neighbours in length make a batch, and the
        batches are shuffled again.

        Args:
            batch_size: images per batch; one batch has the remainder.
            seed: with the epoch, what the order depends on.
            epoch: from 0.
            lengths: of each image, for example its captions' tokens, int [rows].
            sort_batches: how many batches' images are sorted together; 1: no image changes its
                batch.
        """
        rng = np.random.default_rng([seed, epoch])
        order = np.concatenate([rng.permutation(window) for window in self._windows(rng)])
        order = order[order < self.rows]
        batches: list[np.ndarray] = []
        for window in _split(order, sort_batches * batch_size):
            near = _split(window[np.argsort(lengths[window], kind="stable")], batch_size)
            batches += [near[index] for index in rng.permutation(len(near))]
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

    def batches(self, order: BatchOrder) -> Generator[Batch]:
        """Yield the batches of an order, with the model's view of each image.

        Raises:
            UserError: a shard or an image in it is damaged.
            WorkError: the store failed.
        """
        read_rows = self._row_reader(list(COLUMNS))

        def load(numbers: np.ndarray) -> Batch:
            rows = read_rows(numbers)
            files = [row["image"] for row in rows]
            return Batch(
                numbers=numbers.tolist(),
                image_ids=[row["image_id"] for row in rows],
                file_names=[row["file_name"] for row in rows],
                pixels=self._pixels(files, numbers, None),
                captions=[row["captions"] for row in rows],
                files=files,
            )

        return self._prefetch(load, order)

    def pixels(
        self, order: BatchOrder, finish: Callable[[np.ndarray, np.ndarray], T], view: View | None
    ) -> Generator[T]:
        """Yield what `finish` makes of each batch of an order.

        Args:
            order: the numbers of each batch's images.
            finish: takes the numbers and pixels, uint8 [B, 3, size, size], on the threads.
            view: of each image; None: `preprocess`.

        Raises:
            UserError: a shard or an image in it is damaged.
            WorkError: the store failed.
        """
        read_rows = self._row_reader(["image"])

        def load(numbers: np.ndarray) -> T:
            files = [row["image"] for row in read_rows(numbers)]
            return finish(numbers, np.stack(self._pixels(files, numbers, view)))

        return self._prefetch(load, order)

    def _prefetch(self, load: Callable[[np.ndarray], T], order: BatchOrder) -> Generator[T]:
        return prefetch_map(load, order, self.workers, max(PREFETCH, self.workers))

    def _pixels(
        self, files: list[bytes], numbers: np.ndarray, view: View | None
    ) -> list[np.ndarray]:
        assert self.preprocess is not None
        images = []
        for content, number in zip(files, numbers.tolist(), strict=True):
            try:
                image = decode_image(content)
                images.append(view(image, number) if view else self.preprocess(image))
            except ImageError as error:
                uri = self.groups[self._group_of(number)][0].uri
                message = f"{uri}: image {number} of its split is {error}; ingest anew"
                raise UserError(message) from error
        return images

    def _group_of(self, numbers: Any) -> Any:
        """Return the index of the row group that holds an image, or of each of several."""
        return np.searchsorted(self.starts, numbers, "right") - 1

    def _row_reader(self, columns: list[str]) -> Callable[[np.ndarray], list[dict[str, Any]]]:
        """Return a function, for several threads, from numbers of images to their rows."""
        # An order stays within a few windows.
        kept = max(4, int(3 * WINDOW * len(self.groups) / self.starts[-1]))

        @lru_cache(kept)
        def read_group(index: int) -> pa.Table:
            file, group = self.groups[index]
            return file.read(group, columns)

        def read_rows(numbers: np.ndarray) -> list[dict[str, Any]]:
            groups = self._group_of(numbers).tolist()
            with self.lock:
                tables = {index: read_group(index) for index in dict.fromkeys(groups)}
            rows = zip(groups, (numbers - self.starts[groups]).tolist(), strict=True)
            return [
                {name: tables[index][name][row].as_py() for name in columns} for index, row in rows
            ]

        return read_rows


def _split(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


class _ShardReader:
    """Reads a shard a row group at a time; each page is checked against its own checksum."""

    def __init__(self, shard: Shard) -> None:
        self.uri = shard.uri
        _require_size(shard)
        with input_errors(self.uri, SHARD):
            # pre_buffer: all that a row group needs is read at once.
            self.file = pq.ParquetFile(
                storage.open_file(shard.uri), pre_buffer=True, page_checksum_verification=True
            )
            metadata = self.file.metadata
            groups = range(metadata.num_row_groups)
            self.rows = [metadata.row_group(group).num_rows for group in groups]
            require_columns(self.file.schema_arrow, COLUMNS)
            _require_rows(sum(self.rows), shard.rows)

    def read(self, group: int, columns: list[str]) -> pa.Table:
        """Return some columns of a row group.

        Raises:
            UserError: its content is damaged.
            WorkError: its store failed.
        """
        with input_errors(self.uri, SHARD):
            table = self.file.read_row_group(group, columns=columns)
            require_values(table, columns)
            _require_rows(table.num_rows, self.rows[group])
        return table


def _require_rows(rows: int, expected: int) -> None:
    if rows != expected:
        raise ValueError(f"has {rows} rows, not {expected}")


def _require_size(shard: Shard) -> None:
    if not storage.exists(shard.uri):
        raise UserError(
            f"{shard.uri}: the manifest names this shard, but it is not there; ingest anew"
        )
    size = storage.file_size(shard.uri)
    if size != shard.bytes:
        raise UserError(
            f"{shard.uri}: has {size} bytes, not the manifest's {shard.bytes}; ingest anew"
        )


def verify(shards: Sequence[Shard], name: str, workers: int = 0, shown: bool = True) -> None:
    """Read shards whole and compare their digests with the manifest's.

    Args:
        shards: to be read.
        name: of the work that needs them, for the progress.
        workers: threads that read; 0: one a core.
        shown: whether to show progress.

    Raises:
        UserError: a shard is missing, or not the one that ingest wrote.
    """

    def check(shard: Shard) -> None:
        _require_size(shard)
        with storage.open_file(shard.uri, CHUNK) as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
        if digest != shard.sha256:
            raise UserError(
                f"{shard.uri}: does not have the manifest's sha256: it is damaged, or another; "
                "ingest anew"
            )

    workers = workers or cpu_count()
    with Progress(f"check data for {name}", len(shards), "shards", shown=shown) as progress:
        for _ in prefetch_map(check, shards, workers, depth=workers):
            progress.advance()
