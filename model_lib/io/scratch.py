"""Tables on disk for what may not fit into memory, in a file that ends with the process.

SQLite keeps what fits in `CACHE` KiB in memory and the rest in a file without a name in
`TMPDIR`, or /var/tmp.
"""

import contextlib
import sqlite3
from collections.abc import Iterator

from model_lib.errors import WorkError

CACHE = 64 * 1024
"""KiB of a table that are in memory."""


def scratch_database() -> sqlite3.Connection:
    """Return an empty database; one thread at a time may use it."""
    database = sqlite3.connect("", check_same_thread=False)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute(f"PRAGMA cache_size = -{CACHE}")
    return database


@contextlib.contextmanager
def scratch_errors() -> Iterator[None]:
    """Raise `WorkError` if there is no room for a table."""
    try:
        yield
    except sqlite3.OperationalError as error:
        remedy = "make room there, or let TMPDIR name another folder"
        raise WorkError(f"the folder of temporary files: {error}; {remedy}") from error


class DiskSet:
    """A set of integers or strings."""

    def __init__(self) -> None:
        self._database = scratch_database()
        self._database.execute("CREATE TABLE seen (key PRIMARY KEY) WITHOUT ROWID")

    def add(self, key: int | str) -> bool:
        """Add a key; return whether it is a new one."""
        with scratch_errors():
            cursor = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,))
            return cursor.rowcount == 1
