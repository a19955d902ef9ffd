"""The data set that ingest made: its manifest, and batches read from its Parquet shards.

Batches come in an order that depends on the seed and the epoch alone, so that a training run can go on at any step:
row groups are shuffled, and rows within a window of several groups.
"""

import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from model_lib import storage
from model_lib.errors import UserError
from model_lib.pictures import to_pixels

FORMAT_VERSION = 1
WINDOW = 4096
"""Rows held in memory and shuffled together: about 100 MB of pictures at 256 pixels."""
COLUMNS = ["image_id", "file_name", "image", "captions"]


@dataclass(frozen=True)
class Shard:
    """One Parquet file: `uri` is relative to the manifest or absolute."""

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
    """Pictures a split."""
    quarantined: dict[str, int]
    """Pictures left out, a reason."""
    fingerprint: str
    configuration: dict[str, Any]
    uri: str
    """Folder of the shards when the manifest was written."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def located(self, folder: str) -> Self:
        """Return the manifest with its shards' URIs made absolute under `folder`."""
        shards = [replace(s, uri=s.uri if "/" in s.uri else storage.join(folder, s.uri)) for s in self.shards]
        return replace(self, shards=shards)

    def require_split(self, split: str) -> None:
        """Raise `UserError` unless there are pictures in `split`."""
        if not self.counts.get(split):
            there = ", ".join(f"{name} ({count})" for name, count in self.counts.items())
            raise UserError(
                f"{self.uri}: has no {split} pictures, only {there}; ingest both: --dataset, or --split auto"
            )


def read_manifest(uri: str) -> Manifest:
    """Read the manifest at `uri` (the file, or the folder it lies in); its shards' URIs are made absolute.

    Raises:
        UserError: there is no manifest, or one of another format version.
    """
    file = uri if uri.endswith(".json") or not storage.is_folder(uri) else storage.join(uri, "manifest.json")
    if not storage.exists(file):
        raise UserError(f"{file}: no such data set; make one with captioner ingest")
    document = storage.read_json(file)
    try:
        if document["format_version"] != FORMAT_VERSION:
            raise UserError(f"{file}: format version {document['format_version']} is not {FORMAT_VERSION}; ingest anew")
        manifest = Manifest(**{**document, "shards": [Shard(**shard) for shard in document["shards"]]})
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: is not a manifest that captioner ingest wrote ({error})") from error
    return manifest.located(file.rpartition("/")[0] or ".")


@dataclass(frozen=True)
class Batch:
    """Some pictures with their captions."""

    image_ids: list[int]
    file_names: list[str]
    pixels: np.ndarray
    """RGB, uint8 [B, 3, size, size]."""
    captions: list[list[str]]
    jpegs: list[bytes]


class SplitReader:
    """Reads the pictures of one split of a data set, in batches.

    Args:
        manifest: the data set.
        split: "train", "val" or another that it has.
        batch_size: pictures a batch; the last of an epoch may be smaller.
        size: side of the pixels in each batch.
        workers: threads that decode; 0: one a core.
        limit: read the first so many pictures only; 0: all.
    """

    def __init__(
        self, manifest: Manifest, split: str, *, batch_size: int, size: int, workers: int = 0, limit: int = 0
    ) -> None:
        manifest.require_split(split)
        self.batch_size, self.size, self.workers = batch_size, size, workers or os.cpu_count() or 1
        self.files = [_open_shard(shard) for shard in manifest.shards if shard.split == split]
        self.groups = [
            (file, group, file.metadata.row_group(group).num_rows)
            for file in self.files
            for group in range(file.metadata.num_row_groups)
        ]
        rows = sum(count for *_, count in self.groups)
        self.rows = min(rows, limit) if limit else rows

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-self.rows // self.batch_size)

    def captions(self) -> Iterator[str]:
        """Yield every caption of the split, without reading pictures."""
        for file in self.files:
            for captions in file.read(columns=["captions"])["captions"].to_pylist():
                yield from captions

    def batches(self, *, seed: int | None = None, epoch: int = 0, skip: int = 0) -> Iterator[Batch]:
        """Yield one epoch's batches, decoded ahead by threads.

        Args:
            seed: shuffle by it and by `epoch`; None keeps the order of the shards.
            skip: leave out so many batches at the start, without reading them.
        """
        ahead = 3
        with ThreadPoolExecutor(self.workers) as pool:
            pending: deque[tuple[list[dict], list]] = deque()
            for rows in self._grouped(self._rows(seed, epoch, skip * self.batch_size)):
                pending.append((rows, [pool.submit(_decode, row["image"], self.size) for row in rows]))
                if len(pending) > ahead:
                    yield _assemble(*pending.popleft())
            while pending:
                yield _assemble(*pending.popleft())

    def _grouped(self, rows: Iterator[dict]) -> Iterator[list[dict]]:
        group: list[dict] = []
        for row in rows:
            group.append(row)
            if len(group) == self.batch_size:
                yield group
                group = []
        if group:
            yield group

    def _rows(self, seed: int | None, epoch: int, skip: int) -> Iterator[dict]:
        rng = None if seed is None else np.random.default_rng([seed, epoch])
        left = self.rows
        for window in self._windows(rng):
            places = [(index, row) for index, (*_, count) in enumerate(window) for row in range(count)]
            if rng is not None:
                rng.shuffle(places)
            places = places[:left]
            left -= len(places)
            wanted, skip = places[skip:], max(0, skip - len(places))
            if wanted:
                tables = [file.read_row_group(group, columns=COLUMNS) for file, group, _ in window]
                for index, row in wanted:
                    yield {name: tables[index][name][int(row)].as_py() for name in COLUMNS}

    def _windows(self, rng: np.random.Generator | None) -> Iterator[list]:
        order = range(len(self.groups)) if rng is None else rng.permutation(len(self.groups))
        window, rows = [], 0
        for index in order:
            window.append(self.groups[index])
            rows += self.groups[index][2]
            if rows >= WINDOW:
                yield window
                window, rows = [], 0
        if window:
            yield window


def _open_shard(shard: Shard) -> pq.ParquetFile:
    fs, path = storage.filesystem(shard.uri)
    if not fs.exists(path):
        raise UserError(f"{shard.uri}: the manifest names this shard, but it is not there; ingest anew")
    if fs.size(path) != shard.bytes:
        raise UserError(f"{shard.uri}: has {fs.size(path)} bytes, not the manifest's {shard.bytes}; ingest anew")
    return pq.ParquetFile(fs.open(path, "rb"))


def _decode(jpeg: bytes, size: int) -> np.ndarray:
    return to_pixels(Image.open(io.BytesIO(jpeg)), size)


def _assemble(rows: list[dict], pixels: list) -> Batch:
    return Batch(
        image_ids=[row["image_id"] for row in rows],
        file_names=[row["file_name"] for row in rows],
        pixels=np.stack([future.result() for future in pixels]),
        captions=[row["captions"] for row in rows],
        jpegs=[row["image"] for row in rows],
    )
