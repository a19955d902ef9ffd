"""The files of a folder or of a bucket's prefix, listed as a stream, however many there are.

S3 and Google Cloud Storage list a thousand objects a request. Their drivers keep a whole listing in
memory, and gcsfs ends it after ten million objects without a word; so pages are requested here,
those of several prefixes at once, each retried on its own.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

import fsspec

from model_lib.io import storage
from model_lib.io.errors import store_errors
from model_lib.io.prefetch import prefetch_map

File = tuple[str, dict[str, Any]]
"""A path on its file system, and its info: size, and what changes with its content."""
REQUESTS = 16
"""Pages that are requested at once."""
LEVELS = 3
"""Levels of folders that are searched for so many prefixes."""
WIDEST = 32
"""Pages of one level; a wider one, millions of folders perhaps, is listed without its folders."""
FIELDS = "items(name,size,etag,generation),prefixes,nextPageToken"
"""What Google's pages are to hold: the rest of them is ten times as long."""


class Page(NamedTuple):
    """A part of a listing."""

    files: list[File]
    folders: list[str]
    """Prefixes, if they are listed apart."""
    token: str | None
    """For the next page; None: this is the last."""


def find_files(uri: str, recursive: bool = True) -> dict[str, dict[str, Any]]:
    """Return the files of `list_files`, sorted by path."""
    return dict(sorted(list_files(uri, recursive), key=lambda file: file[0]))


def list_files(uri: str, recursive: bool = True) -> Iterator[File]:
    """Yield the files in the folder `uri`, in any order.

    Links are followed, and a folder that several lead to is listed once. A part that cannot be
    listed is an error.

    Raises:
        UserError: it may not be listed.
        WorkError: the store failed.
    """
    fs, path = storage.filesystem(uri)
    if storage.is_local(uri):
        with store_errors(uri, "listed"):
            yield from _walk(path, recursive)
    elif hasattr(fs, "call_s3") or "gs" in fs.protocol:
        bucket, key, _ = fs.split_path(path)
        prefix = f"{key.rstrip('/')}/" if key else ""
        request = _request_s3 if hasattr(fs, "call_s3") else _request_gcs

        def page(delimiter: str, prefix: str, token: str | None = None) -> Page:
            action = partial(request, fs, bucket, delimiter, prefix, token)
            return storage.access(uri, action, doing="listed")

        yield from _pages(page, prefix, recursive)
    else:  # fsspec would silently leave out what it cannot list
        options = {"maxdepth": None if recursive else 1, "detail": True, "on_error": "raise"}
        yield from storage.access(uri, lambda: fs.find(path, **options), doing="listed").items()


def _walk(root: str, recursive: bool) -> Iterator[File]:
    folders, seen = [root], set()
    while folders:
        folder = folders.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        below = []
        try:
            entries = os.scandir(folder)
        except FileNotFoundError:  # removed since the folder above was listed
            continue
        with entries:
            for entry in entries:
                try:
                    try:
                        status = entry.stat()
                        is_folder = entry.is_dir()
                    except OSError:  # a link that leads nowhere
                        status, is_folder = entry.stat(follow_symlinks=False), False
                except FileNotFoundError:  # removed since
                    continue
                if is_folder:
                    below.append(entry.path)
                else:
                    yield entry.path, {"size": status.st_size, "mtime": status.st_mtime}
        if recursive:
            folders += sorted(below, reverse=True)


def _request_s3(
    fs: fsspec.AbstractFileSystem, bucket: str, delimiter: str, prefix: str, token: str | None
) -> Page:
    options = {"ContinuationToken": token} if token else {}
    options |= {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
    answer = fs.call_s3("list_objects_v2", **options)
    items, folders = answer.get("Contents", []), answer.get("CommonPrefixes", [])
    return Page(
        [(f"{bucket}/{item['Key']}", {**item, "size": item["Size"]}) for item in items],
        [folder["Prefix"] for folder in folders],
        answer.get("NextContinuationToken"),
    )


def _request_gcs(
    fs: fsspec.AbstractFileSystem, bucket: str, delimiter: str, prefix: str, token: str | None
) -> Page:
    options = {"prefix": prefix or None, "delimiter": delimiter or None, "pageToken": token}
    answer = fs.call("GET", "b/{}/o", bucket, json_out=True, fields=FIELDS, **options)
    items = answer.get("items", [])
    return Page(
        [(f"{bucket}/{item['name']}", {**item, "size": int(item["size"])}) for item in items],
        answer.get("prefixes", []),
        answer.get("nextPageToken"),
    )


def _pages(page: Callable[..., Page], prefix: str, recursive: bool) -> Iterator[File]:
    """Yield the files below a prefix by `page(delimiter, prefix, token)`.

    The first levels tell prefixes that are listed at the same time.
    """
    whole: list[str] = []
    level = [prefix]
    for _ in range(LEVELS if recursive else 0):
        if len(whole) + len(level) >= REQUESTS:
            break
        below: list[str] = []
        listed = prefetch_map(partial(_level, page), level, REQUESTS, REQUESTS)
        for folder, part in zip(level, listed, strict=True):
            if part is None:
                whole.append(folder)
            else:
                below += part.folders
                yield from part.files
        level = below
    todo = deque[tuple[str, str | None]]((folder, None) for folder in [*whole, *level])
    running: dict[Future[Page], str] = {}
    pool = ThreadPoolExecutor(REQUESTS)
    try:
        while todo or running:
            while todo and len(running) < REQUESTS:
                folder, token = todo.popleft()
                future = pool.submit(page, "" if recursive else "/", folder, token)
                running[future] = folder
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                folder, part = running.pop(future), future.result()
                if part.token:
                    todo.appendleft((folder, part.token))
                yield from part.files
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _level(page: Callable[..., Page], prefix: str) -> Page | None:
    """Return the files and folders directly in a prefix; None if these are too many."""
    files: list[File] = []
    folders: list[str] = []
    token = None
    for _ in range(WIDEST):
        part = page("/", prefix, token)
        files += part.files
        folders += part.folders
        token = part.token
        if not token:
            return Page(files, folders, None)
    return None
