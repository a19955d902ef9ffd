"""The images to caption: those of a folder, bucket's prefix or archive, or those of a list."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from posixpath import basename
from typing import NamedTuple

from model_lib.batch.config import BatchConfig
from model_lib.data.captions import has_value
from model_lib.data.tables import parse_columns, read_table
from model_lib.errors import UserError
from model_lib.ingest.image_source import Folder
from model_lib.io import storage
from model_lib.io.archives import archive_kind
from model_lib.io.folders import START, left_out_line, stream_images
from model_lib.io.images import begins_as_image
from model_lib.io.scratch import scratch_database, scratch_errors

UNNAMED, UNUSABLE = "rows without a name", "rows that cannot be used"


class ListedImage(NamedTuple):
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


class ImageTable:
    """Images on disk, each URI once: their number needs no memory."""

    def __init__(self) -> None:
        self._database = scratch_database()
        columns = "uri TEXT PRIMARY KEY, bytes INTEGER, version TEXT, name TEXT"
        self._database.execute(f"CREATE TABLE image ({columns}) WITHOUT ROWID")

    def add(self, images: Iterable[ListedImage]) -> None:
        """Add images; of several with one URI the last counts."""
        with scratch_errors():
            self._database.executemany("INSERT OR REPLACE INTO image VALUES (?, ?, ?, ?)", images)

    def holds(self, image: ListedImage) -> bool:
        """Return whether it is in the table, and the same in all columns."""
        rows = self._database.execute("SELECT * FROM image WHERE uri = ?", (image.uri,))
        return bool(rows.fetchone() == image)

    def remove(self, images: Iterable[ListedImage]) -> None:
        uris = ((image.uri,) for image in images)
        with scratch_errors():
            self._database.executemany("DELETE FROM image WHERE uri = ?", uris)

    def __iter__(self) -> Iterator[ListedImage]:
        """Yield the images, sorted by URI."""
        return map(ListedImage._make, self._database.execute("SELECT * FROM image ORDER BY uri"))


def list_images(config: BatchConfig, left_out: Counter[str]) -> Iterator[ListedImage]:
    """Yield the images of `config.images`, in any order, and those of a list as often as it names
    them; count in `left_out` what is no image, as `folders.list_images`; `UserError` if there are
    none."""
    is_list = _is_list(config.images)
    images = _read_list(config, left_out) if is_list else _read_folder(config, left_out)
    first = next(images, None)
    if first is None:
        patterns = "; look at --include and --exclude" if config.include or config.exclude else ""
        line = f"; {left_out_line(left_out)}" if left_out else ""
        raise UserError(f"{config.images}: no images in it{line}{'' if is_list else patterns}")
    yield first
    yield from images


def _read_folder(config: BatchConfig, left_out: Counter[str]) -> Iterator[ListedImage]:
    for file in stream_images(config.images, left_out, config.recursive, _chooser(config)):
        uri, name = storage.encodable(file.uri), storage.encodable(file.name)
        yield ListedImage(uri, file.bytes, file.version, name)


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
    names = path, basename(path)
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _read_list(config: BatchConfig, left_out: Counter[str]) -> Iterator[ListedImage]:
    """Yield the images that a list names, and count the rows that name none."""
    uri = config.images
    folder = Folder(storage.absolute(uri).rpartition("/")[0], uri)
    for row in read_table(uri, parse_columns(config.columns), need=("file",)):
        name = row.values.get("file")
        if isinstance(name, dict):
            problem = "holds images, not their names; write them to a folder, and name that"
            raise UserError(f"{uri}: {problem}")
        if row.problem:
            left_out[UNUSABLE] += 1
        elif not isinstance(name, str) or not has_value(name):
            left_out[UNNAMED] += 1
        else:
            name = storage.encodable(name.strip())
            yield ListedImage(folder.uri(name), name=name)
