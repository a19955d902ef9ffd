"""Finished shards of an ingest, recorded beside them, so that a restart does not write them again.

Records are kept under a key of the options that shape the data and of everything listed; other
input has other records.
"""

import hashlib
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from model_lib.data.shards import Shard
from model_lib.errors import UserError
from model_lib.ingest.listing import Rejected
from model_lib.io import storage
from model_lib.io.validation import read_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What became of a part of the listing."""

    shard: Shard | None
    """None: no image of it can be used."""
    content: str
    """Digest of its rows."""
    rejected: list[Rejected]
    """Entries that could not be used."""


class Journal:
    """The records of one ingest into `output`; `key` is of its input and options."""

    def __init__(self, output: str, key: str) -> None:
        self.output = output
        self.folder = storage.join(output, ".journal")
        self.records = storage.join(self.folder, key)

    def write(self, name: str, finished: Finished) -> None:
        storage.write_json(self._uri(name), asdict(finished))

    def read(self, name: str) -> Finished | None:
        """Return the record of a shard; None if there is none, or the shard is not whole."""
        uri = self._uri(name)
        if not storage.exists(uri):
            return None
        try:
            finished = read_record(uri, Finished, "a record of this ingest")
        except UserError as error:
            log.warning("%s; its shard is written again", error)
            return None
        shard = finished.shard
        if shard is not None and (shard.uri != name or not self._is_whole(shard)):
            return None
        return finished

    def _uri(self, shard: str) -> str:
        return storage.join(self.records, f"{shard}.json")

    def _is_whole(self, shard: Shard) -> bool:
        """Return whether a shard is the recorded one; of remote ones only sizes are compared."""
        uri = storage.join(self.output, shard.uri)
        if not storage.exists(uri):
            return False
        if storage.is_local(uri):
            return sha256_of(storage.filesystem(uri)[1]) == shard.sha256
        return storage.file_size(uri) == shard.bytes

    def close(self, is_shared: bool = False) -> None:
        """Remove all records: the manifest takes their place. If they are shared, leave a mark for
        the other workers of this pipeline run."""
        storage.remove(self.folder)
        if is_shared:
            storage.write_bytes(self._closed(), b"")

    def is_closed(self) -> bool:
        """Return whether another worker of this pipeline run has closed it."""
        return storage.exists(self._closed())

    def _closed(self) -> str:
        return storage.join(self.folder, f"closed-{os.environ.get('KFP_RUN_ID', '')}")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.parquet"


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a local file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
