"""Which images there are: under a folder or a bucket's prefix, listed once, or in a list that
somebody wrote."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from model_lib.batch.config import BatchConfig
from model_lib.errors import UserError, first_line
from model_lib.io import storage
from model_lib.io.images import EXTENSIONS

LISTS = {".parquet", ".csv", ".txt"}
"""Endings of files that list images."""
COLUMNS = ("uri", "file", "file_name", "path", "url", "filename", "image")
"""Names of the column that holds a list's images; without one of them it is the first."""


@dataclass(frozen=True, order=True)
class ListedImage:
    """An image as it was listed."""

    uri: str
    bytes: int = -1
    """Of the file; -1: a list does not say."""
    version: str = ""
    """What tells two contents of the file apart, as its store names it; empty: a list does not
    say."""

    @property
    def is_from_list(self) -> bool:
        """Whether somebody's list names it, and not the listing of a folder."""
        return self.bytes < 0


def list_images(config: BatchConfig) -> list[ListedImage]:
    """Return the images that `config.images` stands for, each once, sorted by URI.

    Raises:
        UserError: there is no such folder or list, or no image in it, or a folder below that may
            not be read.
        WorkError: a folder below cannot be read.
    """
    ending = PurePosixPath(config.images).suffix.lower()
    from_list = ending in LISTS and not storage.is_folder(config.images)
    images = _from_list(config.images, ending) if from_list else _below(config)
    found = sorted({image.uri: image for image in images}.values())
    if not found:
        what = (
            "no images in it" if from_list else f"no images in it ({', '.join(sorted(EXTENSIONS))})"
        )
        patterns = "; look at --include and --exclude" if config.include or config.exclude else ""
        raise UserError(f"{config.images}: {what}{patterns}")
    return found


def _below(config: BatchConfig) -> Iterable[ListedImage]:
    if config.images.startswith(("http://", "https://")):
        raise UserError(
            f"{config.images}: a web server lists no folders; name a .txt file with an address a "
            "line"
        )
    fs, path = storage.filesystem(config.images)
    if not storage.is_folder(config.images):
        raise UserError(f"{config.images}: no such folder of images")
    files = storage.find_files(config.images, None if config.recursive else 1)
    output_fs, output = storage.filesystem(config.output)
    is_inside = output_fs == fs and output.startswith(f"{path.rstrip('/')}/")
    for name, info in files.items():
        uri = name if storage.is_local(config.images) else fs.unstrip_protocol(name)
        relative = name.removeprefix(path).lstrip("/")
        if PurePosixPath(name).suffix.lower() not in EXTENSIONS or (
            is_inside and name.startswith(f"{output}/")
        ):
            continue
        if config.include and not _matches(relative, config.include):
            continue
        if config.exclude and _matches(relative, config.exclude):
            continue
        yield ListedImage(
            storage.encodable(uri), int(info["size"]), "/".join(storage.version(info))
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a path, or its last part, matches a pattern such as "*.jpg" or "2024/*"."""
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(PurePosixPath(name).name, pattern)
        for pattern in patterns
    )


def _from_list(uri: str, ending: str) -> Iterable[ListedImage]:
    content = storage.read_bytes(uri)
    try:
        if ending == ".parquet":
            table = pq.ParquetFile(io.BytesIO(content)).read()
            names = table[_column(table.column_names)].to_pylist()
        elif ending == ".csv":
            rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
            place = rows[0].index(_column(rows[0])) if rows else 0
            headed = bool(rows) and rows[0][place] in COLUMNS
            if rows and not headed and len(rows[0]) > 1 and not _may_be_image(rows[0][0]):
                raise ValueError(f"which column is it? head it with one of {', '.join(COLUMNS)}")
            names = [row[place] for row in rows[1 if headed else 0 :] if len(row) > place]
        else:
            names = content.decode("utf-8-sig").splitlines()
    except (pa.ArrowException, ValueError, LookupError, csv.Error, OSError) as error:
        raise UserError(
            f"{uri}: is not a list of images as {ending[1:]}: {first_line(error)}"
        ) from error
    folder = storage.absolute(uri).rpartition("/")[0]
    for name in names:
        text = str(name or "").strip()
        if text:
            yield ListedImage(
                text if "://" in text or text.startswith("/") else storage.join(folder, text)
            )


def _may_be_image(name: str) -> bool:
    """Whether a table's first cell is no heading."""
    return "://" in name or name.startswith("/") or PurePosixPath(name).suffix.lower() in EXTENSIONS


def _column(names: list[str]) -> str:
    return next((name for name in COLUMNS if name in names), names[0])
