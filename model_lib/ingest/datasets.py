"""Data sets in every form that ingest takes, told by what is there.

One place may hold images and captions together: COCO 2017's layout; a folder with a list of its
images (metadata.csv, captions.txt); with a text file beside each image; WebDataset's tar archives;
or Parquet files with the images in them. Or a list names its images, which lie elsewhere.
"""

import json
import logging
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from model_lib.data.coco import name_id
from model_lib.data.tables import HEAD, ListColumns, form_of
from model_lib.errors import UserError
from model_lib.ingest.annotations import SPLITS, add_coco, add_karpathy, add_table, parse_coco
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
from model_lib.io.errors import input_errors
from model_lib.io.folders import left_out_line, list_images
from model_lib.io.images import EXTENSIONS

log = logging.getLogger(__name__)

LISTS = re.compile(r"(metadata|captions|results)\.(csv|tsv|txt|jsonl?|parquet)", re.IGNORECASE)
"""Names of a list in the folder of its images."""

EXPECTED = (
    "expected COCO 2017's layout, a list such as metadata.csv or captions.txt, a .txt beside each "
    "image, or .tar or .parquet files"
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
    form = form_of(read_head(uris[0], HEAD))
    column = image_column(uris[0]) if form == "parquet" and images is None else None
    root = posixpath.dirname(uris[0]) or "."
    if form == "tar" or column is not None:
        if images is not None:
            raise UserError(f"images {images}: {uris[0]} has its own images; leave out --images")
        listing.uris += uris
        splits = _splits_of(uris, split)
        if column is not None:
            add_parquet(listing, root, splits, column, names)
        else:
            _add_tars(listing, root, splits, names)
        return
    if form in ("zip", "gzip") or (form != "coco" and uris[0].startswith("zip://")):
        raise UserError(f"{uris[0]}: is {form}, which is not read there; unpack it first")
    for uri in uris:
        folder = storage.absolute(uri).rpartition("/")[0]
        source = open_image_source(images) if images is not None else Folder(folder, uri)
        listing.uris.append(uri)
        add_list = add_coco if form == "coco" else add_table
        add_list(listing, uri, source, split, names)


def _splits_of(uris: Sequence[str], split: str) -> dict[str, str]:
    """Return the split of each file: if all have one in their names, as train-00000.parquet or
    validation/a.tar, it is that."""
    if split == "auto":
        own = {uri: _split_in(uri) for uri in uris}
        if all(own.values()):
            return {uri: str(name) for uri, name in own.items()}
    return dict.fromkeys(uris, split)


def _split_in(uri: str) -> str | None:
    path = PurePosixPath(uri)
    words = (re.split(r"[-_.]", path.name)[0], path.parent.name)
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), None)


def _add_folder(listing: Listing, folder: str, split: str, names: Mapping[str, str]) -> None:
    """Add the images of a folder that holds their captions too."""
    lists = _find_lists(folder)
    splits = _splits_of(lists, split)
    for uri in lists:
        _add_files(listing, [uri], splits[uri], None, names)
    if lists:
        return
    uris = [_uri(folder, path) for path in sorted(storage.find_files(folder))]
    for ending in (".tar", ".parquet"):
        if packed := [uri for uri in uris if uri.lower().endswith(ending)]:
            _add_files(listing, packed, split, None, names)
            return
    texts = {posixpath.splitext(uri)[0]: uri for uri in uris if uri.lower().endswith(".txt")}
    if texts:
        _add_text_files(listing, folder, texts, split)
    if not listing.entries:
        raise UserError(f"{folder}: holds no captions; {EXPECTED}")


def _uri(folder: str, path: str) -> str:
    if storage.is_local(folder):
        return path
    return str(storage.filesystem(folder)[0].unstrip_protocol(path))


def _find_lists(folder: str) -> list[str]:
    """Return the lists in a folder of images, or in its folders of splits."""
    names = storage.list_names(folder)
    lists = [storage.join(folder, name) for name in names if LISTS.fullmatch(name)]
    if not lists:
        for split in (name for name in names if name.lower() in SPLITS):
            below = storage.join(folder, split)
            lists += [
                storage.join(below, n) for n in storage.list_names(below) if LISTS.fullmatch(n)
            ]
    return lists


def _add_text_files(listing: Listing, folder: str, texts: dict[str, str], split: str) -> None:
    """Add images with a text file beside them, a caption a line; `texts` are by their URIs without
    the ending."""
    listing.uris.append(folder)
    source = Folder(folder)
    images = list_images(folder)
    others = {ending: count for ending, count in images.left_out.items() if ending != ".txt"}
    if others:
        log.warning("%s: %s", folder, left_out_line(others))
    splits = _splits_of([image.uri for image in images.files], split)
    for image in images.files:
        text = texts.pop(posixpath.splitext(image.uri)[0], None)
        lines = [] if text is None else _lines(storage.read_bytes(text), text)
        captions = listing.usable(image.name, lines, "a line of its .txt")
        listing.add(name_id(image.name), image.name, splits[image.uri], source, captions)
    for text in texts.values():
        listing.reject(text, "caption_without_image", "no image of the same name beside it")


def _lines(content: bytes, uri: str) -> list[str]:
    with input_errors(uri, "UTF-8 text"):
        return [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]


def _add_tars(
    listing: Listing, root: str, splits: Mapping[str, str], names: Mapping[str, str]
) -> None:
    """Add the samples of WebDataset's archives: a sample's files have one name up to the first dot,
    its captions are in its .json, or else its .txt, a line each."""
    archives: dict[str, Archive] = {}
    source = Archives(root, archives)
    for uri, split in splits.items():
        archive = open_archive(uri)
        key = uri.removeprefix(root).strip("/").removesuffix(".tar").replace("/", "-")
        archives[key] = archive
        samples: dict[str, dict[str, str]] = {}
        for name in archive.sizes:
            folder, base = posixpath.split(name)
            stem, dot, ending = base.partition(".")
            samples.setdefault(posixpath.join(folder, stem), {})[dot + ending.lower()] = name
        for sample, files in samples.items():
            image = next((files[ending] for ending in files if ending in EXTENSIONS), None)
            name = f"{key}/{image or sample}"
            captions = _sample_captions(listing, name, archive, files, names)
            if image is not None:
                listing.add(name_id(name), name, split, source, captions)
            elif captions:
                detail = f"{uri} has no image of {sample}"
                listing.reject(name, "caption_without_image", detail)


def _sample_captions(
    listing: Listing,
    name: str,
    archive: Archive,
    files: Mapping[str, str],
    names: Mapping[str, str],
) -> list[str]:
    """Return the usable captions of a sample."""
    values: Any = []
    if ".json" in files:
        uri = archive.uri(files[".json"])
        try:
            document = json.loads(archive.read(files[".json"]))
        except ValueError as error:
            listing.reject(name, "bad_row", f"{uri}: is not JSON: {error}")
            document = {}
        own = ListColumns(uri, names, ()).find(list(document))
        values = document[own["caption"]] if "caption" in own else []
    if not values and ".txt" in files:
        values = _lines(archive.read(files[".txt"]), archive.uri(files[".txt"]))
    return listing.usable(name, values, "its .json or .txt")


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
