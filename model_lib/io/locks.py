"""An output folder for one run alone."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from model_lib.errors import WorkError
from model_lib.io import storage
from model_lib.io.errors import store_errors

LOCK = ".lock"


@contextlib.contextmanager
def output_lock(folder: str, is_shared: bool = False) -> Iterator[None]:
    """Make an output folder ready, and lock it against other runs if it is local.

    What a kill left half-written in a local folder is removed, unless the folder is shared with
    workers that may be writing. A bucket has no locks: each of its
    files is written whole, and training stops when it finds another run's checkpoint.

    Raises:
        UserError: it cannot be written to.
        WorkError: another run has locked it.
    """
    storage.require_writable(folder)
    if not storage.is_local(folder):
        yield
        return
    path = storage.filesystem(folder)[1]
    with store_errors(folder, "written"):
        try:
            lock = filelock.FileLock(Path(path, LOCK)).acquire(blocking=False)
        except filelock.Timeout:
            message = "another run is at work there; wait for it, or choose another output"
            raise WorkError(f"{folder}: {message}") from None
    with lock:
        if not is_shared:
            _remove_parts(path)
        yield


def _remove_parts(folder: str) -> None:
    """Remove half-written files, but not in other runs' outputs below."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not Path(parent, name, LOCK).exists()]
        for name in files:
            if name.startswith(storage.PART):
                Path(parent, name).unlink(missing_ok=True)
