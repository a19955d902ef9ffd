"""What a killed ingest had finished: a record beside the shards for each whole one, so that none is
made twice.

Records are kept under a key of the options that shape the data and of everything listed; other
input finds none.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from model_lib.data.shards import Shard
from model_lib.errors import UserError
from model_lib.ingest.annotations import Rejected
from model_lib.io import storage
from model_lib.io.validation import read_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A whole shard, and what came of the list up to its end."""

    shard: Shard
    end: int
    """Number of the split's first entry that is not in it."""
    content: str
    """Digest of its rows."""
    rejected: list[Rejected]
    """Entries between the last shard's end and this one's that could not be used."""


class Journal:
    """The records of one ingest.

    Args:
        output: folder or URI of the shards.
        key: of what is ingested, and how.
    """

    def __init__(self, output: str, key: str) -> None:
        self.output = output
        self.folder = storage.join(output, ".journal")
        self.records = storage.join(self.folder, key)

    def write(self, finished: Finished) -> None:
        storage.write_json(
            storage.join(self.records, f"{finished.shard.uri}.json"), asdict(finished)
        )

    def read(self, split: str, entries: int) -> Iterator[Finished]:
        """Yield the records of a split's shards, from the first on, for as long as they and their
        shards are whole.

        Args:
            split: whose shards.
            entries: how many are listed in it.
        """
        number, start = 0, 0
        while storage.exists(
            uri := storage.join(self.records, f"{shard_name(split, number)}.json")
        ):
            finished = self._record(uri)
            if (
                finished is None
                or not start < finished.end <= entries
                or not self._whole(finished.shard)
            ):
                return
            if (finished.shard.uri, finished.shard.split) != (shard_name(split, number), split):
                return
            yield finished
            number, start = number + 1, finished.end

    def _record(self, uri: str) -> Finished | None:
        """Return a record, or nothing if it is not one: what it says was finished is made again."""
        try:
            return read_record(uri, Finished, "a record of this ingest")
        except UserError as error:
            log.warning("%s; making that shard again", error)
            return None

    def _whole(self, shard: Shard) -> bool:
        """Whether the shard is the recorded one; a remote one is taken at its size's word."""
        uri = storage.join(self.output, shard.uri)
        if not storage.exists(uri):
            return False
        if storage.is_local(uri):
            return sha256_of(Path(storage.filesystem(uri)[1])) == shard.sha256
        return storage.file_size(uri) == shard.bytes

    def close(self) -> None:
        """Remove all records: the manifest says it all."""
        storage.remove(self.folder)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.parquet"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
