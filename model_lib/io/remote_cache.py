"""Folders of other stores: what is in them, and copies of their files here, for what can read local
files alone."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from model_lib.errors import UserError, WorkError, first_line
from model_lib.io import storage


def find_files(uri: str, depth: int | None = None) -> dict[str, dict[str, Any]]:
    """Return all files in and below the folder `uri`, by their paths on its file system, and what
    is known of each.

    Args:
        uri: path or URI.
        depth: how many folders deep; None: all.

    Raises:
        UserError: a part of it may not be listed.
        WorkError: a part of it cannot be listed; fsspec would leave that out without a word.
    """
    fs, path = storage.filesystem(uri)
    try:
        return storage.retry_remote(uri, lambda: _find(fs, path, depth))
    except OSError as error:
        where = storage.encodable(str(error.filename or uri))
        said = (
            f"{where}: cannot be listed: {error.strerror or first_line(error)}; let it be read, "
            "and start again"
        )
        raise (UserError if isinstance(error, PermissionError) else WorkError)(said) from error


def _find(fs: AbstractFileSystem, path: str, depth: int | None) -> dict[str, dict[str, Any]]:
    """Return all files below a folder, so many folders deep, or raise what one of the folders
    cannot be listed for.

    A bucket's driver lists all at once. Others go from folder to folder in fsspec's way, which
    passes over those that fail: their files would count as gone.
    """
    own = (
        type(fs)._find is not AsyncFileSystem._find
        if fs.async_impl
        else type(fs).find is not AbstractFileSystem.find
    )
    if own:
        return dict(fs.find(path, maxdepth=depth, detail=True))
    found, folders, linked = {}, [(path, 1)], {os.path.realpath(path)}
    while folders:
        folder, level = folders.pop()
        try:
            infos = fs.ls(folder, detail=True)
        except FileNotFoundError:  # removed since the folder above was listed
            continue
        for info in sorted(
            infos, key=lambda one: str(one["name"])
        ):  # of two links to one folder always the same
            if info.get("islink"):
                info = _followed(info)
                if info["type"] == "directory":
                    if info["destination"] in linked or Path(folder).resolve().is_relative_to(
                        info["destination"]
                    ):
                        continue  # a circle
                    linked.add(info["destination"])
            if info["type"] != "directory":
                found[info["name"]] = info
            elif level != depth:
                folders.append((info["name"], level + 1))
    return found


def _followed(info: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a link's target, by the link's name; of a broken link, what is known
    of itself."""
    try:
        target = os.stat(info["name"])
    except OSError:
        return info
    kind = "directory" if stat.S_ISDIR(target.st_mode) else "file"
    real = os.path.realpath(info["name"])
    return {
        **info,
        "type": kind,
        "size": target.st_size,
        "mtime": target.st_mtime,
        "destination": real,
    }


def _fetch(uri: str, names: Iterable[str], target: Path) -> None:
    """Copy the files `names` of the remote folder `uri` into `target`; `UserError` if one would
    leave that."""
    fs, path = storage.filesystem(uri)
    for name in names:
        below = PurePosixPath(name.removeprefix(path).lstrip("/"))
        if ".." in below.parts:  # a key of a bucket may be anything
            raise UserError(f"{uri}: holds {name}, which leaves the folder; remove it there")
        local = target / below
        local.parent.mkdir(parents=True, exist_ok=True)
        storage.retry_remote(uri, functools.partial(fs.get_file, name, str(local)))


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yield a local folder with the content of the folder `uri`; a copy of a remote one is gone
    after the body."""
    if storage.is_local(uri):
        yield Path(storage.filesystem(uri)[1])
        return
    with tempfile.TemporaryDirectory() as scratch:
        _fetch(uri, find_files(uri), Path(scratch))
        yield Path(scratch)


@contextlib.contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """Yield a local file with the content of `uri`; a copy of a remote one is gone after the body.

    Raises:
        UserError: it is missing, a folder or not readable.
        WorkError: its store failed, and went on to for as long as it was asked again.
    """
    fs, path = storage.filesystem(uri)
    if storage.is_local(uri):
        with storage.reading(uri), Path(path).open("rb"):
            pass
        yield Path(path)
        return
    handle, copy = tempfile.mkstemp()
    os.close(handle)
    try:
        with storage.reading(uri):
            storage.retry_remote(uri, lambda: fs.get_file(path, copy))
        yield Path(copy)
    finally:
        os.unlink(copy)


def cached_folder(uri: str) -> str:
    """Return a local folder with the content of the folder `uri`, fetched into the cache unless it
    is local.

    It is kept by the names, sizes and versions of the remote files, so a changed remote folder is
    fetched anew.
    """
    if storage.is_local(uri):
        return storage.filesystem(uri)[1]
    files = sorted(find_files(uri).items())
    if not files:
        raise UserError(f"{uri}: no such folder, or nothing in it")
    listing = [[name, info.get("size"), storage.version(info)] for name, info in files]
    return str(cached([uri, listing], lambda part: _fetch(uri, [name for name, _ in files], part)))


def cached(identity: list[Any], fetch: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, `$XDG_CACHE_HOME/captioner`, filled by `fetch` unless it is
    there.

    Processes that want the same folder wait for the one that fetches it.

    Args:
        identity: what the folder's content follows from, as JSON.
        fetch: fills the folder that it is given, which is kept whole or not at all.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captioner"
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    target = cache / key
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with Path(cache, f".lock-{key}").open("w") as lock:
        with contextlib.suppress(
            OSError
        ):  # a network's disk without locks: each fetches for itself
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in cache.glob(f".part-{key}-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        if target.exists():
            return target
        part = Path(tempfile.mkdtemp(prefix=f".part-{key}-", dir=cache))
        try:
            fetch(part)
            with contextlib.suppress(OSError):  # without locks another may have been first
                part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target
