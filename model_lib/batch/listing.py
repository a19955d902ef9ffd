"""The images to caption: those of a folder, bucket's prefix or archive, or those of a list."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from model_lib.batch.config import BatchConfig
from model_lib.data.captions import has_value
from model_lib.data.tables import parse_columns, read_table
from model_lib.errors import UserError
from model_lib.ingest.image_source import Folder
from model_lib.io import folders, storage
from model_lib.io.archives import archive_kind
from model_lib.io.folders import START, left_out_line
from model_lib.io.images import begins_as_image

UNNAMED, UNUSABLE = "rows without a name", "rows that cannot be used"


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
        images, left_out = _read_list(config.images, config.columns)
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


def _read_list(uri: str, columns: str | None) -> tuple[list[ListedImage], dict[str, int]]:
    """Return the images that a list names, and the count of rows that name none."""
    images: list[ListedImage] = []
    left_out: Counter[str] = Counter()
    folder = Folder(storage.absolute(uri).rpartition("/")[0], uri)
    for row in read_table(uri, parse_columns(columns), need=("file",)):
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
            images.append(ListedImage(folder.uri(name), name=name))
    return images, dict(left_out)
