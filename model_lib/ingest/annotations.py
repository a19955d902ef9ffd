"""Lists of images with captions: COCO's JSON, Karpathy's splits, and tables of file and caption.

All become the same `Listing` of entries, with a `Rejected` row for each image or caption that
cannot be used.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from model_lib.data.coco import parse_captions, parse_lists, typed
from model_lib.errors import UserError
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.image_source import ImageSource, open_image_source, open_list, open_zip
from model_lib.ingest.tables import READERS, read_table
from model_lib.io import storage
from model_lib.io.errors import input_errors

LONGEST_CAPTION = 1000
"""Characters of a caption; a longer text does not caption an image."""
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""Control characters other than spaces, and halves of surrogate pairs, which no file can hold."""
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""Karpathy's splits, and ours that their images go to."""
KARPATHY_FORM = (
    'Karpathy\'s splits; expected {"images": [{"cocoid", "filepath", "filename", "split", '
    '"sentences": [{"raw"}]}]}'
)


@dataclass(frozen=True, slots=True)
class Entry:
    """An image to ingest, with its captions."""

    image_id: int
    file_name: str
    split: str
    source: ImageSource
    captions: tuple[str, ...]

    @property
    def uri(self) -> str:
        return self.source.uri(self.file_name)


@dataclass(frozen=True)
class Rejected:
    """A row of the quarantine."""

    file_name: str
    reason: str
    detail: str


@dataclass
class Listing:
    """All that is to be ingested."""

    uris: list[str]
    """Where it was read."""
    entries: list[Entry] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    cleaned: int = 0
    """Captions that lost control characters."""

    def reject(self, name: str, reason: str, detail: str) -> None:
        self.rejected.append(Rejected(CONTROL.sub("?", name), reason, CONTROL.sub("?", detail)))

    def reject_duplicate(self, name: str, image_id: int) -> None:
        detail = f"image id {image_id} occurs more than once in {self.uris[-1]}"
        self.reject(name, "duplicate_id", detail)

    def add(
        self, image_id: int, name: str, split: str, source: ImageSource, texts: list[str]
    ) -> None:
        """Add an image, or reject it; `UserError` if its name leads out of the image folder."""
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or path.parts == () or ":" in path.parts[0]:
            problem = f"file_name {name!r} of image {image_id} leaves the image folder"
            uris = " and ".join(self.uris)
            raise UserError(f"{uris}: {problem}; make it relative to --images")
        if CONTROL.search(name):
            detail = f"image id {image_id}: its file name has control characters: {name!a}"
            self.reject(name, "bad_name", detail)
            return
        captions = tuple(caption for text in texts if (caption := self._clean(name, text)))
        if captions:
            self.entries.append(Entry(image_id, name, split, source, captions))
        else:
            detail = f"{self.uris[-1]} has no caption for image id {image_id}"
            self.reject(name, "no_captions", detail)

    def _clean(self, name: str, text: str) -> str:
        """Return a caption in one line without control characters; "" if it is rejected."""
        caption = " ".join(CONTROL.sub("", text).split())
        if not caption:
            self.reject(name, "caption_empty", "a caption without a visible character")
        elif len(caption) > LONGEST_CAPTION:
            detail = f"{len(caption):,} characters, more than {LONGEST_CAPTION:,}"
            self.reject(name, "caption_too_long", detail)
            return ""
        elif CONTROL.search(text):
            self.cleaned += 1
        return caption

    def digest(self) -> str:
        """Return the SHA-256 of all entries in their order."""
        digest = hashlib.sha256()
        for entry in self.entries:
            row = (entry.image_id, entry.file_name, entry.split, entry.source.root, entry.captions)
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def read_listing(config: IngestConfig) -> Listing:
    """Return all that is to be ingested; `UserError` if a list or its images are not there."""
    if config.dataset is not None:
        return _read_coco_2017(config.dataset, config.karpathy)
    source = open_image_source(str(config.images))
    uri = config.karpathy or str(config.annotations)
    listing = Listing([uri])
    if config.karpathy is not None:
        _add_karpathy(listing, uri, source)
    elif uri.lower().endswith(tuple(READERS)):
        _add_table(listing, uri, source, config.split)
    else:
        _add_coco(listing, uri, source, config.split)
    return listing


def _read_coco_2017(dataset: str, karpathy: str | None) -> Listing:
    listing = Listing([])
    images: dict[int, tuple[ImageSource, str]] = {}
    for split in ("train", "val"):
        uri, source = coco_2017(dataset, split)
        listing.uris.append(uri)
        if karpathy is None:
            _add_coco(listing, uri, source, split)
        else:
            images |= {image_id: (source, name) for image_id, name in _parse_coco(uri)[0]}
    if karpathy is not None:
        listing.uris.append(karpathy)
        _add_karpathy(listing, karpathy, images)
    return listing


def _parse_coco(uri: str) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    with open_list(uri) as file:
        return parse_captions(file, uri)


def _add_coco(listing: Listing, uri: str, source: ImageSource, split: str) -> None:
    """Add the images of a COCO captions file, by image id."""
    images, captions = _parse_coco(uri)
    seen = set()
    for image_id, name in sorted(images):
        if image_id in seen:
            listing.reject_duplicate(name, image_id)
            continue
        seen.add(image_id)
        texts = captions.pop(image_id, [])
        listing.add(image_id, name, _split_of(image_id, split), source, texts)
    for image_id, texts in sorted(captions.items()):
        detail = f"{uri} has no image of id {image_id}, but {len(texts)} captions of it"
        listing.reject("", "caption_without_image", detail)


def _split_of(image_id: int, split: str) -> str:
    """Return an image's split: with "auto" about a tenth of all ids is for validation."""
    if split != "auto":
        return split
    return "val" if hashlib.sha256(str(image_id).encode()).digest()[0] < 26 else "train"


def _add_karpathy(
    listing: Listing, uri: str, source: ImageSource | Mapping[int, tuple[ImageSource, str]]
) -> None:
    """Add the images of Karpathy's splits, by the list's names or each id's own source and name."""
    rows: dict[int, tuple[str, str, list[str]]] = {}
    with open_list(uri) as file, input_errors(uri, KARPATHY_FORM):
        for _, image in parse_lists(file, "images"):
            image_id = typed(image["cocoid"] if "cocoid" in image else image["imgid"], int)
            folder, name = typed(image.get("filepath", ""), str), typed(image["filename"], str)
            name = f"{folder}/{name}" if folder and name else folder or name
            if image["split"] not in KARPATHY:
                splits = ", ".join(KARPATHY)
                raise ValueError(f"image {image_id} is of split {image['split']!r}, not {splits}")
            split = KARPATHY[image["split"]]
            texts = [typed(sentence["raw"], str) for sentence in image["sentences"]]
            if image_id not in rows:
                rows[image_id] = name, split, texts
            elif rows[image_id][1] == split:
                listing.reject_duplicate(name, image_id)
            else:
                both = " and ".join(sorted({split, rows[image_id][1]}))
                message = f"leaks: image {image_id} is in both {both}; keep it in one of them"
                raise UserError(f"{uri}: {message}")
    for image_id, (name, split, texts) in sorted(rows.items()):
        if not isinstance(source, Mapping):
            listing.add(image_id, name, split, source, texts)
        elif image_id in source:
            coco_source, coco_name = source[image_id]
            listing.add(image_id, coco_name, split, coco_source, texts)
        else:
            detail = f"image id {image_id} is in neither of COCO's captions files"
            listing.reject(name, "missing", detail)


def _add_table(listing: Listing, uri: str, source: ImageSource, split: str) -> None:
    """Add a table's files; their ids and splits depend on their names alone, not on other rows."""
    captions: dict[str, list[str]] = {}
    for name, caption in read_table(uri):
        captions.setdefault(name, []).append(caption)
    for image_id, name in sorted((_id_of(name), name) for name in captions):
        listing.add(image_id, name, _split_of(image_id, split), source, captions[name])


def _id_of(name: str) -> int:
    """Return 53 bits of a name's digest, which a float of JSON's readers holds exactly."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) >> 11


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
        with open_zip(archive) as zipped:
            if member not in zipped.NameToInfo:
                fetch = "fetch COCO's own: captioner download coco2017"
                raise UserError(f"{archive}: has no {member}; {fetch}")
        uri = f"zip://{member}::{archive}"
    folder = storage.join(dataset, f"{split}2017")
    if storage.is_folder(folder):
        return uri, open_image_source(folder)
    if not storage.exists(f"{folder}.zip"):
        raise UserError(f"{folder}: {remedy}")
    return uri, open_image_source(f"{folder}.zip")
