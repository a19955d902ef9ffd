"""Fetching a data set's archives: resumed where they broke off, and checked before they are kept.

captioner download coco2017 --output coco
captioner download spice --output spice
"""

import contextlib
import hashlib
import http.client
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from model_lib.errors import UserError, WorkError
from model_lib.io import storage
from model_lib.io.archives import open_archive
from model_lib.io.errors import is_transient
from model_lib.io.locks import output_lock
from model_lib.options import StageConfig, option
from model_lib.progress import Progress

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
"""Each data set's archives, with their MD5 where their owner publishes it."""
CHUNK, MEGABYTE = 2**20, 1_000_000
TIMEOUT = 60.0
"""Seconds after which a silent server counts as gone."""


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(StageConfig):
    """Fetch COCO's archives, which ingest reads as they are, or SPICE's models.

    After an interruption, the same command resumes.

    captioner download coco2017 --output coco && captioner ingest --dataset coco --output data
    """

    dataset: Annotated[Literal["coco2017", "spice"], tyro.conf.Positional]
    """coco2017, 19 GB of images and their captions; or spice, 0.5 GB of models for evaluate
    --spice."""
    output: str = option(shapes=False)
    """Folder or URI for the archives."""
    base: str | None = None
    """Address of another server, such as a mirror; checksums are known for COCO's own alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is not None and not self.base.startswith(("http://", "https://")):
            raise UserError(f"base {self.base}: is not an http(s) address")


@dataclass(frozen=True)
class Archive:
    """A fetched archive."""

    uri: str
    bytes: int
    files: int


def download(config: DownloadConfig) -> list[Archive]:
    """Fetch and check each archive that is not there yet.

    Raises:
        UserError: the server does not have it, or the output cannot be written.
        WorkError: the server failed, or its archive is damaged.
    """
    server = config.base or SERVERS[config.dataset]
    with output_lock(config.output):
        archives = []
        for path, md5 in ARCHIVES[config.dataset].items():
            target = storage.join(config.output, Path(path).name)
            known_md5 = md5 if config.base is None else None
            archives.append(fetch(storage.join(server, path), target, known_md5))
        return archives


def fetch(url: str, target: str, md5: str | None) -> Archive:
    """Fetch a zip archive to `target`, unless it is there; check its `md5` if it is known."""
    if not storage.exists(target):
        path = Path(storage.filesystem(target)[1])
        with tempfile.TemporaryDirectory() as scratch:
            folder = path.parent if storage.is_local(target) else Path(scratch)
            part = _fetch_part(url, folder, path.name)
            _check(url, part, md5)
            with storage.atomic_file(target) as copy:
                part.replace(copy)
    return Archive(target, storage.file_size(target), len(open_archive(target).sizes))


def _fetch_part(url: str, folder: Path, name: str) -> Path:
    """Fetch a file to a part in a local folder, resuming an earlier process's part."""
    size, version = storage.access(url, lambda: _head(url))
    part = folder / f"{name}.{version}.part"
    for other in folder.glob(f"{name}.*.part"):
        if other != part:
            other.unlink()  # of another version
    part.touch()
    storage.require_room(str(folder), size - part.stat().st_size, name)
    with Progress(f"download {name}", size // MEGABYTE, "MB") as progress:
        progress.resume(part.stat().st_size // MEGABYTE)
        while part.stat().st_size < size:
            storage.access(url, lambda: _receive(url, part, progress))
    return part


def _open(url: str, method: str = "GET", **headers: str) -> Any:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if is_transient(error):
            raise
        answer = f"{error.code} {error.reason}"
        raise UserError(f"{url}: the server answers {answer}; is --base right?") from error


def _head(url: str) -> tuple[int, str]:
    """Return a file's size, and a digest that changes with its content."""
    with _open(url, "HEAD") as response:
        headers = response.headers
    if "Content-Length" not in headers:
        raise UserError(f"{url}: the server does not say how large it is; use another --base")
    version = [headers.get(key) for key in ("Content-Length", "ETag", "Last-Modified")]
    digest = hashlib.sha256(repr(version).encode()).hexdigest()[:12]
    return int(headers["Content-Length"]), digest


def _receive(url: str, part: Path, progress: Progress) -> None:
    """Append the missing bytes until the connection ends; raise if none came."""
    start = part.stat().st_size
    with (
        _open(url, Range=f"bytes={start}-") as response,
        # A server that knows no ranges sends the file from its start.
        part.open("ab" if response.status == 206 else "wb") as file,
        # What an interrupted answer lacks is requested next.
        contextlib.suppress(ConnectionError, TimeoutError, http.client.HTTPException),
    ):
        while chunk := response.read(CHUNK):
            file.write(chunk)
            progress.advance(file.tell() // MEGABYTE - progress.done)
    if part.stat().st_size <= start:
        raise ConnectionError("the server sent nothing more")


def _check(url: str, part: Path, md5: str | None) -> None:
    """Remove a damaged part and raise `WorkError`; its CRCs are checked when it is used."""
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    try:
        if md5 is not None and digest != md5:
            raise UserError(f"its MD5 is {digest} and not {md5}")
        open_archive(str(part))
    except UserError as error:
        part.unlink()
        remedy = "start again, or use another --base"
        raise WorkError(f"{url}: came damaged, {error}; {remedy}") from error
