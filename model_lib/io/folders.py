"""The images of a folder, a bucket's prefix or an archive.

The content decides what is an image, not the ending: that only spares opening the many files whose
ending is an image's, or another well-known kind's.
"""

import mimetypes
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from posixpath import splitext

from model_lib.errors import UserError, WorkError
from model_lib.io import storage
from model_lib.io.archives import open_archive
from model_lib.io.errors import is_transient
from model_lib.io.images import EXTENSIONS, ImageError, begins_as_image
from model_lib.io.listings import list_files
from model_lib.io.prefetch import prefetch_map

START = 512
"""Bytes of a file that show whether it is an image."""
READERS = 32
"""Threads that read the starts of files; most of the time they wait for their store."""
UNKNOWN = 1024
"""Files of unknown endings that are opened together."""
NO_IMAGES = {
    ending
    for ending, kind in mimetypes.MimeTypes().types_map[True].items()
    if not kind.startswith(("image/", "application/octet-stream"))
}
"""Endings of files that are not opened: those of texts, tables, videos, programs …"""
SYSTEM = r"__macosx|@eadir|thumbs\.db|ehthumbs\.db|desktop\.ini|\$recycle\.bin"
"""Files and folders that systems leave, beside hidden ones."""
# Archives of Windows may have backslashes.
UNSEEN = re.compile(rf"(?:^|[/\\])(?:\.[^/\\]*[^./\\]|(?:{SYSTEM})(?=[/\\]|$))", re.IGNORECASE)
HIDDEN, NO_ENDING = "hidden or system files", "without an ending"
CUT_OFF = "parts of an archive that cannot be listed"
ENDINGS_SHOWN = 8
"""Endings that are counted in a line; the rest is counted together."""


@dataclass(frozen=True)
class ImageFile:
    """A file that is an image, or that has the ending of one."""

    name: str
    """Its path below the folder, or its name in the archive."""
    uri: str
    bytes: int
    version: str
    """Changes with the content, as far as its store says; of an archive, it is the archive's."""


@dataclass(frozen=True)
class ImageList:
    """The images of a folder or an archive, and the counts of what else is there."""

    files: list[ImageFile]
    """Sorted by URI."""
    left_out: dict[str, int]
    """Files that are no images, by ending, and `HIDDEN`, `NO_ENDING` and `CUT_OFF`."""


def list_images(
    uri: str, recursive: bool = True, is_chosen: Callable[[str], bool] = lambda name: True
) -> ImageList:
    """Return the images of the folder, bucket's prefix or archive `uri`.

    Args:
        uri: path or URI.
        recursive: search folders below too.
        is_chosen: whether a file of this name is looked at; others are not counted either.

    Raises:
        UserError: there is none, or a part cannot be listed.
        WorkError: the store failed.
    """
    left_out: Counter[str] = Counter()
    images = sorted(stream_images(uri, left_out, recursive, is_chosen), key=lambda file: file.uri)
    return ImageList(images, dict(left_out))


def stream_images(
    uri: str, left_out: Counter[str], recursive: bool, is_chosen: Callable[[str], bool]
) -> Iterator[ImageFile]:
    """Yield the images of `list_images` in any order, however many, and count what is left out."""
    unknown: list[ImageFile] = []
    if storage.is_folder(uri):
        files, read = _folder_files(uri, recursive), _read_start
    else:
        archive = open_archive(uri)
        names = [name for name in archive.sizes if recursive or "/" not in name.removeprefix("./")]
        version, sizes = archive.version, archive.sizes
        files = iter([ImageFile(name, archive.uri(name), sizes[name], version) for name in names])
        read = lambda file: archive.read(file.name)  # noqa: E731
        if archive.damage:
            left_out[CUT_OFF] += 1
    for file in files:
        ending = splitext(file.name)[1].lower()
        if not is_chosen(file.name):
            continue
        if is_hidden(file.name):
            left_out[HIDDEN] += 1
        elif ending in EXTENSIONS:
            yield file
        elif ending in NO_IMAGES or file.bytes == 0:
            left_out[_kind(ending)] += 1
        else:
            unknown.append(file)
        if len(unknown) == UNKNOWN:
            yield from _opened(unknown, read, left_out)
            unknown = []
    yield from _opened(unknown, read, left_out)


def _opened(
    files: list[ImageFile], read: Callable[[ImageFile], bytes], left_out: Counter[str]
) -> Iterator[ImageFile]:
    """Yield those that are images by their content, and count the others."""
    decisions = prefetch_map(partial(_is_image, read=read), files, READERS, 2 * READERS)
    for file, decision in zip(files, decisions, strict=True):
        if decision:
            yield file
        else:
            left_out[_kind(splitext(file.name)[1].lower())] += 1


def _folder_files(uri: str, recursive: bool) -> Iterator[ImageFile]:
    fs, folder = storage.filesystem(uri)
    root = folder.rstrip("/")
    address = root if storage.is_local(uri) else str(fs.unstrip_protocol(root))
    for path, info in list_files(uri, recursive):
        if not path.endswith("/"):  # a bucket's mark of an empty folder
            below, version = path.removeprefix(root), "/".join(storage.version(info))
            yield ImageFile(below.lstrip("/"), address + below, int(info["size"]), version)


def is_hidden(name: str) -> bool:
    """Return whether a file, or a folder that it is in, is hidden or left there by a system."""
    return UNSEEN.search(name) is not None


def _kind(ending: str) -> str:
    return ending if re.fullmatch(r"\.[a-z0-9]{1,10}", ending) else NO_ENDING


def _read_start(file: ImageFile) -> bytes:
    return storage.read_bytes(file.uri, START - 1)


def _is_image(file: ImageFile, read: Callable[[ImageFile], bytes]) -> bool:
    """Return whether a file begins as an image, or the user may not read it, which is for its row
    to say."""
    try:
        return begins_as_image(read(file)[:START])
    except ImageError:
        return False
    except UserError as error:  # else it is gone, or a socket
        return isinstance(error.__cause__, PermissionError)
    except WorkError as error:
        if is_transient(error):
            raise
        return True


def left_out_line(left_out: dict[str, int]) -> str:
    """Return counts of what is no image in words: "left out, as no images: .txt 12, .svg 3; hidden
    or system files: 4"; "" if there are none."""
    counts = Counter(left_out)
    others = {name: counts.pop(name) for name in left_out if " " in name and name != NO_ENDING}
    endings = [f"{name} {count:,}" for name, count in counts.most_common(ENDINGS_SHOWN)]
    if rest := counts.total() - sum(count for _, count in counts.most_common(ENDINGS_SHOWN)):
        endings.append(f"others {rest:,}")
    parts = [f"as no images: {', '.join(endings)}"] if endings else []
    parts += [f"{name}: {count:,}" for name, count in others.items()]
    return f"left out, {'; '.join(parts)}" if parts else ""
