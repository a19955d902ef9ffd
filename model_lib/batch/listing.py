"""The images to caption: those of a folder, bucket's prefix or archive, or those of a list."""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import pyarrow.parquet as pq

from model_lib.batch.config import BatchConfig
from model_lib.errors import UserError
from model_lib.io import folders, storage
from model_lib.io.archives import archive_kind
from model_lib.io.errors import input_errors
from model_lib.io.folders import START, left_out_line
from model_lib.io.images import EXTENSIONS, begins_as_image

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
    name: str = ""
    """Its path below the folder, its name in the archive, or what the list calls it."""

    @property
    def is_from_list(self) -> bool:
        """Whether a list names it, rather than the listing of a folder."""
        return self.bytes < 0


def list_images(config: BatchConfig) -> tuple[list[ListedImage], dict[str, int]]:
    """Return the images of `config.images`, each once, sorted by URI, and the counts of what is
    left out, as `folders.list_images`; `UserError` if there are none."""
    patterns = "; look at --include and --exclude" if config.include or config.exclude else ""
    if _is_list(config.images):
        images, left_out = list(_read_list(config.images)), {}
    else:
        listed = folders.list_images(config.images, config.recursive, _chooser(config))
        left_out = listed.left_out
        images = [
            ListedImage(
                storage.encodable(file.uri), file.bytes, file.version, storage.encodable(file.name)
            )
            for file in listed.files
        ]
    distinct = {image.uri: image for image in images}
    if not distinct:
        line = f"; {left_out_line(left_out)}" if left_out else ""
        raise UserError(f"{config.images}: no images in it{line}{patterns}")
    return sorted(distinct.values()), left_out


def _is_list(uri: str) -> bool:
    """Return whether `uri` is a file that lists images, not a folder or an archive."""
    is_web = uri.startswith(("http://", "https://"))
    if is_web and "." not in uri.rpartition("/")[2]:
        message = "a web server lists no folders; name a list with an address a line"
        raise UserError(f"{uri}: {message}")
    if not is_web and storage.is_folder(uri):
        return False
    if not is_web and not storage.exists(uri):
        raise UserError(f"{uri}: no such folder, archive or list of images")
    start = storage.read_bytes(uri, START - 1)
    if start.lstrip().startswith(b"<"):
        raise UserError(f"{uri}: is a page or a drawing, not a list of images")
    if begins_as_image(start):
        raise UserError(f"{uri}: is one image; name its folder, or use captioner caption -f")
    return archive_kind(uri) is None


def _chooser(config: BatchConfig) -> Callable[[str], bool]:
    """Return whether a file of this name in the folder is to be captioned, if it is an image."""
    fs, folder = storage.filesystem(config.images)
    output_fs, output = storage.filesystem(config.output)
    start = f"{folder.rstrip('/')}/"
    holds_output = output_fs == fs and output.startswith(start)
    below = f"{output.removeprefix(start)}/" if holds_output else None

    def is_chosen(name: str) -> bool:
        is_included = not config.include or _matches(name, config.include)
        is_output = below is not None and name.startswith(below)
        return is_included and not is_output and not _matches(name, config.exclude)

    return is_chosen


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a path, or its last part, matches a pattern such as "*.jpg" or "2024/*"."""
    names = path, PurePosixPath(path).name
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _read_list(uri: str) -> Iterator[ListedImage]:
    ending = PurePosixPath(uri).suffix.lower()
    content = storage.read_bytes(uri)
    with input_errors(uri, "a list of images"):
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
            yield ListedImage(name if is_absolute else storage.join(folder, name), name=name)


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
