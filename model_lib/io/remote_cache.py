"""Local copies of remote files and folders, for what can read local files alone."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import filelock

from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.listings import find_files


@contextlib.contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """Yield a local file with the content of `uri`; a copy of a remote one is removed later."""
    fs, path = storage.filesystem(uri)
    if storage.is_local(uri):
        storage.access(uri, lambda: Path(path).open("rb").close())
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "copy")
        storage.access(uri, lambda: fs.get_file(path, str(copy)))
        yield copy


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yield a local folder with the files of the folder `uri`; copies are removed afterwards."""
    if storage.is_local(uri):
        yield Path(storage.filesystem(uri)[1])
        return
    with tempfile.TemporaryDirectory() as scratch:
        _download(uri, find_files(uri), Path(scratch))
        yield Path(scratch)


def cached_folder(uri: str) -> str:
    """Return a local folder with the files of the folder `uri`, kept in the cache if it is remote.

    The key has the names, sizes and versions of the files, so a changed folder is fetched anew.
    """
    if storage.is_local(uri):
        return storage.filesystem(uri)[1]
    files = sorted(find_files(uri).items())
    if not files:
        raise UserError(f"{uri}: no such folder, or nothing in it")
    listing = [[name, info.get("size"), storage.version(info)] for name, info in files]
    return str(cached([uri, listing], lambda part: _download(uri, dict(files), part)))


def _download(uri: str, names: Iterable[str], target: Path) -> None:
    """Copy files of the remote folder `uri` into `target`."""
    fs, path = storage.filesystem(uri)
    for name in names:
        relative = PurePosixPath(name.removeprefix(path).lstrip("/"))
        if ".." in relative.parts:  # a bucket's key may be anything
            raise UserError(f"{uri}: holds {name}, which leaves the folder; remove it there")
        local = target / relative
        local.parent.mkdir(parents=True, exist_ok=True)
        storage.access(uri, functools.partial(fs.get_file, name, str(local)))


def cached(key: list[Any], fetch: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, `$XDG_CACHE_HOME/captioner`, filled by `fetch` if missing.

    Processes that want the same folder wait for the one that fills it.

    Args:
        key: what determines the folder's content, as JSON.
        fetch: fills an empty folder, which is kept whole or not at all.

    Raises:
        UserError: the cache cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captioner"
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    target, part = cache / name, cache / f".part-{name}"
    if target.exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f".lock-{name}"):
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            if not target.exists():
                part.mkdir()
                try:
                    fetch(part)
                    part.rename(target)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if not str(error.filename).startswith(str(cache.parent)):
            raise
        problem = f"the cache of remote files cannot be written ({error.strerror})"
        raise UserError(f"{cache}: {problem}; XDG_CACHE_HOME moves it") from error
    return target
