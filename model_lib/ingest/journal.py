"""Finished shards of an ingest, recorded beside them, so that a restart does not write them again.

Records are kept under a key of the options that shape the data and of everything listed; other
input has other records.
"""

import hashlib
import logging
from collections.abc import Iterator
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
    """A whole shard, and the rest of the listing up to its end."""

    shard: Shard
    end: int
    """Number of the split's first entry that is not in it."""
    content: str
    """Digest of its rows."""
    rejected: list[Rejected]
    """Entries between the last shard's end and this one's that could not be used."""


class Journal:
    """The records of one ingest into `output`; `key` is of its input and options."""

    def __init__(self, output: str, key: str) -> None:
        self.output = output
        self.folder = storage.join(output, ".journal")
        self.records = storage.join(self.folder, key)

    def write(self, finished: Finished) -> None:
        storage.write_json(self._uri(finished.shard.uri), asdict(finished))

    def read(self, split: str, entries: int) -> Iterator[Finished]:
        """Yield the records of a split of so many entries, up to the first that is not whole."""
        number, start = 0, 0
        while storage.exists(uri := self._uri(name := shard_name(split, number))):
            try:
                finished = read_record(uri, Finished, "a record of this ingest")
            except UserError as error:
                log.warning("%s; its shard is written again", error)
                return
            shard = finished.shard
            is_next = (shard.uri, shard.split) == (name, split) and start < finished.end <= entries
            if not is_next or not self._is_whole(shard):
                return
            yield finished
            number, start = number + 1, finished.end

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

    def close(self) -> None:
        """Remove all records: the manifest takes their place."""
        storage.remove(self.folder)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.parquet"


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a local file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
