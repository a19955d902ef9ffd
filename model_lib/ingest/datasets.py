"""Data sets in every form that ingest takes, recognised by what is there.

One place may hold images and captions together: COCO 2017's layout; a folder with a list of its
images (metadata.csv, captions.txt); with a text file beside each image; WebDataset's tar archives;
or Parquet files with the images in them. Or a list names its images, which lie elsewhere.
"""

import json
import logging
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from model_lib.data.captions import has_value
from model_lib.data.coco import name_id
from model_lib.data.tables import HEAD, UTF_16, ListColumns, form_of
from model_lib.errors import UserError
from model_lib.ingest.annotations import (
    SPLITS,
    CaptionsByName,
    add_coco,
    add_karpathy,
    parse_coco,
    read_rows,
    splits_of,
)
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.image_source import (
    Archives,
    Folder,
    ImageSource,
    open_image_source,
    read_head,
)
from model_lib.ingest.listing import Listing
from model_lib.ingest.parquet_images import add_parquet, image_column
from model_lib.io import storage
from model_lib.io.archives import Archive, open_archive
from model_lib.io.folders import READERS, is_hidden, left_out_line, list_images
from model_lib.io.images import EXTENSIONS, ImageError
from model_lib.io.listings import find_files
from model_lib.io.prefetch import prefetch_map

log = logging.getLogger(__name__)

LISTS = re.compile(r"(metadata|captions|results)\.(csv|tsv|txt|jsonl?|parquet)", re.IGNORECASE)
"""Names of a list in the folder of its images."""
TEXTS = (".txt", ".caption")
"""Endings of text files with the captions of the image of the same name."""

EXPECTED = (
    "expected COCO 2017's layout, a list such as metadata.csv or captions.txt, a .txt beside each "
    "image, or .tar or .parquet files; give other lists as --annotations, or --train and --val"
)


def read_listing(config: IngestConfig) -> Listing:
    """Return all that is to be ingested; `UserError` if a list or its images are not there."""
    require_sources(config)
    listing = Listing()
    names = config.column_names()
    if config.dataset is not None and is_coco_2017(config.dataset):
        _add_coco_2017(listing, config.dataset, config.karpathy)
    elif config.karpathy is not None:
        source = open_image_source(str(config.images or config.dataset))
        listing.uris.append(config.karpathy)
        listing.is_published = True
        add_karpathy(listing, config.karpathy, source)
    else:
        for uri, split in config.sources():
            if not uri.startswith("zip://") and storage.is_folder(uri):
                _add_folder(listing, uri, split, names)
            else:
                _add_files(listing, _matching(uri), split, config.images, names)
    return listing


def require_sources(config: IngestConfig) -> None:
    """Raise `UserError` if a list, data set or image folder is not there."""
    if config.dataset is not None and is_coco_2017(config.dataset):
        for split in ("train", "val"):
            coco_2017(config.dataset, split)
        return
    sources = [uri for uri, _ in config.sources()]
    for uri in filter(None, (*sources, config.karpathy)):
        if uri.startswith("zip://"):
            continue  # its reader says what is wrong with an archive
        for file in _matching(uri):
            if not storage.exists(file):
                raise UserError(f"{file}: not there, or these credentials may not see it")
            if storage.is_folder(file) and not storage.list_names(file):
                raise UserError(f"{file}: holds nothing; {EXPECTED}")
    if config.images is not None:
        open_image_source(config.images)


def _matching(pattern: str) -> list[str]:
    """Return the files that a path or URI with * or ? stands for."""
    if not any(sign in pattern for sign in "*?") or "::" in pattern or storage.exists(pattern):
        return [pattern]
    fs, path = storage.filesystem(pattern)
    files = sorted(storage.access(pattern, lambda: fs.glob(path), doing="listed"))
    if not files:
        raise UserError(f"{pattern}: matches no file")
    return files if storage.is_local(pattern) else [str(fs.unstrip_protocol(f)) for f in files]


def _add_files(
    listing: Listing, uris: Sequence[str], split: str, images: str | None, names: Mapping[str, str]
) -> None:
    """Add files of one form: lists, tar archives, or Parquet files with images."""
    uris = [storage.absolute(uri) for uri in uris]
    form = form_of(read_head(uris[0], HEAD))
    column = image_column(uris[0]) if form == "parquet" and images is None else None
    if form != "tar" and column is None:
        _add_lists(listing, dict.fromkeys(uris, split), images, names)
        return
    if images is not None:
        raise UserError(f"images {images}: {uris[0]} has its own images; leave out --images")
    listing.uris += uris
    splits = splits_of(uris, split)
    if column is not None:
        add_parquet(listing, _common_folder(uris), splits, column, names)
    else:
        _add_tars(listing, _common_folder(uris), splits, names)


def _add_lists(
    listing: Listing, splits: Mapping[str, str], images: str | None, names: Mapping[str, str]
) -> None:
    """Add lists of images at `images`, or else beside them; several may list one image."""
    root = _common_folder(splits)
    source = Folder(root, next(iter(splits))) if images is None else open_image_source(images)
    tables = CaptionsByName(listing, "auto")
    for uri, split in splits.items():
        form = form_of(read_head(uri, HEAD))
        if uri.startswith("zip://") and form != "coco":
            raise UserError(f"{uri}: a list in an archive is read in COCO's form alone; unpack it")
        if form in ("zip", "tar", "gzip"):
            remedy = "unpack it first, or save a spreadsheet as CSV"
            raise UserError(f"{uri}: is {form}, which is not read as a list; {remedy}")
        listing.uris.append(uri)
        folder = uri.rpartition("/")[0]
        if form == "coco":
            own = Folder(folder, uri) if images is None else source
            add_coco(listing, uri, own, split, names)
        else:
            tables.split = split
            below = folder.removeprefix(root).lstrip("/") if images is None else ""
            read_rows(tables, uri, below, names)
    tables.list_in(source)


def _common_folder(uris: Iterable[str]) -> str:
    """Return the folder that all files are in or below."""
    folders = [f"{uri.rpartition('/')[0]}/" for uri in uris]
    return posixpath.commonprefix(folders).rpartition("/")[0]


def _add_folder(listing: Listing, folder: str, split: str, names: Mapping[str, str]) -> None:
    """Add the images of a folder that holds their captions too."""
    if lists := _find_lists(folder):
        _add_lists(listing, splits_of(lists, split), None, names)
        return
    fs, root = storage.filesystem(folder)
    paths = [path for path in find_files(folder) if not is_hidden(path.removeprefix(root))]
    uris = sorted(path if storage.is_local(folder) else fs.unstrip_protocol(path) for path in paths)
    tars, parquets = (
        [uri for uri in uris if uri.lower().endswith(ending)] for ending in (".tar", ".parquet")
    )
    texts: dict[str, list[str]] = {}
    for uri in uris:
        stem, ending = posixpath.splitext(uri)
        if ending.lower() in TEXTS:
            texts.setdefault(stem, []).append(uri)
    # img2dataset writes Parquet without images beside its archives, or folders of text files.
    if tars or (parquets and (not texts or image_column(parquets[0]))):
        _add_files(listing, tars or parquets, split, None, names)
        return
    if texts:
        _add_text_files(listing, folder, texts, split)
    if not listing.entries:
        raise UserError(f"{folder}: holds no captions; {EXPECTED}")


def _find_lists(folder: str) -> list[str]:
    """Return the lists in a folder of images, or in its folders of splits; `UserError` if one has
    several."""
    below = [name for name in storage.list_names(folder) if name.lower() in SPLITS]
    for folders in ([folder], [storage.join(folder, name) for name in below]):
        lists = []
        for place in folders:
            names = [name for name in storage.list_names(place) if LISTS.fullmatch(name)]
            if len(names) > 1:
                problem = f"holds several lists, {' and '.join(names)}"
                raise UserError(f"{place}: {problem}; give one of them as --annotations")
            lists += [storage.absolute(storage.join(place, name)) for name in names]
        if lists:
            return lists
    return []


def _add_text_files(listing: Listing, folder: str, texts: dict[str, list[str]], split: str) -> None:
    """Add images with text files beside them, a caption a line; `texts` are by their URIs without
    the ending."""
    listing.uris.append(folder)
    source = Folder(folder)
    images = list_images(folder)
    others = {ending: count for ending, count in images.left_out.items() if ending not in TEXTS}
    if others:
        log.warning("%s: %s", folder, left_out_line(others))
    splits = splits_of([image.uri for image in images.files], split)
    own = [texts.pop(posixpath.splitext(image.uri)[0], []) for image in images.files]
    files = [[partial(storage.read_bytes, uri) for uri in uris] for uris in own]
    lines_of = prefetch_map(_read_lines, files, READERS, 4 * READERS)
    for image, (lines, problem) in zip(images.files, lines_of, strict=True):
        if problem:
            listing.reject(image.name, "bad_row", f"a text file of its captions {problem}")
        captions = listing.usable(image.name, lines, "a line of its text file")
        listing.add(name_id(image.name), image.name, splits[image.uri], source, captions)
    for text in chain.from_iterable(texts.values()):
        listing.reject(text, "caption_without_image", "no image of the same name beside it")


def _read_lines(files: Sequence[Callable[[], bytes]]) -> tuple[list[str], str]:
    """Return the lines with text of files, and why one cannot be used, or ""."""
    lines: list[str] = []
    for read in files:
        try:
            content = read()
            text = content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
        except UnicodeDecodeError:
            return [], "is not UTF-8; save it in UTF-8"
        except ImageError as error:
            return [], error.detail
        lines += [line for line in text.splitlines() if line.strip()]
    return lines, ""


def _add_tars(
    listing: Listing, root: str, splits: Mapping[str, str], names: Mapping[str, str]
) -> None:
    """Add the samples of WebDataset's archives: a sample's files have one name but for the ending,
    its captions are in its .json, or else its .txt, a line each."""
    source = Archives(root)
    for uri, split in splits.items():
        archive = open_archive(uri)
        if archive.damage:
            listing.reject(uri, "truncated", f"left out: {archive.damage}")
        key = posixpath.splitext(uri.removeprefix(root).lstrip("/"))[0]
        samples: dict[str, dict[str, str]] = {}
        for member in archive.sizes:
            stem, ending = posixpath.splitext(member)
            if not is_hidden(member):
                samples.setdefault(stem.removeprefix("./"), {})[ending.lower()] = member
        read = partial(_read_sample, archive, names=names)
        captions_of = prefetch_map(read, samples.values(), READERS, 4 * READERS)
        for (sample, files), (values, problem) in zip(samples.items(), captions_of, strict=True):
            ending, *others = [ending for ending in files if ending in EXTENSIONS] or [""]
            name = f"{key}/{sample}{ending}"
            for other in others:
                detail = f"the captions of its sample are for {name}"
                listing.reject(f"{key}/{sample}{other}", "no_captions", detail)
            if problem:
                listing.reject(name, "bad_row", problem)
            captions = listing.usable(name, values, "its .json or .txt")
            if ending:
                source.members[name] = archive, files[ending]
                listing.add(name_id(name), name, split, source, captions)
            elif captions:
                detail = f"{uri} has no image of {sample}"
                listing.reject(name, "caption_without_image", detail)


def _read_sample(
    archive: Archive, files: Mapping[str, str], names: Mapping[str, str]
) -> tuple[Any, str]:
    """Return the captions of a sample, one or a list, and why a file cannot be used, or ""."""
    problem = ""
    if ".json" in files:
        try:
            document = json.loads(archive.read(files[".json"]))
        except (ValueError, RecursionError, ImageError) as error:
            document, problem = None, f"its .json cannot be read: {error}"
        if isinstance(document, dict):
            own = ListColumns(archive.root, names, ()).find(tuple(document))
            values = [document[column] for column in own.get("caption", [])]
            if any(map(has_value, values)):
                return values[0] if len(values) == 1 else values, ""
    texts = [partial(archive.read, files[ending]) for ending in TEXTS if ending in files]
    lines, problem_of_text = _read_lines(texts)
    return lines, problem or (problem_of_text and f"its text {problem_of_text}")


# ---- COCO 2017's layout --------------------------------------------------------------------------


def is_coco_2017(dataset: str) -> bool:
    """Return whether a folder has the layout of COCO 2017, or a part of it."""
    parts = ["annotations", "annotations_trainval2017.zip", "train2017", "val2017"]
    parts += ["train2017.zip", "val2017.zip"]
    return any(part in storage.list_names(dataset) for part in parts)


def _add_coco_2017(listing: Listing, dataset: str, karpathy: str | None) -> None:
    listing.is_published = True
    images: dict[int, tuple[ImageSource, str]] = {}
    for split in ("train", "val"):
        uri, source = coco_2017(dataset, split)
        listing.uris.append(uri)
        if karpathy is None:
            add_coco(listing, uri, source, split)
        else:
            images |= {image_id: (source, name) for image_id, name in parse_coco(uri).images}
    if karpathy is not None:
        listing.uris.append(karpathy)
        add_karpathy(listing, karpathy, images)


def coco_2017(dataset: str, split: str) -> tuple[str, ImageSource]:
    """Return a split's captions file and images in COCO 2017's layout, unpacked or as archives;
    `UserError` if a part is missing."""
    remedy = "not found, nor COCO's archive of it; ingest takes other data as --annotations"
    member = f"annotations/captions_{split}2017.json"
    uri = storage.join(dataset, member)
    if not storage.exists(uri):
        archive = storage.join(dataset, "annotations_trainval2017.zip")
        if not storage.exists(archive):
            raise UserError(f"{uri}: {remedy}")
        if member not in open_archive(archive).sizes:
            fetch = "fetch COCO's own: captioner download coco2017"
            raise UserError(f"{archive}: has no {member}; {fetch}")
        uri = f"zip://{member}::{archive}"
    folder = storage.join(dataset, f"{split}2017")
    if storage.is_folder(folder):
        return uri, open_image_source(folder)
    if not storage.exists(f"{folder}.zip"):
        raise UserError(f"{folder}: {remedy}")
    return uri, open_image_source(f"{folder}.zip")
