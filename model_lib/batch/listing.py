"""The images to caption: those in a folder or below a bucket's prefix, or those of a list."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import pyarrow.parquet as pq

from model_lib.batch.config import BatchConfig
from model_lib.errors import UserError
from model_lib.io import storage
from model_lib.io.errors import input_errors
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
    """Size of the file; -1: unknown, as it is from a list."""
    version: str = ""
    """Changes with the content of the file, by its store; empty: unknown."""

    @property
    def is_from_list(self) -> bool:
        """Whether a list names it, rather than the listing of a folder."""
        return self.bytes < 0


def list_images(config: BatchConfig) -> list[ListedImage]:
    """Return the images of the folder or list `config.images`, each once, sorted by URI."""
    ending = PurePosixPath(config.images).suffix.lower()
    is_list = ending in LISTS and not storage.is_folder(config.images)
    images = _read_list(config.images, ending) if is_list else _find_images(config)
    distinct = {image.uri: image for image in images}
    if not distinct:
        endings = "" if is_list else f" ({', '.join(sorted(EXTENSIONS))})"
        patterns = "; look at --include and --exclude" if config.include or config.exclude else ""
        raise UserError(f"{config.images}: no images in it{endings}{patterns}")
    return sorted(distinct.values())


def _find_images(config: BatchConfig) -> Iterator[ListedImage]:
    if config.images.startswith(("http://", "https://")):
        message = "a web server lists no folders; name a .txt file with an address a line"
        raise UserError(f"{config.images}: {message}")
    if not storage.is_folder(config.images):
        raise UserError(f"{config.images}: no such folder of images")
    fs, folder = storage.filesystem(config.images)
    output_fs, output = storage.filesystem(config.output)
    holds_output = output_fs == fs and output.startswith(f"{folder.rstrip('/')}/")
    for path, info in storage.find_files(config.images, config.recursive).items():
        is_image = PurePosixPath(path).suffix.lower() in EXTENSIONS
        relative = path.removeprefix(folder).lstrip("/")
        is_chosen = not config.include or _matches(relative, config.include)
        is_output = holds_output and path.startswith(f"{output}/")
        if not is_image or not is_chosen or is_output or _matches(relative, config.exclude):
            continue
        uri = path if storage.is_local(config.images) else fs.unstrip_protocol(path)
        version = "/".join(storage.version(info))
        yield ListedImage(storage.encodable(uri), int(info["size"]), version)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a path, or its last part, matches a pattern such as "*.jpg" or "2024/*"."""
    names = path, PurePosixPath(path).name
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _read_list(uri: str, ending: str) -> Iterator[ListedImage]:
    content = storage.read_bytes(uri)
    with input_errors(uri, f"a list of images as {ending[1:]}"):
        if ending == ".parquet":
            table = pq.ParquetFile(io.BytesIO(content)).read()
            names = table[_column(table.column_names)].to_pylist()
        elif ending == ".csv":
            names = _csv_names(content.decode("utf-8-sig"))
        else:
            names = content.decode("utf-8-sig").splitlines()
    folder = storage.absolute(uri).rpartition("/")[0]
    for cell in names:
        name = str(cell or "").strip()
        if name:
            is_absolute = "://" in name or name.startswith("/")
            yield ListedImage(name if is_absolute else storage.join(folder, name))


def _csv_names(text: str) -> list[str]:
    rows = list(csv.reader(io.StringIO(text))) or [[""]]
    header = rows[0]
    index = header.index(_column(header))
    has_header = header[index] in COLUMNS
    if not has_header and len(header) > 1 and not _may_be_image(header[0]):
        raise ValueError(f"which column is it? head it with one of {', '.join(COLUMNS)}")
    return [row[index] for row in rows[has_header:] if len(row) > index]


def _may_be_image(name: str) -> bool:
    """Return whether a table's first cell is an image, not a heading."""
    return "://" in name or name.startswith("/") or PurePosixPath(name).suffix.lower() in EXTENSIONS


def _column(names: list[str]) -> str:
    return next((name for name in COLUMNS if name in names), names[0])
