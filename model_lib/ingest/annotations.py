"""Lists of images with captions, one reader a format: COCO's JSON, Karpathy's splits, and tables of
file and caption.

All yield the same `Entry`, and a `Rejected` row for each image or caption that cannot be used.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from model_lib.errors import UserError
from model_lib.ingest.config import IngestConfig
from model_lib.ingest.image_source import Place, open_image_source, open_zip, opened
from model_lib.ingest.json_stream import NotJson, sections
from model_lib.ingest.tables import READERS, read_table
from model_lib.io import storage
from model_lib.io.remote_cache import local_file

LONGEST_CAPTION = 1000
"""Characters of a caption; a longer one is no caption of an image."""
CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""Control characters that are no spaces, and lone surrogates, which no file can hold."""
SURROGATES = re.compile("[\ud800-\udfff]")
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""Karpathy's splits, and where their images go."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image to ingest: its place and its captions."""

    image_id: int
    file_name: str
    split: str
    place: Place
    captions: tuple[str, ...]

    @property
    def uri(self) -> str:
        return self.place.uri(self.file_name)


@dataclass(frozen=True)
class Rejected:
    """A row of the quarantine."""

    file_name: str
    reason: str
    detail: str


@dataclass
class Listing:
    """What is to be ingested."""

    names: list[str]
    """Where it was read."""
    entries: list[Entry] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    cleaned: int = 0
    """Captions that lost control characters."""

    def reject(self, name: str, reason: str, detail: str) -> None:
        self.rejected.append(Rejected(CONTROL.sub("?", name), reason, CONTROL.sub("?", detail)))

    def add(self, image_id: int, name: str, split: str, place: Place, texts: list[str]) -> None:
        """Add an image, or say why it cannot be used; `UserError` if it would be read from outside
        its folder."""
        _require_inside(" and ".join(self.names), image_id, name)
        if CONTROL.search(name):
            self.reject(
                name,
                "bad_name",
                f"image id {image_id}: its file name has control characters: {name!a}",
            )
            return
        captions = tuple(caption for text in texts if (caption := self._clean(name, text)))
        if captions:
            self.entries.append(Entry(image_id, name, split, place, captions))
        else:
            self.reject(
                name, "no_captions", f"{self.names[-1]} has no caption for image id {image_id}"
            )

    def _clean(self, name: str, text: str) -> str:
        """Return a caption in one line without control characters; nothing if it cannot be used."""
        caption = " ".join(CONTROL.sub("", text).split())
        if not caption:
            self.reject(name, "caption_empty", "a caption without a visible character")
        elif len(caption) > LONGEST_CAPTION:
            self.reject(
                name,
                "caption_too_long",
                f"{len(caption):,} characters, more than {LONGEST_CAPTION:,}",
            )
            return ""
        elif CONTROL.search(text):
            self.cleaned += 1
        return caption

    def digest(self) -> str:
        """Digest everything that is listed, in its order."""
        found = hashlib.sha256()
        for entry in self.entries:
            row = (entry.image_id, entry.file_name, entry.split, entry.place.root, entry.captions)
            found.update(repr(row).encode("utf-8", "surrogatepass"))
        return found.hexdigest()


def read_captions(uri: str) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """Read a COCO captions file: its images (id, file name), and each image id's captions in the
    order of their ids.

    Raises:
        UserError: the file is missing, not JSON, or not COCO captions.
    """
    images, notes = _read_coco(uri)
    captions: dict[int, list[str]] = {image_id: [] for image_id, _ in images}
    for image_id, texts in notes.items():
        captions[image_id] = [
            line for text in texts if (line := " ".join(SURROGATES.sub("", text).split()))
        ]
    return [(image_id, SURROGATES.sub("?", name)) for image_id, name in images], captions


def _read_coco(uri: str) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """Read a COCO captions file; texts as they are."""
    images: list[tuple[int, str]] = []
    notes: dict[int, list[tuple[int, str]]] = {}
    with _format(
        uri,
        'COCO captions; expected {"images": [{"id", "file_name"}], "annotations": [{"id", … '
        '"caption"}]}',
    ):
        missing = {"images", "annotations"}
        with opened(uri) as file:
            for key, elements in sections(file):
                if key in missing and not isinstance(elements, Iterator):
                    raise TypeError(f"{key} is not a list")
                missing.discard(key)
                if key == "images":
                    for image in elements:
                        if "sentences" in image:
                            raise UserError(f"{uri}: has Karpathy's splits; give it as --karpathy")
                        images.append((_integer(image["id"]), _text(image["file_name"])))
                elif key == "annotations":
                    for note in elements:
                        row = (_integer(note["id"]), _text(note["caption"]))
                        notes.setdefault(_integer(note["image_id"]), []).append(row)
        if missing:
            raise KeyError(min(missing))
    return images, {
        i: [text for _, text in sorted(rows, key=lambda row: row[0])] for i, rows in notes.items()
    }


class _format:
    """Raises what a document of another form causes as a `UserError` that says what was
    expected."""

    def __init__(self, uri: str, expected: str) -> None:
        self.uri, self.expected = uri, expected

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, NotJson):
            raise UserError(f"{self.uri}: is not JSON: {error}") from error
        if isinstance(error, (KeyError, TypeError, AttributeError)):
            what, _, form = self.expected.partition("; ")
            raise UserError(
                f"{self.uri}: is not {what} ({type(error).__name__}: {error}); {form}"
            ) from error


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise TypeError(f"{value!r} is not a whole number of 64 bits")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _require_inside(uri: str, image_id: int, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or path.parts[:1] == () or ":" in path.parts[0]:
        raise UserError(
            f"{uri}: file_name {name!r} of image {image_id} leaves the image folder; make it "
            "relative to --images"
        )


def _add_coco(listing: Listing, uri: str, place: Place, split: str) -> None:
    """Add what a COCO captions file lists, by image id."""
    images, captions = _read_coco(uri)
    seen = set()
    for image_id, name in sorted(images):
        if image_id in seen:
            listing.reject(
                name, "duplicate_id", f"image id {image_id} occurs more than once in {uri}"
            )
        else:
            where = split if split != "auto" else _auto_split(image_id)
            listing.add(image_id, name, where, place, captions.pop(image_id, []))
        seen.add(image_id)
    for image_id in sorted(captions):
        count = len(captions[image_id])
        listing.reject(
            "",
            "caption_without_image",
            f"{uri} has no image of id {image_id}, but {count} captions of it",
        )


def _auto_split(image_id: int) -> str:
    return (
        "val" if hashlib.sha256(str(image_id).encode()).digest()[0] < 26 else "train"
    )  # 26 of 256: a tenth


def _add_karpathy(
    listing: Listing, uri: str, places: Place | Mapping[int, tuple[Place, str]]
) -> None:
    """Add Karpathy's splits, by image id; images under the names that he gives, or of COCO's
    ids."""
    rows: dict[int, tuple[str, str, list[str]]] = {}
    form = '{"images": [{"cocoid", "filepath", "filename", "split", "sentences": [{"raw"}]}]}'
    with _format(uri, f"Karpathy's splits; expected {form}"), opened(uri) as file:
        found = False
        for key, images in sections(file):
            if key != "images":
                continue
            found = True
            for image in images:
                image_id = _integer(image["cocoid"] if "cocoid" in image else image["imgid"])
                name = "/".join(
                    filter(None, [_text(image.get("filepath", "")), _text(image["filename"])])
                )
                if image["split"] not in KARPATHY:
                    raise UserError(
                        f"{uri}: image {image_id} is of split {image['split']!r}, not "
                        f"{', '.join(KARPATHY)}"
                    )
                split = KARPATHY[image["split"]]
                if image_id in rows and rows[image_id][1] != split:
                    both = " and ".join(sorted({split, rows[image_id][1]}))
                    raise UserError(
                        f"{uri}: leaks: image {image_id} is in both {both}; keep it in one of them"
                    )
                if image_id in rows:
                    listing.reject(
                        name, "duplicate_id", f"image id {image_id} occurs more than once in {uri}"
                    )
                    continue
                rows[image_id] = (
                    name,
                    split,
                    [_text(sentence["raw"]) for sentence in image["sentences"]],
                )
        if not found:
            raise KeyError("images")
    for image_id in sorted(rows):
        name, split, texts = rows.pop(image_id)
        if isinstance(places, Mapping):
            if image_id not in places:
                listing.reject(
                    name, "missing", f"image id {image_id} is in neither of COCO's captions files"
                )
                continue
            place, name = places[image_id]
        else:
            place = places
        listing.add(image_id, name, split, place, texts)


def _add_table(listing: Listing, uri: str, place: Place, split: str) -> None:
    """Add a table's files, whose ids are digests of their names, so that another row changes no
    other's split."""
    captions: dict[str, list[str]] = {}
    with local_file(uri) as path:
        for name, caption in read_table(uri, path):
            captions.setdefault(name, []).append(caption)
    ids = {
        name: int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8])
        >> 11
        for name in captions
    }
    for name in sorted(captions, key=lambda name: ids[name]):
        where = split if split != "auto" else _auto_split(ids[name])
        listing.add(ids[name], name, where, place, captions.pop(name))


def read_listing(config: IngestConfig) -> Listing:
    """Return all that is to be ingested, read before anything is written.

    Raises:
        UserError: a list or its images are not there, or not what they should be.
    """
    if config.dataset is None:
        place = open_image_source(str(config.images))
        if config.karpathy is not None:
            listing = Listing([config.karpathy])
            _add_karpathy(listing, config.karpathy, place)
        else:
            listing = Listing([str(config.annotations)])
            add = _add_table if listing.names[0].lower().endswith(tuple(READERS)) else _add_coco
            add(listing, listing.names[0], place, config.split)
        return listing
    sources = {split: coco_2017(config.dataset, split) for split in ("train", "val")}
    if config.karpathy is not None:
        known = {}
        for uri, place in sources.values():
            known.update({image_id: (place, name) for image_id, name in read_captions(uri)[0]})
        listing = Listing([*(uri for uri, _ in sources.values()), config.karpathy])
        _add_karpathy(listing, config.karpathy, known)
        return listing
    listing = Listing([])
    for split, (uri, place) in sources.items():
        listing.names.append(uri)
        _add_coco(listing, uri, place, split)
    return listing


def coco_2017(dataset: str, split: str) -> tuple[str, Place]:
    """Return a split's captions file and images in COCO 2017's own layout, unpacked or as its
    archives.

    Raises:
        UserError: there is no such folder, or something of the layout is missing in it.
    """
    annotations, images = f"annotations/captions_{split}2017.json", f"{split}2017"
    uri, archive = (
        storage.join(dataset, annotations),
        storage.join(dataset, "annotations_trainval2017.zip"),
    )
    if not storage.exists(uri) and storage.exists(archive):
        with open_zip(archive) as zipped:
            if annotations not in zipped.NameToInfo:
                raise UserError(
                    f"{archive}: has no {annotations}; fetch COCO's own: captioner download "
                    "coco2017"
                )
        uri = f"zip://{annotations}::{archive}"
    folder = storage.join(dataset, images)
    for there, found in (
        (uri, uri.startswith("zip://") or storage.exists(uri)),
        (folder, storage.is_folder(folder)),
    ):
        if not found and (there == uri or not storage.exists(f"{folder}.zip")):
            raise UserError(
                f"{there}: not found, nor COCO's archive of it; ingest takes other data as "
                "--annotations"
            )
    return uri, open_image_source(folder if storage.is_folder(folder) else f"{folder}.zip")
