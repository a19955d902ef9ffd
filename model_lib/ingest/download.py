"""Fetching a data set's archives: resumed where they broke off, and checked before they count as
there.

captioner download coco2017 --output coco
captioner download spice --output spice
"""

import contextlib
import hashlib
import http.client
import json
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from model_lib.errors import UserError, WorkError, first_line
from model_lib.ingest.config import DownloadConfig
from model_lib.ingest.image_source import open_zip
from model_lib.io import storage
from model_lib.io.errors import is_transient
from model_lib.io.locks import output_lock
from model_lib.io.retries import retry
from model_lib.progress import Progress
from model_lib.scores.spice import MODELS

SERVERS = {
    "coco2017": "http://images.cocodataset.org",
    "spice": "https://nlp.stanford.edu/software",
}
ARCHIVES: dict[str, dict[str, str | None]] = {
    "coco2017": {
        "annotations/annotations_trainval2017.zip": "f4bbac642086de4f52a3fdda2de5fa2c",
        "zips/val2017.zip": "442b8da7639aecaf257c1dceb8ba8c80",
        "zips/train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2",
    },
    "spice": {"stanford-corenlp-full-2015-12-09.zip": None},
}
"""COCO 2017's captions and their images, and the models of SPICE; the MD5 of each archive whose
owner tells it."""
CHUNK = 2**20
MEGABYTE = 1_000_000
TIMEOUT = 60.0
"""Seconds after which a silent server counts as gone."""

_ANSWER = TypeVar("_ANSWER")


@dataclass(frozen=True)
class Fetched:
    """An archive that is there now."""

    uri: str
    bytes: int
    files: int


def download(config: DownloadConfig) -> list[Fetched]:
    """Fetch and check each archive that is not there yet.

    Raises:
        UserError: the server does not have it, or the output cannot be written.
        WorkError: the server failed for long, or what it sent is damaged.
    """
    with output_lock(config.output):
        fetched = []
        for place, md5 in ARCHIVES[config.dataset].items():
            url = f"{(config.base or SERVERS[config.dataset]).rstrip('/')}/{place}"
            target = storage.join(config.output, place.rpartition("/")[2])
            fetched.append(fetch(url, target, md5 if config.base is None else None))
        if config.dataset == "spice":
            for archive in fetched:
                _take_out(archive.uri, config.output)
        return fetched


def _take_out(archive: str, output: str) -> None:
    """Put SPICE's models, which Java wants as files, beside their archive."""
    with open_zip(archive) as zipped:
        members = {Path(name).name: name for name in zipped.namelist()}
        for name in MODELS:
            if name not in members:
                raise WorkError(f"{archive}: has no {name} in it; use another --base")
            uri = storage.join(output, name)
            with (
                zipped.open(members[name]) as inside,
                storage.atomic_file(uri) as part,
                Path(part).open("wb") as file,
            ):
                shutil.copyfileobj(inside, file)


def fetch(url: str, target: str, md5: str | None) -> Fetched:
    """Fetch one zip archive to `target`, unless it is there in the server's size; `md5` is checked
    if it is given."""
    server = _retrying(url, lambda: _head(url))
    if storage.exists(target) and storage.file_size(target) == server.size:
        return Fetched(target, server.size, _files(target))
    with (
        _sink(target, server) as sink,
        Progress(f"download {target}", server.size // MEGABYTE, "MB") as progress,
    ):
        progress.resume(sink.size // MEGABYTE)
        while sink.size < server.size:
            _retrying(url, lambda: _receive(url, server, sink, progress))
        _check(url, server, sink, md5)
    return Fetched(target, server.size, _files(target))


@dataclass(frozen=True)
class _Server:
    """What a server says of a file."""

    size: int
    version: str
    """Its ETag or date: a part of another version is of no use."""


class _Sink:
    """Where bytes go, with their digest: a file, and what of it was there before."""

    def __init__(self, file: IO[bytes], before: Iterator[bytes]) -> None:
        self.file, self.size, self.md5 = file, 0, hashlib.md5(usedforsecurity=False)
        for chunk in before:
            self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.md5.update(chunk)

    def write(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self._count(chunk)


def _retrying(url: str, action: Callable[[], _ANSWER]) -> _ANSWER:
    """Return what `action` asks the server, tried again for some minutes; `WorkError` if it fails
    for longer."""
    try:
        return retry(url, action)
    except (
        urllib.error.URLError,
        ConnectionError,
        TimeoutError,
        http.client.HTTPException,
    ) as error:
        raise WorkError(f"{url}: fails: {first_line(error)}; start again to go on") from error


def _open(url: str, **options: Any) -> Any:
    """Ask a server; `UserError` for what will not pass."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, **options), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if is_transient(error):
            raise
        raise UserError(
            f"{url}: the server answers {error.code} {error.reason}; is --base right?"
        ) from error


def _head(url: str) -> _Server:
    with _open(url, method="HEAD") as answer:
        headers = answer.headers
        if "Content-Length" not in headers:
            raise UserError(f"{url}: the server does not say how large it is; use another --base")
        return _Server(
            int(headers["Content-Length"]),
            headers.get("ETag") or headers.get("Last-Modified") or "",
        )


def _receive(url: str, server: _Server, sink: _Sink, progress: Progress) -> None:
    """Ask for what is missing and write it, as far as it comes; raise if nothing came."""
    began = sink.size
    headers = {"Range": f"bytes={began}-"}
    with _open(url, headers=headers) as answer:
        whole = answer.status == 200
        if not whole and not answer.headers.get("Content-Range", "").startswith(f"bytes {began}-"):
            raise WorkError(
                f"{url}: the server sent another range than bytes {began}-; use another --base"
            )
        left = began if whole else 0  # a server that knows no ranges sends what is there already
        try:
            while sink.size < server.size and (
                chunk := answer.read(min(CHUNK, left or server.size - sink.size))
            ):
                if left:
                    left -= len(chunk)
                    continue
                sink.write(chunk)
                progress.advance(sink.size // MEGABYTE - progress.done)
        except (OSError, http.client.HTTPException):
            if sink.size == began:
                raise  # else the rest is asked for at once, with new tries
        if sink.size == began:
            raise ConnectionError("the server sent nothing")


@contextlib.contextmanager
def _sink(target: str, server: _Server) -> Iterator[_Sink]:
    """Yield where an archive goes; it is at `target` only after the body."""
    fs, path = storage.filesystem(target)
    if not storage.is_local(target):
        file = fs.open(path, "wb")
        try:
            yield _Sink(file, iter(()))
        except BaseException:
            file.discard()  # closed, it would be there in part
            raise
        file.close()
        try:
            _files(target)
        except UserError as error:
            storage.remove(target)
            raise WorkError(str(error)) from error
        return
    part, about = Path(f"{path}.part"), Path(f"{path}.part.json")
    asked = {"size": server.size, "version": server.version}
    if not about.exists() or about.read_bytes() != json.dumps(asked).encode():
        part.unlink(missing_ok=True)
        about.write_text(json.dumps(asked))
    part.touch()
    storage.require_room(str(part.parent), server.size - part.stat().st_size, target)
    with part.open("r+b") as file:
        sink = _Sink(file, iter(lambda: file.read(CHUNK), b""))
        try:
            yield sink
            file.flush()
            _list(zipfile.ZipFile(file))
        except (_Damaged, zipfile.BadZipFile) as error:
            part.unlink()
            said = f"is not a whole zip archive ({error}); start again, or use another --base"
            raise WorkError(
                str(error) if isinstance(error, _Damaged) else f"{target}: {said}"
            ) from error
    part.replace(path)
    about.unlink()


class _Damaged(WorkError):
    """What came is not what the server has: none of it is kept."""


def _check(url: str, server: _Server, sink: _Sink, md5: str | None) -> None:
    """Raise `WorkError` unless all of the archive came."""
    if sink.size != server.size:
        raise _Damaged(f"{url}: {sink.size:,} bytes came instead of {server.size:,}; start again")
    if md5 is not None and sink.md5.hexdigest() != md5:
        raise _Damaged(
            f"{url}: came damaged, its MD5 is {sink.md5.hexdigest()} and not {md5}; start again"
        )


def _list(archive: zipfile.ZipFile) -> int:
    """Return how many files the archive's directory lists, each with its CRC; images are checked
    when read."""
    infos = archive.infolist()
    if not infos or any(not 0 <= info.CRC < 2**32 for info in infos):
        raise zipfile.BadZipFile("its directory lists no files")
    return sum(not info.is_dir() for info in infos)


def _files(target: str) -> int:
    with open_zip(target) as archive:
        return _list(archive)
